"""Paged attention in PyTorch whose result for a query depends on that query and its context alone, to the bit.

A product of matrices is repeatable for one shape, but another shape may be summed in another order. So every product
here has a shape, and a query a place in it, that follow from the query's own position: one query over its whole context
when decoding; in a prompt, tiles of positions that start at multiples of their length, however the prompt was cut. What
else is in a tile is another row of the product, and cannot reach this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twostroke_kernels.backend import PagedBatch
from twostroke_kernels.kv_rows import LayerRows, StepMemo

_TILE = 32
"""Positions of a prompt that are computed together: fewer leave the products small, more waste them on short chunks."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Queries of one sequence in a step, and where its context lies."""

    row: int
    """The first query's row of `q`."""
    position: int
    """The first query's position."""
    context_len: int
    padded_len: int
    context: Tensor
    """[2 * G * padded length] rows of the layer, flat; the first token's again beyond the context."""

    def gather(self, layer: Tensor, rows: LayerRows) -> tuple[Tensor, Tensor]:
        """Keys and values, [G, padded length, D] each."""
        gathered = layer.index_select(0, self.context)
        keys, values = gathered.view(2, rows.num_kv_heads, self.padded_len, rows.head_size)
        return keys, values


def _stretches(batch: PagedBatch, rows: LayerRows, tile: int) -> list[_Stretch]:
    """Every sequence that has queries; contexts are padded to whole tiles."""
    found = []
    starts, lengths = batch.query_starts.tolist(), batch.context_lens.tolist()
    for index, length in enumerate(lengths):
        query_len = starts[index + 1] - starts[index]
        if query_len:
            one = slice(index, index + 1)
            padded = -(-length // tile) * tile
            context = rows.of_contexts(batch.block_tables[one], batch.context_lens[one], padded)
            found.append(_Stretch(starts[index], length - query_len, length, padded, context.flatten()))
    return found


class LoneQueries:
    """One query per sequence, each by itself."""

    def __init__(self) -> None:
        self._memo: StepMemo[list[_Stretch]] = StepMemo()

    def __call__(self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None) -> Tensor:
        """See `Backend.decode_attention`."""
        rows = LayerRows.of(kv_layer)
        layer = rows.view(kv_layer)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        for stretch in self._memo.get((batch,), rows, lambda: _stretches(batch, rows, tile=1)):
            keys, values = stretch.gather(layer, rows)
            query = q[stretch.row].reshape(rows.num_kv_heads, -1, rows.head_size)
            out[stretch.row] = _attend(query, keys, values, scale, hidden=None).view(q.shape[1:])
        return out


class PositionTiles:
    """Causal attention of prompt chunks, in tiles of positions that are the same for every way to cut a prompt."""

    def __init__(self, device: torch.device) -> None:
        self._memo: StepMemo[list[_Stretch]] = StepMemo()
        self._above_diagonal = torch.ones(_TILE, _TILE, dtype=torch.bool, device=device).triu_(1)

    def __call__(self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None) -> Tensor:
        """See `Backend.prefill_attention`."""
        rows = LayerRows.of(kv_layer)
        layer = rows.view(kv_layer)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        for stretch in self._memo.get((batch,), rows, lambda: _stretches(batch, rows, _TILE)):
            keys, values = stretch.gather(layer, rows)
            for start, in_tile, in_q in _tiles(stretch):
                tile = q.new_zeros(_TILE, *q.shape[1:])
                tile[in_tile] = q[in_q]
                end = start + _TILE
                out[in_q] = self._tile(tile, keys[:, :end], values[:, :end], scale)[in_tile]
        return out

    def _tile(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """q [tile, H, D] at the last positions of keys and values [G, n, D] -> [tile, H, D]."""
        groups, _, head_size = keys.shape
        queries = q.view(_TILE, groups, -1, head_size).permute(1, 2, 0, 3).reshape(groups, -1, head_size)
        mixed = _attend(queries, keys, values, scale, self._above_diagonal)
        return mixed.view(groups, -1, _TILE, head_size).permute(2, 0, 1, 3).reshape(q.shape)


def _tiles(stretch: _Stretch) -> Iterator[tuple[int, slice, slice]]:
    """(first position, rows of the tile, rows of `q`) of each tile that holds queries."""
    for start in range(stretch.position // _TILE * _TILE, stretch.context_len, _TILE):
        first, last = max(start, stretch.position), min(start + _TILE, stretch.context_len)
        before = stretch.row - stretch.position
        yield start, slice(first - start, last - start), slice(before + first, before + last)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """queries [G, m, D], keys and values [G, n, D] -> [G, m, D]; scores and softmax are float32 or wider.

    `hidden` [t, t] says which of the last t keys each of t queries does not see; m is a multiple of t.

    All factors are copied: how a view lies in memory could choose another way to multiply.
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = torch.bmm(_copy(queries, wide), _copy(keys, wide).transpose(1, 2)).mul_(scale)
    if hidden is not None:
        size = hidden.shape[0]
        latest = scores.view(keys.shape[0], -1, size, keys.shape[1])[..., -size:]
        latest.masked_fill_(hidden, float("-inf"))
    weights = scores.softmax(-1).to(queries.dtype)
    return torch.bmm(weights, _copy(values, values.dtype))


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)
