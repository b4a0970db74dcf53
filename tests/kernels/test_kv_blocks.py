"""Copying, packing and digesting KV blocks: all exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from twostroke_kernels.backend import Backend
from twostroke_kernels.digest import SegmentDigest
from twostroke_kernels.reference import digest_multiplier, digest_words

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
@pytest.mark.parametrize(("first_layer", "num_layers"), [(0, 1), (2, 3), (0, 5)])
def test_pack_and_unpack(
    backend: Backend,
    reference: Backend,
    rng: torch.Generator,
    dtype: torch.dtype,
    head_size: int,
    count: int,
    first_layer: int,
    num_layers: int,
) -> None:
    pool = make_pool(rng, dtype, head_size=head_size)
    block_ids = torch.randperm(10, generator=rng)[:count]
    segment, digest = backend.pack_kv(pool, block_ids, first_layer, num_layers)
    expected, expected_digest = reference.pack_kv(pool, block_ids, first_layer, num_layers)
    assert segment.is_contiguous()
    assert torch.equal(segment, expected)
    assert torch.equal(digest, expected_digest)
    assert digest.dtype == torch.int64

    other = make_pool(rng, dtype, head_size=head_size)
    before = other.clone()
    targets = torch.randperm(10, generator=rng)[:count]
    backend.unpack_kv(other, targets, first_layer, segment)
    layers = slice(first_layer, first_layer + num_layers)
    assert torch.equal(other[targets][:, layers], pool[block_ids][:, layers])
    before[targets, layers] = other[targets, layers]
    assert torch.equal(other, before), "a block or layer that was not named changed"


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
