"""KV gathered from a pool, converted to what travels, and back, in PyTorch. See `KVWire`."""

from __future__ import annotations

import torch
from torch import Tensor

from twostroke_kernels.backend import SCALE_FLOOR, KVWire


def gather_items(pool: Tensor, items: Tensor, first_layer: int, num_layers: int, wire: KVWire) -> Tensor:
    """[n, num_layers, 2, b, G, D] in the pool's dtype, contiguous."""
    split, layers = wire.split(pool), slice(first_layer, first_layer + num_layers)
    if split == 1:
        return pool[:, layers].index_select(0, items)
    return _parts(pool, split)[items // split, items % split, layers].contiguous()


def scatter_items(pool: Tensor, items: Tensor, first_layer: int, values: Tensor, wire: KVWire) -> None:
    """The way back, in place."""
    split, layers = wire.split(pool), slice(first_layer, first_layer + values.shape[1])
    if split == 1:
        pool[:, layers].index_copy_(0, items, values)
    else:
        _parts(pool, split)[items // split, items % split, layers] = values


def to_wire(values: Tensor, wire: KVWire) -> Tensor:
    """[n, L, 2, b, G, D] -> uint8 [n, bytes]."""
    count, (num_heads, head_size) = values.shape[0], values.shape[-2:]
    size = values.shape[1] * wire.layer_bytes(num_heads, head_size)
    if not wire.peak:
        return values.to(wire.dtype).view(count, values[0].numel() if count else 0).view(torch.uint8).view(count, size)
    wide = values.float()
    largest = wide.abs().amax(-1)  # NaN wherever a value is NaN
    # By a tensor: on a GPU, PyTorch divides by a number as it multiplies by its rounded inverse.
    scales = (largest / torch.full_like(largest, wire.peak)).clamp_min(SCALE_FLOOR)
    scales.masked_fill_(~torch.isfinite(largest), torch.nan)
    scaled = torch.nan_to_num_(wide.div_(scales[..., None]), 0.0)
    codes = scaled.round_().to(torch.int8) if wire.dtype == torch.int8 else scaled.to(wire.dtype)
    parts = (codes.view(torch.uint8).flatten(1), scales.flatten(1).view(torch.uint8))
    return torch.cat(parts, 1)


def from_wire(segment: Tensor, pool: Tensor, wire: KVWire) -> Tensor:
    """uint8 [n, bytes] -> [n, L, 2, b, G, D] in the dtype of `pool`.

    Raises:
        ValueError: the bytes are no whole number of layers.
    """
    heads = (pool.shape[4], pool.shape[5])
    num_layers = num_layers_in(segment, pool, wire)
    shape = (segment.shape[0], num_layers, 2, wire.block_size, *heads)
    if not wire.peak:
        return segment.contiguous().view(wire.dtype).view(shape).to(pool.dtype)
    num_rows = segment.shape[1] // (heads[1] + 4)
    values, scales = segment[:, : num_rows * heads[1]], segment[:, num_rows * heads[1] :]
    wide = values.contiguous().view(wire.dtype).view(shape).float()
    return wide.mul_(scales.contiguous().view(torch.float32).view(shape[:-1])[..., None]).to(pool.dtype)


def num_layers_in(segment: Tensor, pool: Tensor, wire: KVWire) -> int:
    """Layers of a segment for `pool`.

    Raises:
        ValueError: it is no segment of this pool.
    """
    layer_bytes = wire.layer_bytes(pool.shape[4], pool.shape[5])
    if segment.dtype != torch.uint8 or segment.dim() != 2 or segment.shape[1] % layer_bytes:
        shape = (tuple(segment.shape), segment.dtype)
        raise ValueError(
            f"segment {shape} does not fit pool {tuple(pool.shape)}: a layer of an item is {layer_bytes} bytes"
        )
    return segment.shape[1] // layer_bytes


def _parts(pool: Tensor, split: int) -> Tensor:
    """The pool as [N, split, L, 2, b, G, D], sharing memory."""
    num_blocks, num_layers, _, block_size, *heads = pool.shape
    return pool.view(num_blocks, num_layers, 2, split, block_size // split, *heads).movedim(3, 1)
