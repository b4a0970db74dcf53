"""The benchmark of channels checks what came, and leaves a line for each channel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from twostroke_engine.transfer.schemes import possible_names

from benchmarks.channels import main

pytestmark = pytest.mark.slow


def test_every_channel_leaves_a_line_beside_tcp(tmp_path: Path) -> None:
    results = tmp_path / "channels.jsonl"
    assert main(["--tiny", "--results", str(results)]) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    names = possible_names("cpu")
    assert set(names) >= {"shm", "collective", "tcp"}
    assert [line["case"] for line in lines] == [f"channel/{name}/64KiB" for name in names]
    assert all(line["value"] > 0 and line["unit"] == "GB/s" for line in lines)
    assert [line["peer"] for line in lines] == [*["tcp"] * (len(names) - 1), None]
    assert lines[0]["peer_value"] == lines[-1]["value"]
