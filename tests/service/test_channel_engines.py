"""Whole engines over channels other than the best one: what decode streams is what one engine streams alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from twostroke_engine.request import Request, SamplingParams

from tests.support.split_engines import SplitEngines
from tests.support.tiny_model import make_tiny_llama

MAX_TOKENS = 8


def make_request(number: int, suffix: str = "") -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    return Request(
        id=f"r{number}{suffix}",
        token_ids=tuple((number * 7 + at) % 200 + 3 for at in range(5 + number * 19)),
        sampling=sampling,
    )


@pytest.mark.parametrize("channel", ["collective", "tcp"])
def test_split_streams_are_colocated_streams(tmp_path: Path, channel: str) -> None:
    engines = SplitEngines(make_tiny_llama(tmp_path / "model"), channels=(channel,))
    try:
        split = engines.run([make_request(number) for number in range(8)])
        whole = engines.run_on("alone", [make_request(number, "c") for number in range(8)])
    finally:
        engines.stop()
    assert len(split) == 8
    for (request_id, choice), tokens in split.items():
        assert sorted(tokens) == list(range(MAX_TOKENS))
        assert tokens == whole[f"{request_id}c", choice]
