"""Whole engines in one process, a tiny model, a channel between them: what decode streams is what one engine does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from twostroke_engine.request import Request, SamplingParams

from tests.support.split_engines import SplitEngines
from tests.support.tiny_model import make_tiny_llama

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


BLOCK_SIZES = [(16, 16), (16, 64), (64, 16)]
CHUNK = 64
"""Token budget of a step."""
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 200)
HITS = (0.0, 0.5, 1.0)
"""Share of a prompt that a side computed before: none, some or all of it."""
Case = tuple[int, float, float]
"""Length, hits of the prefill and of the decode engine."""


def pairwise() -> list[Case]:
    """Each length with each hit on either side, and each hit with each hit."""
    return [(length, HITS[at], HITS[(at + row) % 3]) for row, length in enumerate(LENGTHS) for at in range(3)]


def whole_matrix() -> list[Case]:
    return [(length, prefill, decode) for length in (*LENGTHS, 2000) for prefill in HITS for decode in HITS]


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    """Each prompt differs from every other one in its first tokens, so that hits are those that were meant."""
    return tuple((number * 7919 + at * at * 31 + at * (number % 13)) % 290 + 3 for at in range(length))


def asked(name: str, tokens: tuple[int, ...], max_tokens: int = 12) -> Request:
    return Request(
        id=name,
        token_ids=tokens,
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
    )


def check_matrix(engines: SplitEngines, cases: list[Case], block_sizes: tuple[int, int]) -> None:
    prompts = [prompt_of(number, length) for number, (length, _, _) in enumerate(cases)]
    for side, engine in ((1, "prefill"), (2, "decode")):
        known = [(number, int(case[0] * case[side])) for number, case in enumerate(cases)]  # type: ignore[misc]
        engines.run_on(engine, [asked(f"k{number}", prompts[number][:count], 1) for number, count in known if count])
    split = engines.run([asked(f"r{number}", prompt) for number, prompt in enumerate(prompts)])
    whole = engines.run_on("alone", [asked(f"r{number}", prompt) for number, prompt in enumerate(prompts)])
    assert [name for name in whole if split[name] != whole[name]] == []
    for number, (length, _, held) in enumerate(cases):
        facts = engines.ends["decode", f"r{number}"].facts
        assert facts.skipped_tokens == int(length * held) // block_sizes[1] * block_sizes[1]
        assert facts.kv_resends == 0


@pytest.mark.parametrize("block_sizes", BLOCK_SIZES, ids=str)
def test_block_sizes_lengths_and_hits_pairwise(tmp_path: Path, block_sizes: tuple[int, int]) -> None:
    engines = SplitEngines(make_tiny_llama(tmp_path / "model"), block_sizes, num_tokens=1 << 13, max_step_tokens=CHUNK)
    check_matrix(engines, pairwise(), block_sizes)
    engines.stop()


@pytest.mark.slow
@pytest.mark.parametrize("block_sizes", BLOCK_SIZES, ids=str)
def test_block_sizes_lengths_and_hits_all_with_all(tmp_path: Path, block_sizes: tuple[int, int]) -> None:
    engines = SplitEngines(make_tiny_llama(tmp_path / "model"), block_sizes, num_tokens=1 << 16, max_step_tokens=CHUNK)
    check_matrix(engines, whole_matrix(), block_sizes)
    engines.stop()


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
