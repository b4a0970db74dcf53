"""`TritonBackend`: our own kernels on NVIDIA cards, cuBLAS for large products, PyTorch where no kernel pays."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from twostroke_kernels.backend import HeadNorm, PagedBatch, Penalties, RotaryTable, SampledRows, SamplingRows
from twostroke_kernels.gpu import activation, block_copy, gemv, kv_pack, rms_norm, sampling
from twostroke_kernels.gpu.decode_attention import decode_attention
from twostroke_kernels.gpu.penalties import penalize
from twostroke_kernels.gpu.prefill_attention import prefill_attention
from twostroke_kernels.gpu.rotary import rotate_and_write_kv


class TritonBackend:
    """`Backend` in Triton. It remembers nothing between calls, so any thread may call it.

    No call but attention to prompt chunks looks at lengths on the host: all others can be captured, sampling included.
    """

    captures_graphs = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.linear`."""
        config = gemv.linear_config(x.shape[0], weight.shape[0], weight.shape[1], x.dtype)
        if config is None:
            return F.linear(x, weight, bias)
        return gemv.small_linear(x, weight, bias, config)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Backend.rms_norm`."""
        return rms_norm.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Backend.add_rms_norm`."""
        return rms_norm.add_rms_norm(x, residual, weight, eps)

    def rotate_and_write_kv(
        self,
        qkv: Tensor,
        positions: Tensor,
        rotary: RotaryTable,
        head_norm: HeadNorm | None,
        kv_layer: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """See `Backend.rotate_and_write_kv`."""
        return rotate_and_write_kv(qkv, positions, rotary, head_norm, kv_layer, slots)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Backend.silu_mul`."""
        return activation.silu_mul(gate_up)

    def prefill_attention(self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float) -> Tensor:
        """See `Backend.prefill_attention`."""
        return prefill_attention(q, kv_layer, batch, scale)

    def decode_attention(self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float) -> Tensor:
        """See `Backend.decode_attention`."""
        return decode_attention(q, kv_layer, batch, scale)

    def penalize(self, logits: Tensor, penalties: Penalties) -> None:
        """See `Backend.penalize`."""
        penalize(logits, penalties)

    def sample(self, raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> SampledRows:
        """See `Backend.sample`."""
        return sampling.sample(raw_logits, logits, rows)

    def copy_blocks(self, pool: Tensor, sources: Tensor, targets: Tensor) -> None:
        """See `Backend.copy_blocks`."""
        block_copy.copy_blocks(pool, sources, targets)

    def pack_kv(self, pool: Tensor, block_ids: Tensor, first_layer: int, num_layers: int) -> tuple[Tensor, Tensor]:
        """See `Backend.pack_kv`."""
        with self._on_device():
            return kv_pack.pack_kv(pool, block_ids, first_layer, num_layers)

    def unpack_kv(self, pool: Tensor, block_ids: Tensor, first_layer: int, segment: Tensor) -> None:
        """See `Backend.unpack_kv`."""
        with self._on_device():
            kv_pack.unpack_kv(pool, block_ids, first_layer, segment)

    def digest(self, segment: Tensor) -> Tensor:
        """See `Backend.digest`."""
        with self._on_device():
            return kv_pack.digest(segment)

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the thread's current device, and a transfer thread has never chosen one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
