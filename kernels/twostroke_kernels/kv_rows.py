"""The KV pool's layer seen as rows of one head each, so that one `index_select` gathers keys and values head-major."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from twostroke_kernels.backend import PagedBatch

Derived = TypeVar("Derived")


@dataclass(frozen=True, slots=True)
class LayerRows:
    """How `kv_layer` [N, 2, B, G, D] lies in memory, counted in rows of D elements."""

    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_size: int
    block_stride: int

    @classmethod
    def of(cls, kv_layer: Tensor) -> LayerRows:
        """The geometry of a view `pool[:, layer]`."""
        num_blocks, _, block_size, num_kv_heads, head_size = kv_layer.shape
        return cls(num_blocks, block_size, num_kv_heads, head_size, kv_layer.stride(0) // head_size)

    @property
    def half(self) -> int:
        """Rows from a token's key to its value."""
        return self.block_size * self.num_kv_heads

    def view(self, kv_layer: Tensor) -> Tensor:
        """[rows, D], sharing memory."""
        num_rows = (self.num_blocks - 1) * self.block_stride + 2 * self.half
        return kv_layer.as_strided((num_rows, self.head_size), (self.head_size, 1))

    def of_slots(self, slots: Tensor) -> Tensor:
        """[T] slots -> [2, T, G] rows: keys, then values."""
        block, token = slots // self.block_size, slots % self.block_size
        first = block * self.block_stride + token * self.num_kv_heads
        keys = first[:, None] + torch.arange(self.num_kv_heads, device=slots.device)
        return torch.stack((keys, keys + self.half))

    def of_contexts(self, block_tables: Tensor, context_lens: Tensor, length: int) -> Tensor:
        """[S, blocks], [S] -> [2, S, G, length] rows; beyond a context its first token is repeated.

        So nothing that lies in unused rows of the pool, NaN included, is ever read.
        """
        token = torch.arange(length, device=block_tables.device)
        token = torch.where(token < context_lens[:, None], token, 0)
        slots = block_tables.gather(1, token // self.block_size) * self.block_size + token % self.block_size
        rows = self.of_slots(slots.flatten())
        return rows.view(2, *slots.shape, self.num_kv_heads).transpose(2, 3).contiguous()


class StepMemo(Generic[Derived]):
    """Keeps what was last derived from a step's index tensors: all layers of the step ask for the same."""

    def __init__(self) -> None:
        self._sources: tuple[Tensor | PagedBatch, ...] = ()
        self._rows: LayerRows | None = None
        self._derived: Derived | None = None

    def get(self, sources: tuple[Tensor | PagedBatch, ...], rows: LayerRows, derive: Callable[[], Derived]) -> Derived:
        """`derive()`, unless the very same objects were asked about last."""
        same = len(sources) == len(self._sources) and all(a is b for a, b in zip(sources, self._sources, strict=True))
        if not same or rows != self._rows or self._derived is None:
            self._derived = derive()
            self._sources, self._rows = sources, rows
        return self._derived
