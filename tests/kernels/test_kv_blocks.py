"""Copying, packing and digesting KV blocks: all exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from twostroke_kernels.backend import SCALE_FLOOR, Backend, KVWire
from twostroke_kernels.digest import SegmentDigest
from twostroke_kernels.reference import digest_multiplier, digest_words, e4m3_code, e4m3_value

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK64 = (1 << 64) - 1
MULTIPLIERS = ["0xe220a8397b1dcdaf", "0xbeeb8da1658eec67", "0x6c45d188009454f"]
DIGESTS = ["0x0", "0xe220a8397b1dcdaf", "0x7896a440301bc4ce", "0x2f88a4a21a67ce4a"]


def make_pool(rng: torch.Generator, dtype: torch.dtype, num_blocks: int = 10, head_size: int = 64) -> Tensor:
    return torch.randn(num_blocks, 5, 2, 4, 3, head_size, generator=rng).to(dtype)


def unsigned(digest: Tensor) -> list[int]:
    return [value & MASK64 for value in digest.tolist()]


def by_hand(words: list[int]) -> int:
    """The definition once more, from the docstring of `Backend.digest` alone."""
    total = 0
    for index, word in enumerate(words):
        z = ((index + 1) * 0x9E3779B97F4A7C15 & MASK64) | 1
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        total += word * ((z ^ (z >> 31)) | 1)
    return total & MASK64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_copy_blocks(
    backend: Backend, reference: Backend, rng: torch.Generator, dtype: torch.dtype, count: int
) -> None:
    order = torch.randperm(10, generator=rng)
    sources, targets = order[:count], order[count : 2 * count]
    pool = make_pool(rng, dtype)
    expected = pool.clone()
    reference.copy_blocks(expected, sources, targets)
    backend.copy_blocks(pool, sources, targets)
    assert torch.equal(pool, expected)


def test_one_block_is_copied_to_many(backend: Backend, rng: torch.Generator) -> None:
    pool = make_pool(rng, torch.bfloat16)
    block = pool[3].clone()
    backend.copy_blocks(pool, torch.tensor([3, 3, 3]), torch.tensor([0, 5, 9]))
    assert all(torch.equal(pool[target], block) for target in (0, 3, 5, 9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("first_layer", "num_layers"), [(0, 1), (2, 3), (0, 5)])
def test_pack_and_unpack(
    backend: Backend,
    reference: Backend,
    rng: torch.Generator,
    dtype: torch.dtype,
    head_size: int,
    count: int,
    split: int,
    first_layer: int,
    num_layers: int,
) -> None:
    pool = make_pool(rng, dtype, head_size=head_size)
    wire = KVWire(4 // split, dtype)
    items = torch.randperm(10 * split, generator=rng)[:count]
    segment, digest = backend.pack_kv(pool, items, first_layer, num_layers, wire)
    expected, expected_digest = reference.pack_kv(pool, items, first_layer, num_layers, wire)
    assert segment.is_contiguous()
    assert torch.equal(segment, expected)
    assert torch.equal(digest, expected_digest)
    assert digest.dtype == torch.int64

    other = make_pool(rng, dtype, head_size=head_size)
    before = other.clone()
    targets = torch.randperm(10 * split, generator=rng)[:count]
    backend.unpack_kv(other, targets, first_layer, segment, wire)
    layers = slice(first_layer, first_layer + num_layers)
    for item, target in zip(items.tolist(), targets.tolist(), strict=True):
        part, there = (slice(at % split * (4 // split), (at % split + 1) * (4 // split)) for at in (item, target))
        assert torch.equal(other[target // split, layers, :, there], pool[item // split, layers, :, part])
        before[target // split, layers, :, there] = other[target // split, layers, :, there]
    assert torch.equal(other, before), "a token or layer that was not named changed"


def test_a_segment_is_the_blocks_bytes(backend: Backend, rng: torch.Generator) -> None:
    """The order on the wire is the pool's, so that equal sides copy whole stretches."""
    pool = make_pool(rng, torch.bfloat16)
    segment, _ = backend.pack_kv(pool, torch.tensor([7, 1]), 2, 3, KVWire(4, torch.bfloat16))
    assert torch.equal(segment, pool[[7, 1], 2:5].flatten(1).view(torch.uint8))
    halves, _ = backend.pack_kv(pool, torch.tensor([15]), 2, 3, KVWire(2, torch.bfloat16))
    assert torch.equal(halves, pool[[7], 2:5, :, 2:].flatten(1).view(torch.uint8))


