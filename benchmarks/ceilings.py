"""Rates of the device that figures are held against, and timing of what runs on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

from benchmarks.targets import Ceilings

COPY_BYTES = 2 << 30
MATMUL_SIZE = 8192
ROUNDS = 7


def measured_ceilings(device: torch.device) -> Ceilings:
    """A copy of 2 GiB and a product of 8192^3 in bfloat16, on random data; the memory is given back."""
    ceilings = Ceilings(_copy_rate(device), _matmul_rate(device))
    torch.cuda.empty_cache()
    return ceilings


def _copy_rate(device: torch.device) -> float:
    source = torch.randn(COPY_BYTES // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / event_seconds(lambda: target.copy_(source))


def _matmul_rate(device: torch.device) -> float:
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    left, right = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    right /= MATMUL_SIZE**0.5
    return 2 * MATMUL_SIZE**3 / event_seconds(lambda: torch.mm(left, right))


def event_seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median of several launches, each between two events, after one that does not count."""
    work()
    return median(_between_events(work) for _ in range(rounds))


def graph_seconds(calls: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> float:
    """One call's share of a CUDA graph of `calls`, median of several replays.

    A graph takes the host out of the figure. Give as many calls, on different data, as keep the caches from serving
    the next replay.
    """
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return event_seconds(graph.replay, rounds) / len(calls)


def _between_events(work: Callable[[], object]) -> float:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000
