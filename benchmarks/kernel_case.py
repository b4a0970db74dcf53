"""One measured kernel: what is called, on which data, against what it is checked, and what its limit is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.ceilings import ROUNDS, graph_seconds
from benchmarks.targets import Ceilings

Call = Callable[[], object]
FLOOR_IN_EPS = 2.0


class WrongResult(RuntimeError):
    """A kernel that is wrong is not timed."""


@dataclass(frozen=True)
class KernelCase:
    """A kernel on one shape."""

    name: str
    calls: Sequence[Call]
    """The same work on different data, as much of it as keeps the caches from serving the next round."""
    check: Call
    """Raises `WrongResult`."""
    bytes: float = 0.0
    """That one call must at least read and write."""
    flops: float = 0.0
    peer: str | None = None
    peer_calls: Sequence[Call] = ()

    def limit_s(self, ceilings: Ceilings) -> float:
        """The least that one call can take."""
        return max(self.bytes / ceilings.copy_bytes_s, self.flops / ceilings.matmul_flops_s)


def seconds_a_call(calls: Sequence[Call], device: torch.device) -> float:
    """From a CUDA graph of the calls, so without the host; on a CPU by the clock."""
    if device.type == "cuda":
        return graph_seconds(calls)
    for call in calls:
        call()
    return median(_by_clock(calls) for _ in range(ROUNDS)) / len(calls)


def _by_clock(calls: Sequence[Call]) -> float:
    began_s = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began_s


def require_as_good(name: str, out: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The largest error is at most twice that of PyTorch's own result at the same dtype, plus a rounding or two.

    Raises:
        WrongResult: it is not.
    """
    eps = torch.finfo(plain.dtype).eps
    error = float((out.double() - exact).abs().max())
    allowed = 2 * float((plain.double() - exact).abs().max()) + FLOOR_IN_EPS * eps * float(exact.abs().max())
    if not error <= allowed:
        raise WrongResult(f"{name}: largest error {error:.3g}, allowed {allowed:.3g}")


def require_equal(name: str, out: Tensor, expected: Tensor, may_differ: int = 0) -> None:
    """Raises `WrongResult` if more than `may_differ` values are not the same."""
    num_wrong = int((out != expected).sum())
    if out.shape != expected.shape or num_wrong > may_differ:
        raise WrongResult(f"{name}: {num_wrong} of {out.numel()} values differ")
