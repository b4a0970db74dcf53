"""KV items copied from pool to pool, and digested where they lie: by PyTorch and by Triton, both exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from twostroke_kernels.backend import Backend, KVItems, KVWire
from twostroke_kernels.torch_backend import TorchBackend

from tests.support.triton_device import DEVICE, DTYPES, assert_repeatable, normal

from twostroke_kernels.triton_backend import TritonBackend  # isort: skip

BACKENDS = {"torch": TorchBackend(DEVICE), "triton": TritonBackend(DEVICE)}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


def make_pool(rng: torch.Generator, block_size: int, dtype: torch.dtype, num_blocks: int = 6) -> Tensor:
    return normal(rng, num_blocks, 4, 2, block_size, 3, 64, dtype=dtype)


def some_items(rng: torch.Generator, pool: Tensor, wire: KVWire, count: int) -> Tensor:
    return torch.randperm(pool.shape[0] * wire.split(pool), generator=rng)[:count].to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 4, 4), (4, 8, 4), (8, 8, 2)], ids=str)
@pytest.mark.parametrize(("count", "first_layer", "num_layers"), [(0, 0, 4), (1, 1, 1), (5, 1, 3)])
def test_items_go_from_blocks_to_blocks_with_the_digest_of_what_travels(
    backend: Backend,
    reference: Backend,
    rng: torch.Generator,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    count: int,
    first_layer: int,
    num_layers: int,
) -> None:
    pool, other = make_pool(rng, sizes[0], dtype), make_pool(rng, sizes[1], dtype)
    wire = KVWire(sizes[2], dtype)
    source = KVItems(pool, some_items(rng, pool, wire, count))
    target = KVItems(other, some_items(rng, other, wire, count))
    segment, digest = reference.pack_kv(pool, source.ids, first_layer, num_layers, wire)
    expected = other.clone()
    reference.unpack_kv(expected, target.ids, first_layer, segment, wire)
    assert torch.equal(backend.push_kv(source, target, first_layer, num_layers, wire), digest)
    assert torch.equal(other, expected)
    assert torch.equal(backend.digest_kv(target, first_layer, num_layers, wire), digest)


@pytest.mark.parametrize(("stored", "kept"), [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_numbers_become_what_the_other_pool_keeps(
    backend: Backend, reference: Backend, rng: torch.Generator, stored: torch.dtype, kept: torch.dtype
) -> None:
    pool, other, wire = make_pool(rng, 4, stored), make_pool(rng, 4, kept), KVWire(4, kept)
    source, target = (KVItems(side, some_items(rng, side, wire, 3)) for side in (pool, other))
    digest = backend.push_kv(source, target, 1, 2, wire)
    assert torch.equal(other[target.ids, 1:3], pool[source.ids, 1:3].to(kept))
    assert torch.equal(backend.digest_kv(target, 1, 2, wire), digest)
    assert torch.equal(reference.digest_kv(target, 1, 2, wire), digest)


def test_a_changed_bit_changes_one_digest_of_those_where_they_lie(backend: Backend, rng: torch.Generator) -> None:
    pool, wire = make_pool(rng, 4, torch.float16), KVWire(2, torch.float16)
    items = KVItems(pool, some_items(rng, pool, wire, 8))
    before = backend.digest_kv(items, 0, 4, wire)
    block, part = divmod(int(items.ids[3]), 2)
    pool[block, 2, 1, part * 2 + 1, 0, 5].view(torch.int16).bitwise_xor_(1)
    assert (backend.digest_kv(items, 0, 4, wire) != before).nonzero().tolist() == [[3]]


def test_what_does_not_fit_is_refused(backend: Backend, rng: torch.Generator) -> None:
    pool, other = make_pool(rng, 4, torch.float16), make_pool(rng, 4, torch.float32)
    ids = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="does not store"):
        backend.push_kv(KVItems(pool, ids), KVItems(other, ids), 0, 1, KVWire(4, torch.float16))
    with pytest.raises(ValueError, match="does not store"):
        backend.push_kv(KVItems(pool, ids), KVItems(other, ids), 0, 1, KVWire(4, torch.int8))


def test_repeatable(rng: torch.Generator) -> None:
    pool, other, wire = make_pool(rng, 8, DTYPES[-1]), make_pool(rng, 4, DTYPES[-1]), KVWire(4, DTYPES[-1])
    source, target = (KVItems(side, some_items(rng, side, wire, 5)) for side in (pool, other))
    assert_repeatable(lambda: (BACKENDS["triton"].push_kv(source, target, 0, 4, wire), other.clone()))
