"""What lies in rows of a block that no token was written to reaches no result: `Backend.reads_unwritten` is False."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from twostroke_kernels.backend import Backend, PagedBatch

from tests.support.paged_attention import PagedCase, Shape, make_case
from tests.support.triton_device import DEVICE, DTYPES, gpu

from twostroke_kernels.gpu.decode_attention import decode_attention, decode_config  # isort: skip
from twostroke_kernels.gpu.hopper_prefill import LONG, SHORT, suits_hopper  # isort: skip
from twostroke_kernels.gpu.prefill_attention import prefill_attention, prefill_config  # isort: skip
from twostroke_kernels.triton_backend import TritonBackend  # isort: skip

Attend = Callable[[Tensor, Tensor, PagedBatch, float], Tensor]
POISONS = [float("nan"), float("inf"), -float("inf")]


def poisoned(case: PagedCase, poison: float) -> PagedCase:
    return dataclasses.replace(case, pool=torch.nan_to_num(case.pool, nan=poison))


def check(case: PagedCase, ways: list[Attend]) -> None:
    """`case` holds NaN wherever nothing was written."""
    zeros = poisoned(case, 0.0)
    for way in ways:
        expected = way(zeros.q, zeros.layer, zeros.batch, zeros.scale)
        assert expected.isfinite().all()
        for poison in POISONS:
            other = poisoned(case, poison) if poison == poison else case
            assert torch.equal(way(other.q, other.layer, other.batch, other.scale), expected), poison


def decode_ways(case: PagedCase) -> list[Attend]:
    config = decode_config(case.layer, case.q.shape[0], case.batch.max_context_len)
    configs = [config, dataclasses.replace(config, tma=False), dataclasses.replace(config, num_splits=1)]
    return [partial(decode_attention, config=config) for config in configs]


def prefill_ways(case: PagedCase) -> list[Attend]:
    plain = [prefill_config(case.layer, length) for length in (64, 4096)]
    configs = [*plain, *(dataclasses.replace(config, tma=False) for config in plain)]
    ways: list[Attend] = [partial(prefill_attention, config=config) for config in configs]
    if suits_hopper(case.q, case.layer):
        ways += [partial(prefill_attention, config=config) for config in (SHORT, LONG)]
    return ways


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 15, 17])
def test_tiny(rng: torch.Generator, dtype: torch.dtype, length: int) -> None:
    backend: Backend = TritonBackend(DEVICE)
    assert not backend.reads_unwritten
    check(make_case(rng, Shape(2, 1, 16, 16), [1], [length], dtype, DEVICE), [backend.decode_attention])
    check(make_case(rng, Shape(2, 1, 16, 16), [length], [length], dtype, DEVICE), [backend.prefill_attention])


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [64, 96, 128])
@pytest.mark.parametrize("lengths", [[1, 63, 64, 65, 127, 129], [1000], [5000, 33]], ids=str)
def test_real(rng: torch.Generator, dtype: torch.dtype, head_size: int, lengths: list[int]) -> None:
    shape = Shape(4, 2, head_size, 64)
    decode = make_case(rng, shape, [1] * len(lengths), lengths, dtype, DEVICE)
    check(decode, decode_ways(decode))
    chunks = [min(length, 300) for length in lengths]
    prefill = make_case(rng, shape, chunks, lengths, dtype, DEVICE)
    check(prefill, prefill_ways(prefill))
