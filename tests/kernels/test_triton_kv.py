"""Copying, packing and digesting KV blocks in Triton: exact."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from twostroke_kernels.backend import Backend, KVWire
from twostroke_kernels.torch_backend import TorchBackend

from tests.support.triton_device import DEVICE, assert_repeatable, gpu, normal

from twostroke_kernels.triton_backend import TritonBackend  # isort: skip

BACKEND = TritonBackend(DEVICE)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIRE = KVWire(4, torch.float16)


def make_pool(rng: torch.Generator, dtype: torch.dtype, head_size: int = 64) -> Tensor:
    return normal(rng, 10, 5, 2, 4, 3, head_size, dtype=dtype)


def some_blocks(rng: torch.Generator) -> Tensor:
    return torch.randperm(10, generator=rng).to(DEVICE)


def some_items(rng: torch.Generator, split: int) -> Tensor:
    return torch.randperm(10 * split, generator=rng).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_copy_blocks(rng: torch.Generator, reference: Backend, dtype: torch.dtype, count: int) -> None:
    order, pool = some_blocks(rng), make_pool(rng, dtype)
    expected = pool.clone()
    reference.copy_blocks(expected, order[:count], order[count : 2 * count])
    BACKEND.copy_blocks(pool, order[:count], order[count : 2 * count])
    assert torch.equal(pool, expected)


def test_one_block_is_copied_to_many(rng: torch.Generator) -> None:
    pool = make_pool(rng, torch.bfloat16)
    block = pool[3].clone()
    BACKEND.copy_blocks(pool, torch.tensor([3, 3, 3], device=DEVICE), torch.tensor([0, 5, 9], device=DEVICE))
    assert all(torch.equal(pool[target], block) for target in (0, 3, 5, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [2, 80, 128])
@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("first_layer", "num_layers"), [(0, 1), (2, 3), (0, 5)])
def test_pack_and_unpack(
    rng: torch.Generator,
    reference: Backend,
    dtype: torch.dtype,
    head_size: int,
    count: int,
    split: int,
    first_layer: int,
    num_layers: int,
) -> None:
    pool, items = make_pool(rng, dtype, head_size), some_items(rng, split)[:count]
    wire = KVWire(4 // split, dtype)
    segment, digest = BACKEND.pack_kv(pool, items, first_layer, num_layers, wire)
    expected, expected_digest = reference.pack_kv(pool, items, first_layer, num_layers, wire)
    assert torch.equal(segment, expected)
    assert torch.equal(digest, expected_digest)
    assert digest.dtype == torch.int64

    other, targets = make_pool(rng, dtype, head_size), some_items(rng, split)[:count]
    plain = other.clone()
    BACKEND.unpack_kv(other, targets, first_layer, segment, wire)
    reference.unpack_kv(plain, targets, first_layer, segment, wire)
    assert torch.equal(other, plain)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("sent", [*DTYPES, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize(("head_size", "block_size"), [(80, 4), (16, 2)])
def test_conversion_is_exactly_as_defined(
    rng: torch.Generator,
    reference: Backend,
    stored: torch.dtype,
    sent: torch.dtype,
    head_size: int,
    block_size: int,
) -> None:
    """Heads differ in size by many orders of magnitude, so that numbers below the normal ones occur in any format."""
    pool = normal(rng, 3, 2, 2, 4, 3, head_size, dtype=torch.float32)
    pool *= torch.logspace(-8, 3, 144)[torch.randperm(144, generator=rng)].view(3, 2, 2, 4, 3, 1).to(DEVICE)
    pool[0, 0, 0, 0, 0] = 0
    pool, items = pool.to(stored), torch.tensor([2, 0], device=DEVICE)
    wire = KVWire(block_size, sent)
    segment, digest = BACKEND.pack_kv(pool, items, 0, 2, wire)
    expected, expected_digest = reference.pack_kv(pool, items, 0, 2, wire)
    assert torch.equal(segment, expected)
    assert torch.equal(digest, expected_digest)
    for kept in DTYPES:
        target = torch.zeros(pool.shape, dtype=kept, device=DEVICE)
        plain = target.clone()
        BACKEND.unpack_kv(target, items, 0, segment, wire)
        reference.unpack_kv(plain, items, 0, segment, wire)
        assert torch.equal(target, plain)


@pytest.mark.parametrize("sent", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_arrives_as_nan(sent: torch.dtype, bad: float) -> None:
    pool, wire, items = torch.ones(2, 1, 2, 4, 2, 8, device=DEVICE), KVWire(4, sent), torch.arange(2, device=DEVICE)
    pool[1, 0, 1, 2, 1, 5] = bad
    arrived = torch.zeros_like(pool)
    BACKEND.unpack_kv(arrived, items, 0, BACKEND.pack_kv(pool, items, 0, 1, wire)[0], wire)
    assert arrived[1, 0, 1, 2, 1].isnan().all()
    assert arrived.isnan().sum() == 8
    assert (arrived.nan_to_num(1.0) == 1).all()


@pytest.mark.parametrize("num_words", [1, 96, 4095, 4096, 4097, 9000])
def test_digest_of_any_length(rng: torch.Generator, reference: Backend, num_words: int) -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (3, num_words), generator=rng).to(torch.int32).to(DEVICE)
    assert torch.equal(BACKEND.digest(words), reference.digest(words))


def test_extreme_words(reference: Backend) -> None:
    words = torch.tensor([[0, 0, 0], [1, -2, 3], [-(1 << 31), (1 << 31) - 1, -1]], dtype=torch.int32, device=DEVICE)
    assert torch.equal(BACKEND.digest(words), reference.digest(words))
    assert torch.equal(BACKEND.digest(words.view(torch.bfloat16)), reference.digest(words))


def test_a_view_is_digested_by_its_content(rng: torch.Generator) -> None:
    pool = make_pool(rng, torch.bfloat16)
    assert torch.equal(BACKEND.digest(pool[:, 2]), BACKEND.digest(pool[:, 2].clone()))


def test_what_does_not_fit_is_refused(rng: torch.Generator) -> None:
    pool, ids = make_pool(rng, torch.float16), torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        BACKEND.copy_blocks(pool[:, :3], ids[:1], ids[1:])
    with pytest.raises(ValueError, match="sources"):
        BACKEND.copy_blocks(pool, ids, ids[:1])
    with pytest.raises(ValueError, match="segment"):
        BACKEND.unpack_kv(pool, ids, 0, torch.zeros(2, 100, dtype=torch.uint8, device=DEVICE), WIRE)
    with pytest.raises(ValueError, match="fill"):
        BACKEND.pack_kv(pool, ids, 0, 1, KVWire(3, torch.float16))


def test_repeatable(rng: torch.Generator) -> None:
    pool, ids = make_pool(rng, torch.float16, 128), some_blocks(rng)
    assert_repeatable(lambda: BACKEND.pack_kv(pool, ids, 1, 3, WIRE))


@gpu
def test_a_pool_beyond_31_bits(rng: torch.Generator) -> None:
    """Blocks of 8.4 MB whose elements and words have numbers that 32 bits do not hold, from several threads at once."""
    plain, wire = TorchBackend(DEVICE), KVWire(64, torch.bfloat16)
    pool = torch.empty(1100, 32, 2, 64, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.tensor([1099, 0, 600, 1024, 513], device=DEVICE)
    pool[ids] = torch.randn(5, *pool.shape[1:], device=DEVICE).bfloat16()
    expected = plain.pack_kv(pool, ids, 3, 29, wire)
    got: list[tuple[Tensor, Tensor]] = []
    threads = [threading.Thread(target=lambda: got.append(BACKEND.pack_kv(pool, ids, 3, 29, wire))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert all(torch.equal(s, expected[0]) and torch.equal(d, expected[1]) for s, d in got)
    targets = torch.tensor([700, 701, 1098, 1, 2], device=DEVICE)
    BACKEND.unpack_kv(pool, targets, 3, expected[0], wire)
    assert torch.equal(pool[targets][:, 3:], pool[ids][:, 3:])
    BACKEND.copy_blocks(pool, ids, targets)
    assert torch.equal(pool[targets], pool[ids])
    assert_repeatable(lambda: BACKEND.pack_kv(pool, ids, 3, 29, wire)[1])
