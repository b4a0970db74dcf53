"""Queries and keys normed (if the model does) and rotated, keys and values written into the pool: one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import Rotation
from twostroke_kernels.gpu.dependent_launch import await_earlier, dependent, release_later
from twostroke_kernels.gpu.paged_kv import check_layer

_MANY_TOKENS = 256
_HEADS_PER_WARP = 4


def rotate_and_write_kv(
    qkv: Tensor,
    positions: Tensor,
    rotation: Rotation,
    kv_layer: Tensor,
    slots: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """See `Backend.rotate_and_write_kv`."""
    rotary, head_norm = rotation.table, rotation.norm
    _, _, block_size, num_kv_heads, head_size = kv_layer.shape
    num_tokens, num_heads = qkv.shape[0], qkv.shape[1] // head_size - 2 * num_kv_heads
    q = out
    if q is None:
        q = torch.empty((num_tokens, num_heads, head_size), dtype=qkv.dtype, device=qkv.device)
    check_layer(q, kv_layer)
    if num_tokens == 0:
        return q
    # One token's heads are spread over programs while tokens alone would not fill the card. A warp has as many heads
    # either way, so a head's sums are taken in the same order.
    num_warps = 1 if num_tokens < _MANY_TOKENS else 4
    heads_at_once = num_warps * _HEADS_PER_WARP
    half = rotary.cos.shape[1]
    rotate_heads[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads_at_once))](
        qkv,
        positions,
        rotary.cos,
        rotary.sin,
        None if head_norm is None else head_norm.q_weight,
        None if head_norm is None else head_norm.k_weight,
        0.0 if head_norm is None else head_norm.eps,
        q,
        kv_layer,
        slots,
        qkv.stride(0),
        kv_layer.stride(0),
        H=num_heads,
        G=num_kv_heads,
        D=head_size,
        HALF=half,
        HALF_DIMS=triton.next_power_of_2(half),
        REST_DIMS=triton.next_power_of_2(head_size - 2 * half) if head_size > 2 * half else 0,
        BLOCK=block_size,
        HEADS=heads_at_once,
        num_warps=num_warps,
        **dependent(q.device),
    )
    return q


@triton.jit
def load_angles(
    cos: tl.tensor, sin: tl.tensor, position: tl.tensor, dims: tl.tensor, turning: tl.tensor, HALF: tl.constexpr
) -> tl.tuple:
    """Cosine and sine of a position's angles, for all heads."""
    angle = position * HALF + dims
    c = tl.load(cos + angle, mask=turning, other=0.0)
    s = tl.load(sin + angle, mask=turning, other=0.0)
    return c[None, :], s[None, :]


@triton.jit
def weigh(
    x: tl.tensor,
    factor: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    is_q: tl.tensor,
    is_v: tl.tensor,
    dims: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """Queries and keys times their head's factor and their own weights; values as they are."""
    for_q = tl.load(q_weight + dims, mask=inside, other=0.0).to(tl.float32)
    for_k = tl.load(k_weight + dims, mask=inside, other=0.0).to(tl.float32)
    weights = tl.where(is_q[:, None], for_q[None, :], for_k[None, :])
    return tl.where(is_v[:, None], x, x * factor[:, None] * weights)


@triton.jit
def slot_of_heads(
    slot: tl.tensor, heads: tl.tensor, block_stride: tl.tensor, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Where in the layer key heads 0 to G - 1 and value heads G to 2 G - 1 of a slot lie."""
    of_values = tl.where(heads >= G, BLOCK * G * D - G * D, 0)
    return (slot // BLOCK) * block_stride + (slot % BLOCK) * (G * D) + heads * D + of_values


@triton.jit
def store_heads(
    x: tl.tensor,
    q_rows: tl.tensor,
    kv_rows: tl.tensor,
    dims: tl.tensor,
    is_q: tl.tensor,
    is_kv: tl.tensor,
    inside: tl.tensor,
) -> None:
    """Queries go to their rows of the output, keys and values to their slots in the pool."""
    x = x.to(q_rows.dtype.element_ty)
    tl.store(q_rows[:, None] + dims[None, :], x, mask=is_q[:, None] & inside[None, :])
    tl.store(kv_rows[:, None] + dims[None, :], x, mask=is_kv[:, None] & inside[None, :])


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rotate_heads(
    qkv: tl.tensor,
    positions: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    eps: tl.tensor,
    q: tl.tensor,
    layer: tl.tensor,
    slots: tl.tensor,
    qkv_stride: tl.tensor,
    block_stride: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_DIMS: tl.constexpr,
    REST_DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A head is three pieces: two halves that turn into each other and, if only some dimensions turn, the rest."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    exists = heads < H + 2 * G
    is_q, is_v = heads < H, heads >= H + G
    dims = tl.arange(0, HALF_DIMS)
    turning = dims < HALF
    mask = exists[:, None] & turning[None, :]
    source = qkv + token * qkv_stride + (heads * D)[:, None]
    slot = tl.load(slots + token)
    c, s = load_angles(cos, sin, tl.load(positions + token), dims, turning, HALF)
    await_earlier(PDL)
    first = tl.load(source + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    if REST_DIMS > 0:
        rest_dims = 2 * HALF + tl.arange(0, REST_DIMS)
        inside = rest_dims < D
        rest = tl.load(source + rest_dims[None, :], mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
    release_later(PDL)
    if q_weight is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST_DIMS > 0:
            squares += tl.sum(rest * rest, 1)
        factor = 1 / tl.sqrt_rn(squares / D + eps)
        first = weigh(first, factor, q_weight, k_weight, is_q, is_v, dims, turning)
        second = weigh(second, factor, q_weight, k_weight, is_q, is_v, HALF + dims, turning)
        if REST_DIMS > 0:
            rest = weigh(rest, factor, q_weight, k_weight, is_q, is_v, rest_dims, inside)
    turned_first = tl.where(is_v[:, None], first, first * c - second * s)
    turned_second = tl.where(is_v[:, None], second, second * c + first * s)
    q_rows = q + token * (H * D) + heads * D
    kv_rows = layer + slot_of_heads(slot, heads - H, block_stride, G, D, BLOCK)
    is_kv = exists & (heads >= H)
    store_heads(turned_first, q_rows, kv_rows, dims, is_q, is_kv, turning)
    store_heads(turned_second, q_rows, kv_rows, HALF + dims, is_q, is_kv, turning)
    if REST_DIMS > 0:
        store_heads(rest, q_rows, kv_rows, rest_dims, is_q, is_kv, inside)
