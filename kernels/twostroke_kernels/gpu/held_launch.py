"""Launches that cost the host little: compiled kernels and tensor descriptors are made once and held.

Triton's own way to launch looks at every argument anew to find the compiled kernel that fits; for a kernel that runs
once a layer between captured pieces of a step that is most of its cost. `HeldKernels` finds it by a key instead, so the
key must hold all that the kernel is specialised on: constants, dtypes, alignments, and the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@dataclass(frozen=True, slots=True)
class Place:
    """What a descriptor needs to know of a tensor: it does not keep the tensor's memory."""

    address: int
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> Place:
        """Where the tensor begins."""
        return Place(tensor.data_ptr(), tensor.dtype)

    def data_ptr(self) -> int:
        """As a tensor's."""
        return self.address


@lru_cache(maxsize=4096)
def row_boxes(
    place: Place, num_rows: int, width: int, stride: int, box: tuple[int, int], layout: NVMMASharedLayout
) -> TensorDescriptor:
    """A descriptor of boxes of a matrix [num_rows, width] whose rows are `stride` elements apart."""
    return TensorDescriptor(place, [num_rows, width], [stride, 1], list(box), layout)


class HeldKernels:
    """The compiled forms of one kernel."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._held: dict[Hashable, Callable[..., None]] = {}

    def launch(
        self, key: Hashable, grid: tuple[int, ...], args: tuple[object, ...], constants: dict[str, Any], num_warps: int
    ) -> None:
        """`constants` are the kernel's last arguments, in its order; `key` stands for all that it is specialised on."""
        held: Any = self._held.get(key)
        if held is None:
            self._held[key] = self._kernel[grid](*args, **constants, num_warps=num_warps)
        else:
            held[(*grid, 1, 1)[:3]](*args, *constants.values())
