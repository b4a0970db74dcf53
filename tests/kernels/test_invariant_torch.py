"""`InvariantTorchBackend`: every operation gives a row the bits that it gives it alone, and is as good as PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from twostroke_kernels.backend import (
    Backend,
    HeadNorm,
    PagedBatch,
    Penalties,
    RotaryTable,
    Rotation,
    RowNorm,
    SampledRows,
    SamplingRows,
)
from twostroke_kernels.invariant_torch import InvariantTorchBackend

from tests.support.paged_attention import PagedCase, Shape, make_case
from tests.support.tolerance import assert_as_good_as_torch

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [(300, 64), (33, 17), (576, 1536), (64, 4100)]
HEADS = Shape(group=3, num_kv_heads=2, head_size=80, block_size=16)
fast = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
num_rows = st.integers(1, 40)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def invariant() -> InvariantTorchBackend:
    return InvariantTorchBackend(CPU)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_rows_alone(compute: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Every row, and every tail of the rows, which lie elsewhere in memory and in slabs."""
    whole = compute(x)
    for row in range(x.shape[0]):
        assert same_bits(compute(x[row : row + 1]), whole[row : row + 1]), row
    for first in (1, 3, x.shape[0] // 2):
        assert same_bits(compute(x[first:]), whole[first:]), first


@fast
@given(
    num_rows, st.sampled_from([(300, 64), (33, 17), (576, 1536), (64, 4100)]), st.sampled_from(DTYPES), st.booleans()
)
def test_linear(rows: int, out_in: tuple[int, int], dtype: torch.dtype, has_bias: bool) -> None:
    backend = InvariantTorchBackend(CPU)
    weight, bias = drawn(1, *out_in, dtype=dtype), drawn(2, out_in[0], dtype=dtype) if has_bias else None
    assert_rows_alone(lambda x: backend.linear(x, weight, bias), drawn(3, rows, out_in[1], dtype=dtype))


@fast
@given(num_rows, st.sampled_from([64, 100, 256]), st.sampled_from(DTYPES))
def test_what_a_layer_does(rows: int, width: int, dtype: torch.dtype) -> None:
    backend = InvariantTorchBackend(CPU)
    x, weight = drawn(1, rows, width, dtype=dtype), drawn(2, 2 * width, width, dtype=dtype)
    norm = RowNorm(drawn(3, width, dtype=dtype), 1e-5)

    def added(x: Tensor) -> Tensor:
        residual = x * 3
        backend.add_linear(residual, x, weight[:width])
        return residual

    assert_rows_alone(lambda x: backend.rms_norm(x, norm.weight, norm.eps), x)
    assert_rows_alone(lambda x: backend.norm_linear(x, norm, weight), x)
    assert_rows_alone(lambda x: backend.norm_gated_linear(x, norm, weight), x)
    assert_rows_alone(lambda x: backend.norm_logits(x, norm, weight), x)
    assert_rows_alone(added, x)


@fast
@given(num_rows, st.sampled_from([7, 64, 112, 1536]), st.sampled_from(DTYPES))
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    backend = InvariantTorchBackend(CPU)
    assert_rows_alone(backend.silu_mul, drawn(1, rows, 2 * width, dtype=dtype))


@fast
@given(num_rows, st.sampled_from(DTYPES), st.booleans(), st.sampled_from([80, 48]))
def test_rotation(rows: int, dtype: torch.dtype, has_norm: bool, rotary_size: int) -> None:
    """Queries, and the keys and values that reach the pool."""
    backend = InvariantTorchBackend(CPU)
    angles = torch.arange(99.0)[:, None] / torch.arange(1.0, rotary_size // 2 + 1)
    weights = [drawn(seed, HEADS.head_size, dtype=dtype) for seed in (4, 5)]
    rotation = Rotation(RotaryTable(angles.cos(), angles.sin()), HeadNorm(*weights, 1e-6) if has_norm else None)
    qkv = drawn(6, rows, (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_size, dtype=dtype)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(rows))[:rows]

    def turned(first: int, last: int) -> tuple[Tensor, Tensor]:
        pool = torch.zeros(5, 1, 2, 16, HEADS.num_kv_heads, HEADS.head_size, dtype=dtype)
        slots = order[first:last]
        q = backend.rotate_and_write_kv(qkv[first:last], order[first:last].clone(), rotation, pool[:, 0], slots)
        return q, pool[slots // 16, 0, :, slots % 16]

    whole = turned(0, rows)
    for row in range(rows):
        alone = turned(row, row + 1)
        assert all(same_bits(one, every[row : row + 1]) for one, every in zip(alone, whole, strict=True))


def one_sequence(batch: PagedBatch, row: int, query_len: int, context_len: int) -> PagedBatch:
    lengths = torch.tensor([context_len])
    return PagedBatch(batch.block_tables[row : row + 1], torch.tensor([0, query_len]), lengths, query_len, context_len)


@fast
@given(st.lists(st.integers(1, 150), min_size=1, max_size=12), st.sampled_from(DTYPES))
def test_decode_attention(context_lens: list[int], dtype: torch.dtype) -> None:
    backend = InvariantTorchBackend(CPU)
    case = make_case(torch.Generator().manual_seed(1), HEADS, [1] * len(context_lens), context_lens, dtype, CPU)
    whole = backend.decode_attention(case.q, case.layer, case.batch, case.scale)
    for row, length in enumerate(context_lens):
        q, batch = case.q[row : row + 1], one_sequence(case.batch, row, 1, length)
        assert same_bits(backend.decode_attention(q, case.layer, batch, case.scale), whole[row : row + 1])


def in_chunks(backend: Backend, case: PagedCase, row: int, context_len: int, cuts: list[int]) -> Tensor:
    """A whole prompt's queries, in chunks that end at `cuts`; later keys are there already, which must not matter."""
    start = int(case.batch.query_starts[row])
    parts, first = [], 0
    for last in [*sorted({cut for cut in cuts if cut < context_len}), context_len]:
        if last > first:
            q, batch = case.q[start + first : start + last], one_sequence(case.batch, row, last - first, last)
            parts.append(backend.prefill_attention(q, case.layer, batch, case.scale))
        first = max(first, last)
    return torch.cat(parts)


@fast
@given(
    st.lists(st.integers(1, 140), min_size=1, max_size=4),
    st.lists(st.integers(1, 139), max_size=5),
    st.sampled_from(DTYPES),
)
def test_prefill_attention_in_any_chunks(context_lens: list[int], cuts: list[int], dtype: torch.dtype) -> None:
    backend = InvariantTorchBackend(CPU)
    case = make_case(torch.Generator().manual_seed(2), HEADS, context_lens, context_lens, dtype, CPU)
    whole = backend.prefill_attention(case.q, case.layer, case.batch, case.scale)
    for row, length in enumerate(context_lens):
        start = int(case.batch.query_starts[row])
        assert same_bits(in_chunks(backend, case, row, length, cuts), whole[start : start + length])


def sampling_rows(rows: int, seed: int) -> SamplingRows:
    rng = torch.Generator().manual_seed(seed)

    def one_of(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=rng)]

    return SamplingRows(
        temperature=one_of(0.0, 0.7, 1.0, 3.0),
        top_k=one_of(0, 0, 5, 290).long(),
        top_p=one_of(1.0, 0.5, 0.95),
        min_p=one_of(0.0, 0.0, 0.02),
        seed=torch.arange(rows) * 7,
        choice=torch.zeros(rows, dtype=torch.int64),
        position=torch.arange(rows) + 3,
        all_greedy=False,
        num_logprobs=3,
    )


@fast
@given(st.integers(1, 12), st.integers(0, 1000))
def test_sampling(rows: int, seed: int) -> None:
    """Tokens and logprobs, penalties first."""
    backend = InvariantTorchBackend(CPU)
    raw, told = drawn(seed, rows, 331) * 4, sampling_rows(rows, seed)

    def chosen(first: int, last: int) -> SampledRows:
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "choice", "position")
        own = SamplingRows(
            **{name: getattr(told, name)[first:last] for name in names}, all_greedy=False, num_logprobs=3
        )
        logits, cells = raw[first:last].clone(), torch.arange(last - first)
        amounts = torch.full((last - first,), 0.3)
        backend.penalize(logits, Penalties(cells, torch.full_like(cells, 5), 1 + amounts, amounts))
        return backend.sample(raw[first:last], logits, own)

    whole = chosen(0, rows)
    for row in range(rows):
        alone = chosen(row, row + 1)
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs", "finite"):
            assert same_bits(getattr(alone, name), getattr(whole, name)[row : row + 1]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_pytorch(
    dtype: torch.dtype, invariant: InvariantTorchBackend, reference: Backend, rng: torch.Generator
) -> None:
    x, weight = drawn(1, 37, 200, dtype=dtype), drawn(2, 48, 200, dtype=dtype)
    assert_as_good_as_torch(invariant.linear(x, weight), reference.linear(x, weight), F.linear(x, weight))
    assert invariant.linear(x[:0], weight).shape == (0, 48)
    gate, up = x.chunk(2, -1)
    assert_as_good_as_torch(invariant.silu_mul(x), reference.silu_mul(x), F.silu(gate) * up)
    query_lens, context_lens = [1, 40, 0, 7], [1, 90, 20, 39]
    case = make_case(rng, HEADS, query_lens, context_lens, dtype, CPU)
    got = invariant.prefill_attention(case.q, case.layer, case.batch, case.scale)
    expected = reference.prefill_attention(case.q, case.layer, case.batch, case.scale)
    assert_as_good_as_torch(got, expected, case.plain())
    case = make_case(rng, HEADS, [1] * 4, context_lens, dtype, CPU)
    out = torch.empty(6, HEADS.num_heads, HEADS.head_size, dtype=dtype)
    got = invariant.decode_attention(case.q, case.layer, case.batch, case.scale, out[1:5])
    assert got.data_ptr() == out[1:5].data_ptr()
    expected = reference.decode_attention(case.q, case.layer, case.batch, case.scale)
    assert_as_good_as_torch(got, expected, case.plain())
