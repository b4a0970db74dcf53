"""What a process holds, sampled over a run: flat after a while, or not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

MIB = 1 << 20
ALLOWED_MIB = {"resident": 64.0, "allocated": 16.0, "reserved": 64.0}
"""Growth from the middle of a run to its end."""
ALLOWED_SHARE = 0.02
FEWEST_SAMPLES = 50
"""A shorter run is still warming up: libraries keep what they compile for each new shape."""


@dataclass
class MemoryRecord:
    """Samples in MiB: the process's resident memory, and what torch has allocated and reserved on the device."""

    device: torch.device
    samples: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ALLOWED_MIB})

    def sample(self) -> None:
        """One more."""
        self.samples["resident"].append(resident_mib())
        if self.device.type == "cuda":
            self.samples["allocated"].append(torch.cuda.memory_allocated(self.device) / MIB)
            self.samples["reserved"].append(torch.cuda.memory_reserved(self.device) / MIB)

    def summary(self) -> dict[str, list[float]]:
        """First, middle, and last of each: the largest of a fifth of the run."""
        return {name: [round(x, 1) for x in _thirds(values)] for name, values in self.samples.items() if values}

    def growths(self) -> list[str]:
        """What grew from the middle of the run to its end by more than is allowed."""
        found = []
        for name, (_, middle, last) in self.summary().items():
            if len(self.samples[name]) >= FEWEST_SAMPLES and last - middle > ALLOWED_MIB[name] + ALLOWED_SHARE * middle:
                found.append(f"{name} memory grew from {middle} to {last} MiB")
        return found


def _thirds(values: list[float]) -> tuple[float, float, float]:
    fifth = max(1, len(values) // 5)
    middle = len(values) // 2
    return max(values[:fifth]), max(values[max(0, middle - fifth) : middle + 1]), max(values[-fifth:])


def resident_mib() -> float:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB
