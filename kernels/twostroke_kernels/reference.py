"""`ReferenceBackend`: the operations in float64, written plainly and slowly. The definition of correct.

Floating results are float64 whatever came in; what is written into a tensor that is there already (a pool, a residual,
`out`) takes its dtype. Everything that is
exact by definition (noise words, digests) is Python integers, sharing no code with the other backends.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from twostroke_kernels.backend import (
    SCALE_FLOOR,
    KVItems,
    KVWire,
    PagedBatch,
    Penalties,
    RotaryTable,
    Rotation,
    RowNorm,
    SampledRows,
    SamplingRows,
    check_push,
)

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


class ReferenceBackend:
    """`Backend` in float64, one sequence, row or block at a time."""

    captures_graphs = False
    reads_unwritten = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.linear`."""
        product = x.double() @ weight.double().T
        return product if bias is None else product + bias.double()

    def norm_linear(self, x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.norm_linear`."""
        return self.linear(self.rms_norm(x, norm.weight, norm.eps), weight, bias)

    def norm_gated_linear(self, x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.norm_gated_linear`."""
        return self.silu_mul(self.norm_linear(x, norm, weight, bias))

    def add_linear(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `Backend.add_linear`."""
        residual.copy_(residual.double() + self.linear(x, weight, bias))

    def norm_logits(self, x: Tensor, norm: RowNorm, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Backend.norm_logits`."""
        logits = self.norm_linear(x, norm, weight)
        return logits if out is None else out.copy_(logits)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Backend.rms_norm`."""
        wide = x.double()
        return wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + eps) * weight.double()

    def rotate_and_write_kv(
        self,
        qkv: Tensor,
        positions: Tensor,
        rotation: Rotation,
        kv_layer: Tensor,
        slots: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.rotate_and_write_kv`."""
        _, _, block_size, num_kv_heads, head_size = kv_layer.shape
        heads = qkv.double().reshape(qkv.shape[0], qkv.shape[1] // head_size, head_size)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        values_from = num_heads + num_kv_heads
        q, k, v = heads[:, :num_heads], heads[:, num_heads:values_from], heads[:, values_from:]
        if (norm := rotation.norm) is not None:
            q, k = self.rms_norm(q, norm.q_weight, norm.eps), self.rms_norm(k, norm.k_weight, norm.eps)
        q, k = _rotate(q, positions, rotation.table), _rotate(k, positions, rotation.table)
        for token, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, block_size)
            kv_layer[block, 0, offset] = k[token].to(kv_layer.dtype)
            kv_layer[block, 1, offset] = v[token].to(kv_layer.dtype)
        return q if out is None else out.copy_(q)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Backend.silu_mul`."""
        gate, up = gate_up.double().chunk(2, -1)
        return gate / (1 + torch.exp(-gate)) * up

    def prefill_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """See `Backend.prefill_attention`."""
        out = torch.empty(q.shape, dtype=torch.float64, device=q.device) if out is None else out
        starts = batch.query_starts.tolist()
        for sequence, context_len in enumerate(batch.context_lens.tolist()):
            keys, values = _context(kv_layer, batch.block_tables[sequence], context_len)
            first, end = starts[sequence], starts[sequence + 1]
            for row in range(first, end):
                visible = context_len - (end - 1 - row)
                out[row] = _attend(q[row], keys[:visible], values[:visible], scale)
        return out

    def decode_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """See `Backend.decode_attention`."""
        return self.prefill_attention(q, kv_layer, batch, scale, out)

    def penalize(self, logits: Tensor, penalties: Penalties) -> None:
        """See `Backend.penalize`."""
        cells = zip(*(column.tolist() for column in _columns(penalties)), strict=True)
        for row, token, repetition, subtract in cells:
            value = float(logits[row, token])
            value = value / repetition if value > 0 else value * repetition
            logits[row, token] = value - subtract

    def sample(self, raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> SampledRows:
        """See `Backend.sample`."""
        chosen = [_sample_row(logits[row].double(), rows, row) for row in range(logits.shape[0])]
        token_ids = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
        finite = torch.isfinite(raw_logits).all(-1)
        count = rows.num_logprobs
        logprobs = raw_logits.double().log_softmax(-1)
        best = torch.sort(raw_logits, dim=-1, descending=True, stable=True).indices[:, : max(count, 0)]
        picked = logprobs.gather(1, token_ids[:, None])[:, 0]
        if count < 0:
            picked = torch.zeros_like(picked)
        return SampledRows(token_ids, picked.float(), best, logprobs.gather(1, best).float(), finite)

    def copy_blocks(self, pool: Tensor, sources: Tensor, targets: Tensor) -> None:
        """See `Backend.copy_blocks`."""
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            pool[target] = pool[source]

    def pack_kv(
        self, pool: Tensor, items: Tensor, first_layer: int, num_layers: int, wire: KVWire
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.pack_kv`."""
        size = num_layers * wire.layer_bytes(pool.shape[4], pool.shape[5])
        segment = torch.zeros((items.shape[0], size), dtype=torch.uint8, device=pool.device)
        for place, item in enumerate(items.tolist()):
            values, scales = bytearray(), bytearray()
            for layer in range(first_layer, first_layer + num_layers):
                for row in _item_rows(pool, item, layer, wire):
                    row_values, row_scale = encode_row(row, wire)
                    values += row_values
                    scales += row_scale
            segment[place] = torch.frombuffer(values + scales, dtype=torch.uint8)
        return segment, self.digest(segment)

    def unpack_kv(self, pool: Tensor, items: Tensor, first_layer: int, segment: Tensor, wire: KVWire) -> None:
        """See `Backend.unpack_kv`."""
        row_bytes = pool.shape[5] * wire.dtype.itemsize
        num_layers = segment.shape[1] // wire.layer_bytes(pool.shape[4], pool.shape[5])
        num_rows = num_layers * 2 * wire.block_size * pool.shape[4]
        for place, item in enumerate(items.tolist()):
            raw = bytearray(segment[place].tolist())
            rows = iter(range(num_rows))
            for layer in range(first_layer, first_layer + num_layers):
                for target in _item_rows(pool, item, layer, wire):
                    at = next(rows)
                    scale = raw[num_rows * row_bytes + 4 * at :][:4]
                    target[:] = decode_row(raw[at * row_bytes :][:row_bytes], scale, wire).to(pool.dtype)

    def push_kv(self, source: KVItems, target: KVItems, first_layer: int, num_layers: int, wire: KVWire) -> Tensor:
        """See `Backend.push_kv`."""
        check_push(target, wire)
        segment, digest = self.pack_kv(source.pool, source.ids, first_layer, num_layers, wire)
        self.unpack_kv(target.pool, target.ids, first_layer, segment, wire)
        return digest

    def digest_kv(self, items: KVItems, first_layer: int, num_layers: int, wire: KVWire) -> Tensor:
        """See `Backend.digest_kv`."""
        return self.pack_kv(items.pool, items.ids, first_layer, num_layers, wire)[1]

    def digest(self, segment: Tensor) -> Tensor:
        """See `Backend.digest`."""
        items = [item.contiguous().view(-1).view(torch.int32).tolist() for item in segment]
        return torch.tensor([digest_words(words) for words in items], dtype=torch.int64, device=segment.device)


def _item_rows(pool: Tensor, item: int, layer: int, wire: KVWire) -> Iterator[Tensor]:
    """Each head of each token of one layer of an item, keys first: views [D] of the pool."""
    block, part = divmod(item, pool.shape[3] // wire.block_size)
    for half in range(2):
        for token in range(part * wire.block_size, (part + 1) * wire.block_size):
            yield from pool[block, layer, half, token]


def encode_row(row: Tensor, wire: KVWire) -> tuple[bytes, bytes]:
    """One head of one token as `KVWire` says: its values and its scale (none where the format has none)."""
    if not wire.peak:
        return bytes(row.contiguous().to(wire.dtype).view(torch.uint8).tolist()), b""
    wide = row.float().cpu()  # a GPU divides by a number as it multiplies by its rounded inverse
    if not bool(torch.isfinite(wide).all()):
        return bytes(row.shape[0]), struct.pack("<f", math.nan)
    scale = torch.clamp(wide.abs().max() / wire.peak, min=SCALE_FLOOR)
    scaled = wide / scale
    codes = [round(value) & 0xFF if wire.dtype == torch.int8 else e4m3_code(value) for value in scaled.tolist()]
    return bytes(codes), struct.pack("<f", scale.item())


def decode_row(values: bytearray, scale: bytearray, wire: KVWire) -> Tensor:
    """The inverse of `encode_row`: [D], float32 where the format has scales."""
    if not wire.peak:
        return torch.frombuffer(values, dtype=wire.dtype)
    if wire.dtype == torch.int8:
        wide = torch.frombuffer(values, dtype=torch.int8).float()
    else:
        wide = torch.tensor([e4m3_value(code) for code in values], dtype=torch.float32)
    return wide * torch.frombuffer(scale, dtype=torch.float32)


def e4m3_value(code: int) -> float:
    """The number of a finite float8_e4m3fn code: sign, 4 bits of exponent (bias 7), 3 of fraction."""
    exponent, fraction = code >> 3 & 15, code & 7
    size = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
    return -size if code & 0x80 else size


def e4m3_code(value: float) -> int:
    """The code of the nearest finite float8_e4m3fn number; of two as near, the even one."""
    size = abs(value)
    nearest = min(range(127), key=lambda code: (abs(e4m3_value(code) - size), code & 1))
    return nearest | (0x80 if math.copysign(1.0, value) < 0 else 0)


def digest_words(words: list[int]) -> int:
    """The digest of signed 32-bit words, as a signed 64-bit number."""
    total = sum(word * digest_multiplier(index) for index, word in enumerate(words)) & _MASK64
    return total - (1 << 64) if total >> 63 else total


def digest_multiplier(index: int) -> int:
    """m_i of `Backend.digest`, unsigned."""
    z = ((index + 1) * 0x9E3779B97F4A7C15 & _MASK64) | 1
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK64
    return (z ^ (z >> 31)) | 1


def philox_words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 of Salmon et al. 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK32, (a >> 32) ^ c3 ^ k1, a & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def noise(seed: int, choice: int, position: int, token: int) -> float:
    """The Gumbel noise of one token."""
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    word = philox_words((token // 4, position, choice, 0), key)[token % 4]
    return -math.log(-math.log(((word >> 9) + 0.5) * 2.0**-23))


def passing(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Ids of one row's tokens [V] that pass the three filters, most likely first, ties by id."""
    order = torch.sort(scaled, descending=True, stable=True).indices
    if top_k > 0:
        order = order[:top_k]
    mass = torch.softmax(scaled[order], 0).tolist()
    if top_p < 1:
        num_kept, reached = 0, 0.0
        while num_kept == 0 or (num_kept < len(mass) and reached < top_p):
            reached += mass[num_kept]
            num_kept += 1
        order, mass = order[:num_kept], mass[:num_kept]
    return [token for token, share in zip(order.tolist(), mass, strict=True) if share >= min_p * mass[0]]


def _sample_row(logits: Tensor, rows: SamplingRows, row: int) -> int:
    temperature = float(rows.temperature[row])
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits / temperature
    allowed = passing(scaled, int(rows.top_k[row]), float(rows.top_p[row]), float(rows.min_p[row]))
    seed, choice, position = int(rows.seed[row]), int(rows.choice[row]), int(rows.position[row])
    return max(sorted(allowed), key=lambda token: float(scaled[token]) + noise(seed, choice, position, token))


def _columns(penalties: Penalties) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return penalties.rows, penalties.tokens, penalties.repetition, penalties.subtract


def _rotate(x: Tensor, positions: Tensor, rotary: RotaryTable) -> Tensor:
    cos, sin = rotary.cos.double()[positions][:, None], rotary.sin.double()[positions][:, None]
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def _context(kv_layer: Tensor, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """Keys and values [context, G, D] of one sequence, in order."""
    block_size = kv_layer.shape[2]
    blocks = kv_layer[block_table[: -(-context_len // block_size)]].double()
    keys, values = blocks[:, 0].flatten(0, 1), blocks[:, 1].flatten(0, 1)
    return keys[:context_len], values[:context_len]


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q [H, D] over keys and values [n, G, D]; each G serves H / G neighbouring query heads."""
    per_group = q.shape[0] // keys.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for head in range(q.shape[0]):
        group = head // per_group
        weights = torch.softmax(keys[:, group] @ q[head].double() * scale, 0)
        out[head] = weights @ values[:, group]
    return out
