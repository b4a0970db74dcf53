"""Whole engines in one process, a tiny model, a channel between them: what decode streams is what one engine does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from twostroke_engine.request import Request, SamplingParams

from tests.support.split_engines import SplitEngines
from tests.support.tiny_model import make_tiny_llama
from tests.support.transfer_matrix import BLOCK_SIZES, asked, compare, pairwise, prompt_of

MAX_TOKENS = 24


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[SplitEngines]:
    made = SplitEngines(make_tiny_llama(tmp_path / "model"))
    yield made
    made.stop()


def make_request(number: int, suffix: str = "") -> Request:
    """Lengths cross blocks and chunks; groups of three share their prefixes; some have two choices."""
    return Request(
        id=f"r{number}{suffix}",
        token_ids=tuple((number // 3 * 7 + at) % 200 + 3 for at in range(5 + number * 9)),
        sampling=SamplingParams(
            temperature=0.8 if number % 2 else 0.0, seed=number, max_tokens=MAX_TOKENS, ignore_eos=True
        ),
        n=1 + (number % 5 == 0),
    )


def test_split_streams_are_colocated_streams(engines: SplitEngines) -> None:
    split = engines.run([make_request(number) for number in range(20)])
    whole = engines.run_on("alone", [make_request(number, "c") for number in range(20)])
    assert len(split) == 24
    for (request_id, choice), tokens in split.items():
        assert sorted(tokens) == list(range(MAX_TOKENS))
        assert tokens == whole[f"{request_id}c", choice]


@pytest.mark.parametrize("block_sizes", BLOCK_SIZES, ids=str)
def test_block_sizes_lengths_and_hits_pairwise(tmp_path: Path, block_sizes: tuple[int, int]) -> None:
    """All with all: `python -m tests.soak.transfer_matrix`."""
    found = compare(make_tiny_llama(tmp_path / "model"), block_sizes, pairwise())
    assert found.different + found.wrong_facts == []
    assert found.cases == 33


@pytest.mark.parametrize("wish", ["fp8", "int8"])
def test_a_lossy_format_halves_the_bytes_and_serves(tmp_path: Path, wish: str) -> None:
    """The tiny model's heads have 16 numbers: 20 bytes with their scale, of 64 in float32, of 32 in bfloat16."""
    requests = [asked(f"r{number}", prompt_of(number, 40 + number)) for number in range(4)]
    engines = SplitEngines(make_tiny_llama(tmp_path / "model"), (16, 64), transfer_dtype=wish)
    streams = engines.run(requests)
    engines.stop()
    assert all(len(stream) == 12 for stream in streams.values())
    for request in requests:
        num_items = -(-request.num_prompt_tokens // 16)
        assert engines.ends["decode", request.id].facts.kv_bytes == num_items * 16 * 2 * 2 * 2 * 20
