"""What was measured, one JSON line a case, appended: figures of another day or card stay where they are."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measurement:
    """One case of one run."""

    case: str
    value: float
    unit: str
    peer: str | None = None
    """Who did the same work on the same card in the same run."""
    peer_value: float | None = None
    engine: str = "twostroke"
    """Whose figure `value` is."""
    share_of_limit: float | None = None
    """Of the device's limit, by ceilings measured in the same run; None: no such limit, or not on a GPU."""


def append(measurement: Measurement, path: Path, device: str) -> None:
    """Adds a line, with where and when it was measured."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"card": card(device), "commit": commit(), "torch": torch.__version__, "date": now}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(measurement), **facts}) + "\n")


def card(device: str) -> str:
    """The GPU's name, or the number of CPU threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def commit() -> str:
    """Of the working tree, `-dirty` if it was changed since; `TWOSTROKE_COMMIT` where there is no repository."""
    if told := os.environ.get("TWOSTROKE_COMMIT"):
        return told
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
