"""Programmatic dependent launch (Hopper on): a kernel is set up while the one before it in the stream still runs.

Rules that keep it right, whatever runs before or after, in a captured graph or not:

- A kernel launched so waits in every program, those that have nothing to do too, and before it reads what any kernel
  may have written or writes anything. Its end then means the end of all that was launched before it.
- Before the wait it may read what our kernels never write: weights, tables of angles, a step's index tensors.
- It releases the next kernel after its last load. Released sooner, the next one's programs take places unevenly while
  this one's are still coming. That holds for kernels of many waves too, measured at batch 1 of an 8B model.

A kernel that never releases (cuBLAS's, PyTorch's) releases by ending; one that was not launched so simply waits for
all before it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_FIRST = (9, 0)


def dependent(device: torch.device) -> dict[str, bool]:
    """What a launch on this device passes beside the kernel's own arguments; the kernel takes `PDL`, a constant."""
    return {"PDL": True, "launch_pdl": True} if has_dependent_launch(device) else {"PDL": False}


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether the card knows it; the interpreter does not."""
    if device.type != "cuda" or torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= _FIRST


@triton.jit
def await_earlier(PDL: tl.constexpr):
    """Until all earlier kernels have ended and what they wrote can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def release_later(PDL: tl.constexpr):
    """Lets the next kernel start once every program of this one has come here."""
    if PDL:
        gdc_launch_dependents()
