"""Choosing tokens: every way of sampling that a request can ask for, at the vocabulary of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from twostroke_kernels.backend import Backend, SamplingRows
from twostroke_kernels.torch_backend import TorchBackend

from benchmarks.kernel_case import KernelCase, require_equal

VOCAB = 128256
TINY_VOCAB = 320
ROWS = (1, 64, 256)


@dataclass(frozen=True)
class Kind:
    """Parameters of a request."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_logprobs: int = -1


KINDS = {
    "greedy": Kind(temperature=0.0),
    "plain": Kind(),
    "top_p": Kind(top_p=0.9),
    "top_k": Kind(top_k=40),
    "top_k_top_p": Kind(top_k=20, top_p=0.8),
    "min_p": Kind(min_p=0.05),
    "greedy_logprobs5": Kind(temperature=0.0, num_logprobs=5),
}
SAMPLING = tuple(f"sampling/{kind}/{rows}" for kind in KINDS for rows in ROWS)
TINY_SAMPLING = tuple(f"sampling/{kind}/3" for kind in KINDS)


def sampling_case(name: str, backend: Backend, vocab: int) -> KernelCase:
    """The case that a name says; PyTorch's sampler, operation by operation, chooses the expected tokens."""
    _, kind, rows = name.split("/")
    num_rows, device = int(rows), backend.device
    # Of the spread that a model's logits have, and of bfloat16's grid: ties occur.
    logits = (3 * torch.randn(num_rows, vocab, device=device)).bfloat16().float()
    how = _rows(KINDS[kind], num_rows, device)

    def check() -> None:
        ours, expected = backend.sample(logits, logits, how), TorchBackend(device).sample(logits, logits, how)
        # Two sums of the same masses in other orders may put a token at the edge of a filter on different sides.
        require_equal(name, ours.token_ids, expected.token_ids, may_differ=0 if how.all_greedy else num_rows // 64)
        require_equal(name, ours.top_ids, expected.top_ids)

    calls = [lambda: backend.sample(logits, logits, how)] * 4
    return KernelCase(name, calls=calls, check=check, bytes=4 * logits.numel())


def _rows(kind: Kind, count: int, device: torch.device) -> SamplingRows:
    def floats(value: float) -> Tensor:
        return torch.full((count,), value, device=device)

    def integers(value: int) -> Tensor:
        return torch.full((count,), value, device=device, dtype=torch.int64)

    return SamplingRows(
        temperature=floats(kind.temperature),
        top_k=integers(kind.top_k),
        top_p=floats(kind.top_p),
        min_p=floats(kind.min_p),
        seed=torch.arange(count, device=device),
        choice=integers(0),
        position=integers(7),
        all_greedy=kind.temperature == 0,
        num_logprobs=kind.num_logprobs,
    )
