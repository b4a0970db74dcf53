"""`Backend`: every operation the engine may ask for, with shapes and dtypes.

Letters in shapes: T tokens of a step, S sequences, R rows to sample, V vocabulary, H query heads, G KV heads (H is a
multiple of G), D head size, B block size in tokens, N blocks of the pool, L layers, E hidden size, I intermediate
size. Floating tensors have the model's dtype unless a line says otherwise; indices are int64.

The KV pool is one tensor `[N, L, 2, B, G, D]` (2: keys, values); `kv_layer` is its view `pool[:, layer]`, so
`[N, 2, B, G, D]` and strided. A slot is `block_id * B + token`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Sequences of one kind (decoding, or prompt chunks) in a step, for attention."""

    block_tables: Tensor
    """[S, max blocks] block ids, padded with any valid id (the runner repeats one of the row's own)."""
    query_starts: Tensor
    """[S + 1] row of `q` where each sequence starts."""
    context_lens: Tensor
    """[S] tokens in the cache after this step's were written; the queries are the last of them."""
    max_query_len: int
    max_context_len: int

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.block_tables.shape[0]


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Precomputed angles, float32."""

    cos: Tensor
    """[max positions, rotary size / 2]."""
    sin: Tensor


@dataclass(frozen=True, slots=True)
class RowNorm:
    """RMS norm of rows of hidden states, before a linear layer."""

    weight: Tensor
    """[E]."""
    eps: float


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of each query and key head before rotation (Qwen3); weights [D]."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a layer does to each query and key head before it attends."""

    table: RotaryTable
    norm: HeadNorm | None
    """First."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """Sparse adjustments of logits; `rows`/`tokens` name distinct cells, the other vectors run beside them."""

    rows: Tensor
    """[P] row of the logits."""
    tokens: Tensor
    """[P] vocabulary id."""
    repetition: Tensor
    """[P] float32: positive logits are divided by it, others multiplied; 1 does nothing."""
    subtract: Tensor
    """[P] float32, subtracted after repetition: presence + frequency * count - logit bias; +inf masks a token."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each row is sampled; all [R]."""

    temperature: Tensor
    """float32; 0 is greedy."""
    top_k: Tensor
    """int64; 0 keeps all."""
    top_p: Tensor
    """float32."""
    min_p: Tensor
    """float32."""
    seed: Tensor
    """int64, the bits of an unsigned 64-bit seed."""
    choice: Tensor
    """int64."""
    position: Tensor
    """int64: absolute position of the token to be chosen (prompt length for the first one)."""
    all_greedy: bool
    """Every temperature is 0: noise and filters are skipped."""
    num_logprobs: int
    """-1: no logprobs at all; k: also the k best of each row."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What was chosen; logprobs are of the raw logits (before penalties, bias, temperature and filters)."""

    token_ids: Tensor
    """[R] int64; ties go to the smaller id."""
    logprobs: Tensor
    """[R] float32; zeros if not asked for."""
    top_ids: Tensor
    """[R, k] int64."""
    top_logprobs: Tensor
    """[R, k] float32, largest first."""
    finite: Tensor
    """[R] bool: the raw logits held neither NaN nor infinity."""


_SCALED_PEAKS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass(frozen=True, slots=True)
class KVWire:
    """How KV travels: items of `block_size` tokens, each `[layer, k|v, token, head, dim]` in `dtype`.

    float32, bfloat16 and float16 are the values themselves, rounded to the nearest (ties to even). float8_e4m3fn and
    int8 are the values of a head of a token divided by one float32 scale and rounded so; the scales,
    `[layer, k|v, token, head]`, follow an item's values. With `peak` 448 or 127 a scale is the largest magnitude
    divided by the peak, at least `SCALE_FLOOR`; NaN if a value is not finite, so that all of them arrive as NaN. All
    of it is float32 arithmetic, rounded to the nearest at each operation.

    Error per element: what arrives differs from a value x of a head whose largest magnitude is m by at most m / 254
    (int8), or the larger of |x| / 16 and m / 458752 (float8_e4m3fn). To that come float32's own rounding (m * 2^-22),
    the floor of scales (2^-101) and the rounding to the pool's dtype.
    """

    block_size: int
    dtype: torch.dtype

    @property
    def peak(self) -> float:
        """The largest number of a scaled format; 0 for one without scales."""
        return _SCALED_PEAKS.get(self.dtype, 0.0)

    def layer_bytes(self, num_kv_heads: int, head_size: int) -> int:
        """Bytes of one layer of one item.

        Raises:
            ValueError: a head is no whole number of 32-bit words.
        """
        row_bytes = head_size * self.dtype.itemsize
        if row_bytes % 4:
            raise ValueError(f"{head_size} values of {self.dtype} are no whole number of 32-bit words")
        return 2 * self.block_size * num_kv_heads * (row_bytes + (4 if self.peak else 0))

    def split(self, pool: Tensor) -> int:
        """Items that make a block of `pool` [N, L, 2, B, G, D].

        Raises:
            ValueError: they do not fill it.
        """
        if pool.shape[3] % self.block_size:
            raise ValueError(f"items of {self.block_size} tokens do not fill blocks of {pool.shape[3]}")
        return pool.shape[3] // self.block_size


@dataclass(frozen=True, slots=True)
class KVItems:
    """Some items of a pool [N, L, 2, B, G, D], counted as in `Backend.pack_kv`."""

    pool: Tensor
    ids: Tensor
    """[n] int64, on the device of whoever reads or writes them."""


SCALE_FLOOR = 2.0**-100
"""Smallest scale of a `KVWire`: keeps the arithmetic away from subnormal numbers."""


