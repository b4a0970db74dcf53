"""`TorchBackend`: the operations in vectorised PyTorch, for CPUs and as the plain way on any other device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twostroke_kernels.backend import (
    KVItems,
    KVWire,
    PagedBatch,
    Penalties,
    Rotation,
    RowNorm,
    SampledRows,
    SamplingRows,
    check_push,
)
from twostroke_kernels.digest import SegmentDigest
from twostroke_kernels.kv_rows import LayerRows, StepMemo
from twostroke_kernels.torch_attention import DecodeAttention, PrefillAttention
from twostroke_kernels.torch_rotary import RotaryStep, rotary_step, rotate
from twostroke_kernels.torch_sampling import penalize, sample
from twostroke_kernels.torch_wire import from_wire, gather_items, scatter_items, to_wire


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As HuggingFace's Llama: normalised in float32, rounded, then scaled."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


class TorchBackend:
    """`Backend` in PyTorch. Not thread-safe: it remembers what it derived from the current step's index tensors."""

    captures_graphs = False
    reads_unwritten = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rotary: StepMemo[RotaryStep] = StepMemo()
        self._prefill = PrefillAttention(device)
        self._decode = DecodeAttention()
        self._digest = SegmentDigest(device)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.linear`."""
        return F.linear(x, weight, bias)

    def norm_linear(self, x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.norm_linear`."""
        return self.linear(self.rms_norm(x, norm.weight, norm.eps), weight, bias)

    def norm_gated_linear(self, x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.norm_gated_linear`."""
        return self.silu_mul(self.norm_linear(x, norm, weight, bias))

    def add_linear(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `Backend.add_linear`."""
        residual.add_(self.linear(x, weight, bias))

    def norm_logits(self, x: Tensor, norm: RowNorm, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Backend.norm_logits`."""
        logits = self.norm_linear(x, norm, weight)
        return logits.float() if out is None else out.copy_(logits)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Backend.rms_norm`."""
        return _rms_norm(x, weight, eps)

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
        rows, head_norm = LayerRows.of(kv_layer), rotation.norm
        sources = (positions, slots, rotation.table.cos)
        step = self._rotary.get(sources, rows, lambda: rotary_step(positions, rotation.table, rows, slots))
        heads = qkv.view(qkv.shape[0], qkv.shape[1] // rows.head_size, rows.head_size)
        num_heads = heads.shape[1] - 2 * rows.num_kv_heads
        turned, values = heads[:, : -rows.num_kv_heads], heads[:, -rows.num_kv_heads :]
        if head_norm is not None:
            q = _rms_norm(turned[:, :num_heads], head_norm.q_weight, head_norm.eps)
            turned = torch.cat((q, _rms_norm(turned[:, num_heads:], head_norm.k_weight, head_norm.eps)), 1)
        turned = rotate(turned, step)
        layer = rows.view(kv_layer)
        layer.index_copy_(0, step.key_rows, turned[:, num_heads:].reshape(-1, rows.head_size))
        layer.index_copy_(0, step.value_rows, values.reshape(-1, rows.head_size))
        q = turned[:, :num_heads]
        return q if out is None else out.copy_(q)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Backend.silu_mul`."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def prefill_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """See `Backend.prefill_attention`."""
        return self._prefill(q, kv_layer, batch, scale, out)

    def decode_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """See `Backend.decode_attention`."""
        return self._decode(q, kv_layer, batch, scale, out)

    def penalize(self, logits: Tensor, penalties: Penalties) -> None:
        """See `Backend.penalize`."""
        penalize(logits, penalties)

    def sample(self, raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> SampledRows:
        """See `Backend.sample`."""
        return sample(raw_logits, logits, rows)

    def copy_blocks(self, pool: Tensor, sources: Tensor, targets: Tensor) -> None:
        """See `Backend.copy_blocks`."""
        pool.index_copy_(0, targets, pool.index_select(0, sources))

    def pack_kv(
        self, pool: Tensor, items: Tensor, first_layer: int, num_layers: int, wire: KVWire
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.pack_kv`."""
        segment = to_wire(gather_items(pool, items, first_layer, num_layers, wire), wire)
        return segment, self._digest(segment)

    def unpack_kv(self, pool: Tensor, items: Tensor, first_layer: int, segment: Tensor, wire: KVWire) -> None:
        """See `Backend.unpack_kv`."""
        scatter_items(pool, items, first_layer, from_wire(segment, pool, wire), wire)

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
        return self._digest(segment)
