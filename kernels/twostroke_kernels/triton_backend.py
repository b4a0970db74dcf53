"""`TritonBackend`: our own kernels on NVIDIA cards, cuBLAS for large products, PyTorch where no kernel pays."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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
)
from twostroke_kernels.gpu import activation, block_copy, kv_pack, kv_push, rms_norm, sampling
from twostroke_kernels.gpu.decode_attention import decode_attention
from twostroke_kernels.gpu.fusion import Fusion
from twostroke_kernels.gpu.gated_gemm import gated_config, gated_linear, suits_gated_gemm
from twostroke_kernels.gpu.large_gemm import add_large_linear, beats_cublas
from twostroke_kernels.gpu.penalties import penalize
from twostroke_kernels.gpu.prefill_attention import prefill_attention
from twostroke_kernels.gpu.rotary import rotate_and_write_kv
from twostroke_kernels.gpu.small_linear import ConfigChoice, config_for, small_linear


class TritonBackend:
    """`Backend` in Triton. It remembers nothing between calls, so any thread may call it.

    No call but attention to prompt chunks looks at lengths on the host: all others can be captured, sampling included.
    """

    captures_graphs = True
    reads_unwritten = False

    def __init__(self, device: torch.device, choose: ConfigChoice = config_for) -> None:
        self.device = device
        self._choose = choose

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.linear`."""
        config = self._choose(x, weight)
        if config is None:
            return F.linear(x, weight, bias)
        return small_linear(x, weight, bias, config)

    def norm_linear(self, x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.norm_linear`."""
        config = self._choose(x, weight)
        if config is None:
            return F.linear(self.rms_norm(x, norm.weight, norm.eps), weight, bias)
        return small_linear(x, weight, bias, config, Fusion(norm=norm))

    def norm_gated_linear(self, x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.norm_gated_linear`."""
        config = self._choose(x, weight, gated=True)
        if config is not None:
            return small_linear(x, weight, bias, config, Fusion(norm=norm, gated=True))
        normed = self.rms_norm(x, norm.weight, norm.eps)
        tile = gated_config(x.shape[0])
        if tile is not None and suits_gated_gemm(normed, weight, bias):
            return gated_linear(normed, weight, tile)
        return self.silu_mul(self.linear(normed, weight, bias))

    def add_linear(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `Backend.add_linear`."""
        config = self._choose(x, weight)
        if config is not None:
            small_linear(x, weight, bias, config, Fusion(adds=True), residual)
        elif beats_cublas(x, weight):
            add_large_linear(residual, x, weight, bias)
        elif bias is None:
            residual.addmm_(x, weight.t())
        else:
            residual.add_(F.linear(x, weight, bias))

    def norm_logits(self, x: Tensor, norm: RowNorm, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Backend.norm_logits`."""
        if out is None:
            out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
        config = self._choose(x, weight)
        if config is None:
            return _wide_product(self.rms_norm(x, norm.weight, norm.eps), weight, out)
        return small_linear(x, weight, None, config, Fusion(norm=norm), out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Backend.rms_norm`."""
        return rms_norm.rms_norm(x, weight, eps)

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
        return rotate_and_write_kv(qkv, positions, rotation, kv_layer, slots, out)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Backend.silu_mul`."""
        return activation.silu_mul(gate_up)

    def prefill_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """See `Backend.prefill_attention`."""
        return prefill_attention(q, kv_layer, batch, scale, out=out)

    def decode_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """See `Backend.decode_attention`."""
        return decode_attention(q, kv_layer, batch, scale, out=out)

    def penalize(self, logits: Tensor, penalties: Penalties) -> None:
        """See `Backend.penalize`."""
        penalize(logits, penalties)

    def sample(self, raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> SampledRows:
        """See `Backend.sample`."""
        return sampling.sample(raw_logits, logits, rows)

    def copy_blocks(self, pool: Tensor, sources: Tensor, targets: Tensor) -> None:
        """See `Backend.copy_blocks`."""
        block_copy.copy_blocks(pool, sources, targets)

    def pack_kv(
        self, pool: Tensor, items: Tensor, first_layer: int, num_layers: int, wire: KVWire
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.pack_kv`."""
        with self._on_device():
            return kv_pack.pack_kv(pool, items, first_layer, num_layers, wire)

    def unpack_kv(self, pool: Tensor, items: Tensor, first_layer: int, segment: Tensor, wire: KVWire) -> None:
        """See `Backend.unpack_kv`."""
        with self._on_device():
            kv_pack.unpack_kv(pool, items, first_layer, segment, wire)

    def push_kv(self, source: KVItems, target: KVItems, first_layer: int, num_layers: int, wire: KVWire) -> Tensor:
        """See `Backend.push_kv`."""
        with self._on_device():
            return kv_push.push_kv(source, target, first_layer, num_layers, wire)

    def digest_kv(self, items: KVItems, first_layer: int, num_layers: int, wire: KVWire) -> Tensor:
        """See `Backend.digest_kv`."""
        with self._on_device():
            return kv_push.digest_kv(items, first_layer, num_layers, wire)

    def digest(self, segment: Tensor) -> Tensor:
        """See `Backend.digest`."""
        with self._on_device():
            return kv_pack.digest(segment)

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the thread's current device, and a transfer thread has never chosen one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _wide_product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x [R, in] times weight [V, in], float32 [R, V] straight from the accumulators where cuBLAS can do that."""
    if x.dtype == torch.float32:
        return torch.mm(x, weight.t(), out=out)
    if x.device.type == "cuda":
        return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    return out.copy_(F.linear(x, weight))
