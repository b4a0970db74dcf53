"""Linear layers with what is fused into them, norms, activation, rotation: against cuBLAS's product, or PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from twostroke_kernels.backend import Backend, RotaryTable, Rotation, RowNorm
from twostroke_kernels.reference import ReferenceBackend
from twostroke_kernels.torch_backend import TorchBackend

from benchmarks.kernel_case import Call, KernelCase, require_as_good

EPS = 1e-5
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
POINTWISE_ROWS = (1, 64, 256, 8192)
LAYERS = ("qkv", "o", "gate_up", "down", "head")
MAX_HEAD_ROWS = 256
"""The head is for sampled rows alone."""
LINEAR = tuple(
    f"linear/bf16/{layer}/{rows}" for layer in LAYERS for rows in ROWS if layer != "head" or rows <= MAX_HEAD_ROWS
)
POINTWISE = tuple(f"{kind}/bf16/{rows}" for kind in ("norm", "silu", "rotary") for rows in POINTWISE_ROWS)
TINY_DENSE = (*(f"linear/bf16/{layer}/3" for layer in LAYERS), "norm/bf16/3", "silu/bf16/3", "rotary/bf16/3")
CHECKED_ROWS = 16
MIN_WEIGHT_BYTES = 400 << 20
"""Of all copies of a weight together: more than the caches hold."""


@dataclass(frozen=True)
class DenseShape:
    """Sizes of a model."""

    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_size: int
    block: int

    def weight(self, layer: str) -> tuple[int, int]:
        """[out, in] of a layer."""
        q = self.heads * self.head_size
        return {
            "qkv": (q + 2 * self.kv_heads * self.head_size, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocab, self.hidden),
        }[layer]


LLAMA_DENSE = DenseShape(4096, 14336, 128256, 32, 8, 128, 64)
TINY_DENSE_SHAPE = DenseShape(64, 96, 320, 4, 2, 32, 16)


def dense_case(name: str, backend: Backend, shape: DenseShape) -> KernelCase:
    """The case that a name says.

    Raises:
        KeyError: it says none.
    """
    kind, *_, rows = name.split("/")
    if kind == "linear":
        return _linear(name, backend, shape, name.split("/")[2], int(rows))
    return {"norm": _norm, "silu": _silu, "rotary": _rotary}[kind](name, backend, shape, int(rows))


def _random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16) * scale


def _operation(layer: str, norm: RowNorm) -> Callable[[Backend, Tensor, Tensor, Tensor], Tensor]:
    """How the model uses a layer, as (backend, x, weight, residual) -> result; adding layers change the residual."""

    def adds(backend: Backend, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        backend.add_linear(residual, x, weight)
        return residual

    operations: dict[str, Callable[[Backend, Tensor, Tensor, Tensor], Tensor]] = {
        "qkv": lambda backend, x, weight, residual: backend.norm_linear(x, norm, weight),
        "gate_up": lambda backend, x, weight, residual: backend.norm_gated_linear(x, norm, weight),
        "head": lambda backend, x, weight, residual: backend.norm_logits(x, norm, weight),
    }
    return operations.get(layer, adds)


def _linear(name: str, backend: Backend, shape: DenseShape, layer: str, num_rows: int) -> KernelCase:
    device = backend.device
    width_out, width_in = shape.weight(layer)
    weight_bytes = 2 * width_out * width_in
    copies = 1 if device.type == "cpu" else max(2, -(-MIN_WEIGHT_BYTES // weight_bytes))
    weights = [_random(device, width_out, width_in, scale=width_in**-0.5) for _ in range(copies)]
    norm = RowNorm(1 + _random(device, width_in, scale=0.1), EPS)
    x, residual = _random(device, num_rows, width_in), _random(device, num_rows, shape.hidden)
    operation = _operation(layer, norm)

    def check() -> None:
        # Rows do not depend on each other: the first and the last ones speak for all.
        some = torch.arange(num_rows, device=device)
        some = torch.cat((some[:CHECKED_ROWS], some[CHECKED_ROWS:][-CHECKED_ROWS:]))
        out = operation(backend, x, weights[0], residual.clone())[some]
        exact = operation(ReferenceBackend(device), x[some], weights[0], residual[some].double())
        plain = operation(TorchBackend(device), x[some], weights[0], residual[some].clone())
        require_as_good(name, out, exact, plain.to(torch.bfloat16))

    moved = {"qkv": width_out, "gate_up": width_out // 2, "head": 2 * width_out}.get(layer, 2 * width_out)
    return KernelCase(
        name,
        calls=[partial(operation, backend, x, weight, residual) for weight in weights],
        check=check,
        bytes=weight_bytes + 2 * num_rows * (width_in + moved),
        flops=2 * num_rows * width_out * width_in,
        peer="cuBLAS's product alone" if device.type == "cuda" else "PyTorch's product alone",
        peer_calls=[partial(F.linear, x, weight) for weight in weights],
    )


def _pointwise(name: str, backend: Backend, call: Callable[[Backend], Tensor], moved: int) -> KernelCase:
    plain = TorchBackend(backend.device)

    def check() -> None:
        require_as_good(name, call(backend), call(ReferenceBackend(backend.device)), call(plain))

    calls: list[Call] = [lambda: call(backend)] * 8
    return KernelCase(name, calls=calls, check=check, bytes=moved, peer="PyTorch", peer_calls=[lambda: call(plain)] * 8)


def _norm(name: str, backend: Backend, shape: DenseShape, num_rows: int) -> KernelCase:
    x = _random(backend.device, num_rows, shape.hidden)
    weight = 1 + _random(backend.device, shape.hidden, scale=0.1)
    return _pointwise(name, backend, lambda by: by.rms_norm(x, weight, EPS), 4 * x.numel())


def _silu(name: str, backend: Backend, shape: DenseShape, num_rows: int) -> KernelCase:
    gate_up = _random(backend.device, num_rows, 2 * shape.intermediate)
    return _pointwise(name, backend, lambda by: by.silu_mul(gate_up), 3 * gate_up.numel())


def _rotary(name: str, backend: Backend, shape: DenseShape, num_rows: int) -> KernelCase:
    device, size = backend.device, shape.head_size
    num_blocks = -(-num_rows // shape.block)
    layer = torch.zeros(num_blocks, 2, 2, shape.block, shape.kv_heads, size, device=device, dtype=torch.bfloat16)[:, 1]
    angles = torch.rand(num_rows, size // 2, device=device) * 6.28
    rotation = Rotation(RotaryTable(angles.cos(), angles.sin()), None)
    positions = torch.arange(num_rows, device=device)
    slots = torch.randperm(num_blocks * shape.block, device=device)[:num_rows]
    qkv = _random(device, num_rows, (shape.heads + 2 * shape.kv_heads) * size)
    return _pointwise(
        name, backend, lambda by: by.rotate_and_write_kv(qkv, positions, rotation, layer, slots), 4 * qkv.numel()
    )
