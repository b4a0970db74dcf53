"""The engine's benchmark runs anywhere, measures what its cases say, and only ever appends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engine import CASES, TINY_CASES, main

KEYS = {"case", "value", "unit", "peer", "peer_value", "card", "commit", "torch", "date"}


def test_every_tiny_case_leaves_a_line(tmp_path: Path) -> None:
    results = tmp_path / "results" / "engine.jsonl"
    results.parent.mkdir()
    results.write_text('{"case": "earlier"}\n')
    assert main(["--tiny", "--repeat", "1", "--results", str(results)]) == 0
    earlier, *lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert earlier == {"case": "earlier"}
    assert sorted(line["case"] for line in lines) == sorted(TINY_CASES)
    assert all(set(line) == KEYS and line["value"] > 0 for line in lines)
    assert {line["unit"] for line in lines} == {"ms/step", "ms", "output tokens/s", "s"}


def test_patterns_choose_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "engine.jsonl"
    assert main(["--tiny", "prefill/*", "--repeat", "1", "--results", str(results)]) == 0
    assert [json.loads(line)["case"] for line in results.read_text().splitlines()] == ["prefill/bf16/2x24"]
    assert main(["--tiny", "train/*", "--results", str(results)]) == 2
    assert "there are decode/bf16/b2/c40" in capsys.readouterr().err


def test_cases_are_the_rows_of_the_targets() -> None:
    assert {"decode/bf16/b64/c1024", "prefill/bf16/1x8192", "throughput/bf16/512x512+256", "start/cold"} <= set(CASES)
