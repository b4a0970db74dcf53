"""Where the Triton tests run: compiled on a GPU if there is one, else interpreted on the CPU with tiny shapes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Set by tests/kernels/conftest.py, before any kernel is decorated, where torch finds no GPU."""
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_GPU else [])
"""The interpreter cuts bfloat16 off where it should round."""
REPEATS = 100 if HAS_GPU else 3
LLAMA_8B_PRODUCTS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
"""[out, in] of Llama-3.1-8B's linear layers."""


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of shapes that only a real device can do."""
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA device")(test))


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    """Random numbers on the device, the same ones on every machine."""
    return (size * torch.randn(*shape, generator=rng)).to(dtype).to(DEVICE)


def assert_repeatable(compute: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    """The same inputs give the same bits, every time."""
    first = _bits(compute())
    for _ in range(REPEATS - 1):
        assert all(torch.equal(a, b) for a, b in zip(_bits(compute()), first, strict=True))


def _bits(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    tensors = [out] if isinstance(out, Tensor) else list(out)
    return [tensor.contiguous().view(torch.uint8).clone() for tensor in tensors]
