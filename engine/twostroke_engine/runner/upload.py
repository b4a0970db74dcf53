"""How a step's small arrays get to a device, and its results back, without the host waiting for what it need not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Upload = Callable[[NDArray[Any]], Tensor]
"""An array that no one changes afterwards -> a tensor on the device; on a CPU it is the array's own memory."""
Download = Callable[[Sequence[Tensor]], Callable[[], Sequence[Tensor]]]
"""Tensors on the device -> a call that waits for them and gives them on the host. Later work is not waited for."""


def uploader(device: torch.device) -> Upload:
    """The way to this device."""
    if device.type == "cpu":
        return torch.from_numpy

    def upload(values: NDArray[Any]) -> Tensor:
        # A copy from pageable memory would wait for everything queued before it. The pinned copy is kept by torch until
        # the device has read it.
        return torch.from_numpy(np.ascontiguousarray(values)).pin_memory().to(device, non_blocking=True)

    return upload


def downloader(device: torch.device) -> Download:
    """The way back from this device."""
    if device.type == "cpu":
        return lambda tensors: lambda: tensors

    def download(tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()

        def result() -> Sequence[Tensor]:
            copied.synchronize()
            return copies

        return result

    return download
