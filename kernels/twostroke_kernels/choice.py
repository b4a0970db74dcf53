"""The one line that chooses a backend for a device."""

from __future__ import annotations

import torch

from twostroke_kernels.backend import Backend
from twostroke_kernels.torch_backend import TorchBackend


def choose_backend(device: torch.device) -> Backend:
    """The fastest backend that this device has."""
    return TorchBackend(device)
