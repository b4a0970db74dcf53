"""Other projects' clients: what they wrote is kept, says that all was answered, and a failure in it would be seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.clients import RESULTS, ClientFailed, answered_by_aiperf, answered_by_vllm, main

KEPT = {"aiperf": answered_by_aiperf, "vllm-openai-chat": answered_by_vllm, "vllm-openai": answered_by_vllm}


@pytest.mark.parametrize(("name", "answered_in"), KEPT.items())
def test_kept_output_says_that_everything_was_answered(name: str, answered_in: Callable[[Path], int]) -> None:
    assert answered_in(RESULTS / name) == 40
    assert (RESULTS / name / "output.txt").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        ("aiperf", "profile_export_aiperf.json", {"error_summary": [{"error_details": {"code": 500}, "count": 2}]}),
        ("vllm-openai", "result.json", {"failed": 2}),
    ],
)
def test_a_failed_request_is_seen(tmp_path: Path, name: str, file: str, change: dict[str, object]) -> None:
    shutil.copy(RESULTS / name / file, tmp_path / file)
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(content | change))
    with pytest.raises(ClientFailed, match="2 failed requests"):
        KEPT[name](tmp_path)


def test_somebody_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "--aiperf" in capsys.readouterr().err
