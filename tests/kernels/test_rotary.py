"""Rotation of queries and keys, and where keys and values are written."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from twostroke_kernels.backend import Backend, HeadNorm, RotaryTable, Rotation

from tests.support.tolerance import assert_as_good_as_torch

DTYPES = [torch.float32, torch.bfloat16]
BLOCK_SIZE = 4
NUM_BLOCKS = 9


def rotary_table(size: int) -> RotaryTable:
    inverse = 10000.0 ** -(torch.arange(0, size, 2).float() / size)
    angles = torch.arange(64).float()[:, None] * inverse
    return RotaryTable(angles.cos(), angles.sin())


def llama_rotate(x: Tensor, positions: Tensor, rotary: RotaryTable) -> Tensor:
    """As transformers does it: angles in the model's dtype, on the first rotary-size elements."""
    cos = torch.cat((rotary.cos, rotary.cos), -1)[positions][:, None].to(x.dtype)
    sin = torch.cat((rotary.sin, rotary.sin), -1)[positions][:, None].to(x.dtype)
    size = cos.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    first, second = turning.chunk(2, -1)
    return torch.cat((turning * cos + torch.cat((-second, first), -1) * sin, rest), -1)


@dataclasses.dataclass
class Case:
    qkv: Tensor
    positions: Tensor
    slots: Tensor
    pool: Tensor
    num_heads: int
    num_kv_heads: int
    head_size: int

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv.view(self.qkv.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_size)
        values_from = self.num_heads + self.num_kv_heads
        return heads[:, : self.num_heads], heads[:, self.num_heads : values_from], heads[:, values_from:]


def make_case(rng: torch.Generator, dtype: torch.dtype, tokens: int, ratio: int, head_size: int) -> Case:
    num_kv_heads = 3
    num_heads = ratio * num_kv_heads
    width = (num_heads + 2 * num_kv_heads) * head_size
    pool = torch.randn(NUM_BLOCKS, 2, 2, BLOCK_SIZE, num_kv_heads, head_size, generator=rng).to(dtype)
    return Case(
        torch.randn(tokens, width, generator=rng).to(dtype),
        torch.randint(64, (tokens,), generator=rng),
        torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=rng)[:tokens],
        pool,
        num_heads,
        num_kv_heads,
        head_size,
    )


def check(backend: Backend, reference: Backend, case: Case, rotary: RotaryTable, norm: HeadNorm | None) -> None:
    pool, pool64 = case.pool.clone(), case.pool.double()
    q = backend.rotate_and_write_kv(case.qkv, case.positions, Rotation(rotary, norm), pool[:, 1], case.slots)
    q64 = reference.rotate_and_write_kv(case.qkv, case.positions, Rotation(rotary, norm), pool64[:, 1], case.slots)
    out = torch.empty(q.shape[0] + 2, *q.shape[1:], dtype=q.dtype)
    backend.rotate_and_write_kv(
        case.qkv, case.positions, Rotation(rotary, norm), case.pool.clone()[:, 1], case.slots, out[1:-1]
    )
    assert torch.equal(out[1:-1], q)
    plain_q, plain_k, v = case.heads()
    if norm is not None:
        plain_q = torch.nn.functional.rms_norm(plain_q, (case.head_size,), norm.q_weight, norm.eps)
        plain_k = torch.nn.functional.rms_norm(plain_k, (case.head_size,), norm.k_weight, norm.eps)
    assert_as_good_as_torch(q, q64, llama_rotate(plain_q, case.positions, rotary))
    block, offset = case.slots // BLOCK_SIZE, case.slots % BLOCK_SIZE
    assert_as_good_as_torch(
        pool[block, 1, 0, offset], pool64[block, 1, 0, offset], llama_rotate(plain_k, case.positions, rotary)
    )
    assert torch.equal(pool[block, 1, 1, offset], v)
    expected = case.pool.clone()
    expected[block, 1, :, offset] = pool[block, 1, :, offset]
    assert torch.equal(pool, expected), "a slot or layer that was not named changed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 19])
@pytest.mark.parametrize(("ratio", "head_size"), [(1, 64), (3, 80), (4, 128), (8, 64)])
def test_rotate_and_write_kv(
    backend: Backend,
    reference: Backend,
    rng: torch.Generator,
    dtype: torch.dtype,
    tokens: int,
    ratio: int,
    head_size: int,
) -> None:
    case = make_case(rng, dtype, tokens, ratio, head_size)
    check(backend, reference, case, rotary_table(head_size), None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_rotation(backend: Backend, reference: Backend, rng: torch.Generator, dtype: torch.dtype) -> None:
    check(backend, reference, make_case(rng, dtype, 7, 3, 64), rotary_table(32), None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norm(backend: Backend, reference: Backend, rng: torch.Generator, dtype: torch.dtype) -> None:
    weights = torch.rand(2, 64, generator=rng).to(dtype) + 0.5
    check(backend, reference, make_case(rng, dtype, 7, 3, 64), rotary_table(64), HeadNorm(weights[0], weights[1], 1e-6))


def test_new_index_tensors_are_noticed(backend: Backend, reference: Backend, rng: torch.Generator) -> None:
    """The backend remembers a step's indices; the next step's must not be taken for them."""
    rotary, case = rotary_table(64), make_case(rng, torch.float32, 5, 3, 64)
    for _ in range(3):
        check(backend, reference, case, rotary, None)
        check(backend, reference, dataclasses.replace(case, positions=case.positions.flip(0)), rotary, None)
        case = dataclasses.replace(case, slots=(case.slots + 1) % (NUM_BLOCKS * BLOCK_SIZE))