def check_push(target: KVItems, wire: KVWire) -> None:
    """A look at the arguments of `Backend.push_kv`.

    Raises:
        ValueError: the target does not store what would be written.
    """
    if target.pool.dtype is not wire.dtype or wire.peak:
        raise ValueError(f"a pool of {target.pool.dtype} does not store {wire.dtype} as it travels")


class Backend(Protocol):
    """The operations of one kind of device. Outputs are new tensors unless a line says in place, or `out` is given.

    `out` has the shape and dtype of the output, and may be a slice of the rows of a larger tensor; it is also returned.

    A backend that does not capture graphs may remember what it derived from a step's index tensors (positions, slots, a
    `PagedBatch`): for it they are new objects in every step and never changed in place.
    """

    device: torch.device
    captures_graphs: bool
    """A decode step may be captured in a CUDA graph: everything but attention to prompt chunks and sampling neither
    synchronises, nor remembers index tensors, and reads lengths on the device (`max_context_len` is then an upper
    bound)."""
    reads_unwritten: bool
    """Attention multiplies rows of a context's last block that no token was written to by zero, so they must hold
    finite numbers; otherwise it never reads them, or masks what they hold."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in], weight [out, in], bias [out] -> [T, out]."""
        ...

    def norm_linear(self, x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """linear(rms_norm(x)): x [T, E], weight [out, E] -> [T, out]. Whether the norm is rounded to the model's dtype
        on the way is the backend's choice, here and below."""
        ...

    def norm_gated_linear(self, x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """silu(gate) * up of linear(rms_norm(x)): x [T, E], weight [2 I, E] (gate rows, then up rows) -> [T, I]."""
        ...

    def add_linear(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """In place: residual [T, out] += linear(x); x [T, in], weight [out, in]."""
        ...

    def norm_logits(self, x: Tensor, norm: RowNorm, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 [R, V], linear(rms_norm(x)) of x [R, E] and weight [V, E]; not rounded to half precision on the way
        where that costs nothing."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, E] -> [T, E]; the mean square is taken in float32 (or wider)."""
        ...

    def rotate_and_write_kv(
        self,
        qkv: Tensor,
        positions: Tensor,
        rotation: Rotation,
        kv_layer: Tensor,
        slots: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """qkv [T, (H + 2 G) D] -> rotated q [T, H, D]; rotated k and plain v go into `kv_layer` at `slots` [T].

        Rotation is the half-split kind of Llama checkpoints in HuggingFace's order, on the first rotary-size elements
        of each head. G and D come from `kv_layer`'s shape.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 I] (gate, then up) -> silu(gate) * up, [T, I]."""
        ...

    def prefill_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """Causal attention of prompt chunks over the cache: q [T, H, D] -> [T, H, D]."""
        ...

    def decode_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """Attention of one query per sequence over the cache: q [S, H, D] -> [S, H, D]."""
        ...

    def penalize(self, logits: Tensor, penalties: Penalties) -> None:
        """In place on float32 logits [R, V]."""
        ...

    def sample(self, raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> SampledRows:
        """Chooses one token per row from `logits` [R, V] float32; `raw_logits` (may be the same) give logprobs.

        argmax(logits / temperature + Gumbel noise) over the tokens that pass top-k, then top-p, then min-p, each
        applied to the distribution after temperature that the one before left. Ties at a cut: the smaller ids pass.
        The noise of (row, token) is -log(-log(u)) in float32, u = ((w >> 9) + 1/2) * 2^-23 in (0, 1), w from
        Philox-4x32-10: key = the seed's two halves (low first), counter = (token // 4, position, choice, 0), word
        token % 4.
        """
        ...

    def copy_blocks(self, pool: Tensor, sources: Tensor, targets: Tensor) -> None:
        """In place: pool[targets] = pool[sources]; no block is both."""
        ...

    def pack_kv(
        self, pool: Tensor, items: Tensor, first_layer: int, num_layers: int, wire: KVWire
    ) -> tuple[Tensor, Tensor]:
        """Gathers `items` [n] of the pool's layers, converted: uint8 [n, bytes] as `wire` says, and its `digest` [n].

        Item i is the tokens [(i % k) * b, (i % k + 1) * b) of block i // k, where b is the wire's block size and k how
        many of them make a block of the pool. Transfer threads call `pack_kv`, `unpack_kv` and `digest`, several at
        once and while a step computes.
        """
        ...

    def unpack_kv(self, pool: Tensor, items: Tensor, first_layer: int, segment: Tensor, wire: KVWire) -> None:
        """In place: the inverse of `pack_kv`, into the pool's own number format. `segment` is uint8 [n, bytes]."""
        ...

    def push_kv(self, source: KVItems, target: KVItems, first_layer: int, num_layers: int, wire: KVWire) -> Tensor:
        """Copies items of one pool's layers to items of another's, which stores them as `wire` says: no scales.

        The target may be another process's memory, mapped here. Returns the digest [n] of what was written, which is
        `pack_kv`'s.
        """
        ...

    def digest_kv(self, items: KVItems, first_layer: int, num_layers: int, wire: KVWire) -> Tensor:
        """The digest [n] that `pack_kv` would return."""
        ...

    def digest(self, segment: Tensor) -> Tensor:
        """[n, ...] -> [n] int64, over each item's bytes as signed little-endian 32-bit words w_i: sum of w_i * m_i mod
        2^64, with m_i = (i + 1) * 0x9E3779B97F4A7C15 | 1 put through splitmix64's finaliser and made odd.

        Multilinear hashing (Lemire and Kaser 2013): a changed word, or words out of order, change the sum.
        """
        ...
