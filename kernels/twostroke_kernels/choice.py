"""The one line that chooses a backend for a device."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from twostroke_kernels.backend import Backend
from twostroke_kernels.invariant_torch import InvariantTorchBackend
from twostroke_kernels.torch_backend import TorchBackend

_OLDEST = (8, 0)
"""Ampere: the first cards with bfloat16 and asynchronous copies, both of which the kernels lean on."""


def choose_backend(device: torch.device, batch_invariant: bool = False) -> Backend:
    """The fastest backend that this device has; `batch_invariant`: whose rows do not depend on each other, to the bit.

    Our Triton kernels on NVIDIA cards from Ampere on. Older ones (V100: no bfloat16, no asynchronous copies), ROCm
    builds of torch (which also call their devices `cuda`; the kernels were never run there) and machines without Triton
    take the plain path in PyTorch. So does a CPU. Triton is imported only where it is used.
    """
    if runs_triton(device):
        return _triton_backend(device, batch_invariant)
    return InvariantTorchBackend(device) if batch_invariant else TorchBackend(device)


def runs_triton(device: torch.device) -> bool:
    """Whether our Triton kernels were written for this device."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _OLDEST


def _triton_backend(device: torch.device, batch_invariant: bool) -> Backend:
    from twostroke_kernels.invariant_triton import InvariantTritonBackend
    from twostroke_kernels.triton_backend import TritonBackend

    return InvariantTritonBackend(device) if batch_invariant else TritonBackend(device)