def make_rows(rng: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A pool whose heads differ in size by many orders of magnitude; some are all zero, or tiny."""
    pool = torch.randn(4, 2, 2, 4, 2, 8, generator=rng)
    pool *= torch.logspace(-8, 3, 4 * 2 * 2 * 4 * 2)[torch.randperm(128, generator=rng)].view(4, 2, 2, 4, 2, 1)
    pool[0, 0, 0, 0, 0] = 0
    pool[0, 0, 0, 1, 0] = 1e-35
    pool[0, 0, 1, 0, 0, 1:] = 0  # one number alone
    return pool.to(dtype)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("sent", [*DTYPES, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("block_size", [4, 2])
def test_conversion_is_exactly_as_defined(
    backend: Backend,
    reference: Backend,
    rng: torch.Generator,
    stored: torch.dtype,
    sent: torch.dtype,
    block_size: int,
) -> None:
    pool, wire = make_rows(rng, stored), KVWire(block_size, sent)
    items = torch.tensor([3, 0, 1])
    segment, digest = backend.pack_kv(pool, items, 0, 2, wire)
    expected, expected_digest = reference.pack_kv(pool, items, 0, 2, wire)
    assert torch.equal(segment, expected)
    assert torch.equal(digest, expected_digest)
    for kept in DTYPES:
        target = torch.zeros(pool.shape, dtype=kept)
        plain = target.clone()
        backend.unpack_kv(target, items, 0, segment, wire)
        reference.unpack_kv(plain, items, 0, segment, wire)
        assert torch.equal(target, plain)


@pytest.mark.parametrize("sent", [torch.float8_e4m3fn, torch.int8])
def test_scaled_numbers_are_within_the_stated_error(backend: Backend, rng: torch.Generator, sent: torch.dtype) -> None:
    pool, wire, items = make_rows(rng, torch.float32), KVWire(4, sent), torch.arange(4)
    segment, _ = backend.pack_kv(pool, items, 0, 2, wire)
    assert segment.shape == (4, 2 * 2 * 4 * 2 * (8 + 4))
    arrived = torch.zeros_like(pool)
    backend.unpack_kv(arrived, items, 0, segment, wire)
    wide = pool.double()
    largest = wide.abs().amax(-1, keepdim=True)
    bound = largest / 254 if sent == torch.int8 else torch.maximum(wide.abs() / 16, largest / 458752)
    error = (arrived.double() - wide).abs()
    assert (error <= bound + largest * 2**-22 + SCALE_FLOOR / 2).all()
    assert (error > bound / 2).any(), "the bound says little"


@pytest.mark.parametrize("sent", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_head_that_is_not_finite_arrives_as_nan(backend: Backend, sent: torch.dtype, bad: float) -> None:
    pool, wire, items = torch.ones(2, 1, 2, 4, 2, 8), KVWire(4, sent), torch.arange(2)
    pool[1, 0, 1, 2, 1, 5] = bad
    arrived = torch.zeros_like(pool)
    backend.unpack_kv(arrived, items, 0, backend.pack_kv(pool, items, 0, 1, wire)[0], wire)
    expected = torch.ones_like(pool)
    expected[1, 0, 1, 2, 1] = torch.nan
    assert torch.equal(arrived.isnan(), expected.isnan())
    assert torch.equal(arrived.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_the_reference_knows_float8() -> None:
    """Against torch's own: every code, and numbers between two of them."""
    codes = torch.arange(127, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).double()
    assert [e4m3_value(code) for code in range(127)] == numbers.tolist()
    between = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, -numbers]).float()
    rounded = between.to(torch.float8_e4m3fn).view(torch.uint8)
    assert [e4m3_code(value) for value in between.tolist()] == rounded.tolist()


def test_what_does_not_fit_is_refused(backend: Backend, rng: torch.Generator) -> None:
    pool, items = make_pool(rng, torch.float16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="fill"):
        backend.pack_kv(pool, items, 0, 1, KVWire(3, torch.float16))
    with pytest.raises(ValueError, match="words"):
        backend.pack_kv(make_pool(rng, torch.float16, head_size=2), items, 0, 1, KVWire(4, torch.int8))
    with pytest.raises(ValueError, match="segment"):
        backend.unpack_kv(pool, items, 0, torch.zeros(2, 100, dtype=torch.uint8), KVWire(4, torch.float16))


def test_multipliers_are_fixed() -> None:
    """Numbers of an independent computation: sender and receiver of different versions must agree."""
    assert [hex(digest_multiplier(index)) for index in range(3)] == MULTIPLIERS
    assert by_hand([1]) == digest_multiplier(0)
    assert digest_words([1, -2, 3]) & MASK64 == by_hand([1, -2, 3])


def test_digest_vectors(backend: Backend) -> None:
    words = torch.tensor([[0, 0, 0], [1, 0, 0], [1, -2, 3], [-(1 << 31), (1 << 31) - 1, -1]], dtype=torch.int32)
    assert [hex(value) for value in unsigned(backend.digest(words.view(torch.bfloat16)))] == DIGESTS
    assert unsigned(backend.digest(words)) == [by_hand(row) for row in words.tolist()]


@pytest.mark.parametrize("num_words", [1, 96, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, 100_003])
def test_digest_of_any_length(backend: Backend, rng: torch.Generator, num_words: int) -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (3, num_words), generator=rng).to(torch.int32)
    assert unsigned(backend.digest(words)) == [by_hand(row) for row in words.tolist()]


def test_digest_of_many_items_is_each_item_alone(backend: Backend, rng: torch.Generator) -> None:
    segment = torch.randn(40, 3, 2, 4, 3, 64, generator=rng).bfloat16()
    alone = torch.cat([SegmentDigest(torch.device("cpu"))(item[None]) for item in segment])
    assert torch.equal(backend.digest(segment), alone)
    assert len(set(alone.tolist())) == 40


def test_a_view_is_digested_by_its_content(backend: Backend, rng: torch.Generator) -> None:
    pool = make_pool(rng, torch.bfloat16)
    assert torch.equal(backend.digest(pool[:, 2]), backend.digest(pool[:, 2].clone()))


@pytest.mark.parametrize("num_words", [96, 40_000])
def test_digest_sees_any_change(backend: Backend, rng: torch.Generator, num_words: int) -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (1, num_words), generator=rng).to(torch.int32)
    seen = {int(backend.digest(words))}
    for index in (0, 1, num_words // 2, num_words - 1):
        for bit in (0, 15, 31):
            changed = words.clone()
            changed[0, index] ^= 1 << bit if bit < 31 else -(1 << 31)
            seen.add(int(backend.digest(changed)))
    for first, second in [(0, 1), (0, num_words - 1), (7, 70)]:
        swapped = words.clone()
        swapped[0, [first, second]] = words[0, [second, first]]
        seen.add(int(backend.digest(swapped)))
    assert len(seen) == 1 + 4 * 3 + 3
