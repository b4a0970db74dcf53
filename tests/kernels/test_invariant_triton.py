"""`InvariantTritonBackend`: a row's bits do not depend on the rows beside it, nor a prompt's on how it was cut.

Interpreted, this holds for the structure of the kernels alone. What the tensor cores and the compiler make of it, and
that the ways a product can take give the same bits, only the card can say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twostroke_kernels.backend import (
    Backend,
    HeadNorm,
    PagedBatch,
    RotaryTable,
    Rotation,
    RowNorm,
    SampledRows,
    SamplingRows,
)

from tests.support.paged_attention import PagedCase, Shape, make_case
from tests.support.tolerance import assert_as_good_as_torch
from tests.support.triton_device import DEVICE, HAS_GPU, LLAMA_8B_PRODUCTS, assert_repeatable, gpu, normal

from twostroke_kernels.gpu.fixed_gemm import fixed_linear  # isort: skip
from twostroke_kernels.gpu.invariant_products import FEW_ROWS, LEAST_WIDTH, TILES, product_for, run_product  # isort: skip
from twostroke_kernels.invariant_triton import InvariantTritonBackend  # isort: skip

pytestmark = pytest.mark.slow

BACKEND = InvariantTritonBackend(DEVICE)
HALF = torch.bfloat16 if HAS_GPU else torch.float16
SMALL = [(1024, 1024), (2816, 1024), (1000, 576), (576, 1536), (49152, 576), (8, 8)]
ROWS = (*range(1, 71), 100, 128, 129, 200, 256, 300, 1000, 2048)


@pytest.fixture(autouse=True)
def _interpreted_products_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy sums a row of a product in an order that depends on the row's place; a tensor core does not."""
    if HAS_GPU:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        total = acc.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None].astype(total.dtype) * b.data[None, k].astype(total.dtype)
        return TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def weight_of(out_in: tuple[int, int], dtype: torch.dtype = HALF) -> Tensor:
    rng = torch.Generator(DEVICE).manual_seed(1)
    return torch.randn(out_in, device=DEVICE, generator=rng).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_rows_alone(compute: Callable[[Tensor], Tensor], x: Tensor, rows: tuple[int, ...]) -> None:
    """In batches of so many rows, each row gets the bits that it has alone."""
    alone = torch.cat([compute(x[row : row + 1]) for row in range(min(x.shape[0], 70))])
    for count in rows:
        batch = compute(x[:count])
        shown = min(count, alone.shape[0])
        assert same_bits(batch[:shown], alone[:shown]), count
        # The last rows of a batch lie elsewhere in its tiles.
        assert same_bits(compute(x[:count].flip(0)).flip(0), batch), count


# ---- linear layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("rows", "out_in"), [(0, (8, 8)), (1, (40, 33)), (70, (100, 64)), (33, (7, 130))])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_fixed_product(
    rng: torch.Generator, reference: Backend, dtype: torch.dtype, rows: int, out_in: tuple[int, int], has_bias: bool
) -> None:
    x, weight = normal(rng, rows, out_in[1], dtype=dtype), weight_of(out_in, dtype)
    bias = normal(rng, out_in[0], dtype=dtype) if has_bias else None
    expected, plain = reference.linear(x, weight, bias), F.linear(x, weight, bias)
    assert_as_good_as_torch(fixed_linear(x, weight, bias), expected, plain)
    wide = fixed_linear(x, weight, bias, out=torch.empty(plain.shape, dtype=torch.float32, device=DEVICE))
    assert_as_good_as_torch(wide, expected, F.linear(x.float(), weight.float(), None if bias is None else bias.float()))
    residual = normal(rng, rows, out_in[0], dtype=dtype)
    summed = residual.clone()
    assert fixed_linear(x, weight, bias, adds=True, out=summed) is summed
    assert_as_good_as_torch(summed, residual.double() + expected, residual + plain)
    if rows:
        assert_repeatable(lambda: fixed_linear(x, weight, bias))


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight = torch.zeros(2, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="fit"):
        fixed_linear(x, weight[:, :4], None)
    with pytest.raises(ValueError, match="missing"):
        fixed_linear(x, weight, None, adds=True)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_what_a_layer_does(rng: torch.Generator, dtype: torch.dtype) -> None:
    """Interpreted: on shapes of several tiles. On a card the same through whatever kernels it has."""
    x, weight = normal(rng, 67, 48, dtype=dtype), weight_of((2 * 48, 48), dtype)
    norm = RowNorm(normal(rng, 48, dtype=dtype), 1e-5)

    def added(x: Tensor) -> Tensor:
        residual = x * 3
        BACKEND.add_linear(residual, x, weight[:48])
        return residual

    def logits(x: Tensor) -> Tensor:
        whole = torch.empty(80, 96, dtype=torch.float32, device=DEVICE)
        return BACKEND.norm_logits(x, norm, weight, whole[3 : 3 + x.shape[0]])

    rows = (1, 2, 64, 65, 67) if HAS_GPU else (2, 67)
    for compute in (
        lambda x: BACKEND.norm_linear(x, norm, weight),
        lambda x: BACKEND.norm_gated_linear(x, norm, weight),
        added,
        logits,
    ):
        assert_rows_alone(compute, x if HAS_GPU else x[:67], rows)
    assert same_bits(BACKEND.norm_logits(x, norm, weight), logits(x))


@gpu
@pytest.mark.parametrize("out_in", [*LLAMA_8B_PRODUCTS.values(), *SMALL], ids=str)
def test_linear_gives_every_number_of_rows_the_bits_of_one(out_in: tuple[int, int]) -> None:
    weight = weight_of(out_in)
    x = weight_of((2048, out_in[1]))
    held = weight_of((2048, out_in[0]))

    def added(x: Tensor) -> Tensor:
        residual = held[: x.shape[0]].clone()
        BACKEND.add_linear(residual, x, weight)
        return residual

    assert_rows_alone(lambda x: BACKEND.linear(x, weight), x, ROWS)
    alone = torch.cat([added(x[:1]), *(added(x[: count + 1])[count:] for count in range(1, 70))])
    for count in ROWS:
        assert same_bits(added(x[:count])[:70], alone[: min(count, 70)]), count


@gpu
@pytest.mark.parametrize(
    "out_in", [shape for shape in (*LLAMA_8B_PRODUCTS.values(), *SMALL) if min(shape) >= LEAST_WIDTH], ids=str
)
def test_every_product_that_may_be_chosen_gives_the_same_bits(out_in: tuple[int, int]) -> None:
    """The fact that the table of products rests on; rounded to half precision and as float32."""
    weight, bias = weight_of(out_in), weight_of((1, out_in[0]))[0]
    for count in (1, 7, 16, 33, 64, 65, 300):
        x = weight_of((count, out_in[1]))
        products = [*TILES, *([FEW_ROWS] if count <= 64 else [])]
        assert product_for(count, out_in[0], DEVICE) in products
        for dtype in (HALF, torch.float32):
            outs = [torch.empty(count, out_in[0], dtype=dtype, device=DEVICE) for _ in products]
            for product, out in zip(products, outs, strict=True):
                run_product(product, x, weight, bias, out=out)
            different = [product for product, out in zip(products, outs, strict=True) if not same_bits(out, outs[0])]
            assert not different, (count, dtype)


# ---- rows of other operations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_norm", [False, True])
def test_rotation(rng: torch.Generator, has_norm: bool) -> None:
    """The number of heads a program takes changes at 256 tokens."""
    heads, kv_heads, size, count = (32, 8, 128, 300) if HAS_GPU else (3, 1, 16, 257)
    angles = torch.arange(float(count))[:, None] / torch.arange(1.0, size // 2 + 1)
    table = RotaryTable(angles.cos().to(DEVICE), angles.sin().to(DEVICE))
    weights = [normal(rng, size, dtype=HALF) for _ in range(2)]
    rotation = Rotation(table, HeadNorm(weights[0], weights[1], 1e-6) if has_norm else None)
    qkv = normal(rng, count, (heads + 2 * kv_heads) * size, dtype=HALF)
    positions = torch.arange(count, device=DEVICE)

    def turned(last: int) -> Tensor:
        pool = torch.zeros(-(-count // 16), 1, 2, 16, kv_heads, size, dtype=HALF, device=DEVICE)
        q = BACKEND.rotate_and_write_kv(qkv[:last], positions[:last], rotation, pool[:, 0], positions[:last])
        written = pool[:, 0].transpose(1, 2).flatten(0, 1)[:last]
        return torch.cat((q.flatten(1), written.flatten(1)), 1)

    whole = turned(count)
    for last in (1, 3, 255):
        assert same_bits(turned(last), whole[:last]), last


def test_norms_and_swiglu(rng: torch.Generator) -> None:
    x = normal(rng, 40, 200, dtype=HALF)
    weight = normal(rng, 200, dtype=HALF)
    assert_rows_alone(lambda x: BACKEND.rms_norm(x, weight, 1e-5), x, (2, 40))
    assert_rows_alone(BACKEND.silu_mul, x, (2, 40))


def test_sampling(rng: torch.Generator) -> None:
    """A row's token, and its logprobs, whatever the others are and whether they want logprobs."""
    logits = 4 * normal(rng, 6, 5000 if HAS_GPU else 300)
    told = {
        "temperature": torch.tensor([0.0, 1.0, 0.0, 0.7, 1.3, 2.0]),
        "top_k": torch.tensor([0, 0, 0, 0, 20, 7]),
        "top_p": torch.tensor([1.0, 0.9, 1.0, 1.0, 0.8, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.02, 0.0, 0.0]),
        "seed": torch.arange(6),
        "choice": torch.zeros(6, dtype=torch.int64),
        "position": torch.arange(6) + 9,
    }

    def sampled(first: int, last: int, num_logprobs: int) -> SampledRows:
        columns = {name: column[first:last].to(DEVICE) for name, column in told.items()}
        greedy = not bool(told["temperature"][first:last].any())
        rows = SamplingRows(**columns, all_greedy=greedy, num_logprobs=num_logprobs)
        return BACKEND.sample(logits[first:last], logits[first:last], rows)

    together = sampled(0, 6, 2)
    for row in range(6):
        alone = sampled(row, row + 1, 2)
        for field in dataclasses.fields(together):
            assert same_bits(getattr(alone, field.name), getattr(together, field.name)[row : row + 1]), field.name
        assert same_bits(sampled(row, row + 1, -1).token_ids, together.token_ids[row : row + 1])


# ---- attention -------------------------------------------------------------------------------------------------------


def one_sequence(case: PagedCase, row: int, query_len: int, context_len: int, table_len: int) -> PagedBatch:
    tables = case.batch.block_tables[row : row + 1, :table_len].contiguous()
    starts = torch.tensor([0, query_len], device=DEVICE)
    return PagedBatch(tables, starts, torch.tensor([context_len], device=DEVICE), query_len, context_len)


def in_chunks(case: PagedCase, row: int, context_len: int, size: int) -> Tensor:
    """A prompt's queries in chunks of `size`; the keys of later ones are in the pool already."""
    start = int(case.batch.query_starts[row])
    block_size = case.layer.shape[2]
    parts = []
    for first in range(0, context_len, size):
        last = min(first + size, context_len)
        batch = one_sequence(case, row, last - first, last, -(-last // block_size))
        parts.append(BACKEND.prefill_attention(case.q[start + first : start + last], case.layer, batch, case.scale))
    return torch.cat(parts)


def check_prefill(rng: torch.Generator, shape: Shape, lengths: list[int], chunks: tuple[int, ...]) -> None:
    case = make_case(rng, shape, lengths, lengths, HALF, DEVICE)
    whole = BACKEND.prefill_attention(case.q, case.layer, case.batch, case.scale)
    for row, length in enumerate(lengths):
        start = int(case.batch.query_starts[row])
        for size in chunks:
            got = in_chunks(case, row, length, size)
            assert same_bits(got, whole[start : start + length]), (length, size)


def test_prefill_attention_in_any_chunks(rng: torch.Generator) -> None:
    check_prefill(rng, Shape(group=2, num_kv_heads=1, head_size=16, block_size=16), [70, 1, 33], (1, 7, 64))


@gpu
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_prefill_attention_on_the_card(rng: torch.Generator, head_size: int) -> None:
    """Lengths on both sides of every boundary; chunks that begin anywhere in a tile."""
    shape = Shape(group=4, num_kv_heads=2, head_size=head_size, block_size=64)
    check_prefill(rng, shape, [1, 63, 64, 65, 128, 300, 1000], (1, 37, 64, 100, 128, 500))
    check_prefill(rng, shape, [5000], (64, 513, 2048, 4100))


def check_decode(rng: torch.Generator, shape: Shape, lengths: list[int], padded_len: int) -> None:
    """In a batch, alone, and as a captured graph sees it: with bounds for the longest context of all."""
    case = make_case(rng, shape, [1] * len(lengths), lengths, HALF, DEVICE)
    whole = BACKEND.decode_attention(case.q, case.layer, case.batch, case.scale)
    for row, length in enumerate(lengths):
        batch = one_sequence(case, row, 1, length, -(-length // shape.block_size))
        q = case.q[row : row + 1]
        assert same_bits(BACKEND.decode_attention(q, case.layer, batch, case.scale), whole[row : row + 1]), length
        bounded = dataclasses.replace(batch, max_context_len=padded_len)
        got = BACKEND.decode_attention(q, case.layer, bounded, case.scale)
        assert same_bits(got, whole[row : row + 1]), length


def test_decode_attention(rng: torch.Generator) -> None:
    check_decode(rng, Shape(group=2, num_kv_heads=1, head_size=16, block_size=16), [1, 255, 256, 257, 600], 1024)


@gpu
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_decode_attention_on_the_card(rng: torch.Generator, head_size: int) -> None:
    shape = Shape(group=4, num_kv_heads=8, head_size=head_size, block_size=64)
    check_decode(rng, shape, [1, 63, 64, 65, 255, 256, 257, 1000, 1024, 1060, 5000], 16384)
    check_decode(rng, shape, [1060] * 64, 16384)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_attention_is_as_good_as_pytorch(rng: torch.Generator, reference: Backend, kind: str) -> None:
    lengths = [5, 130, 260] if kind == "decode" else [5, 40]
    query_lens = [1] * 3 if kind == "decode" else [5, 33]
    case = make_case(rng, Shape(2, 1, 16, 16), query_lens, lengths, HALF, DEVICE)
    got = getattr(BACKEND, f"{kind}_attention")(case.q, case.layer, case.batch, case.scale)
    expected = getattr(reference, f"{kind}_attention")(case.q, case.layer, case.batch, case.scale)
    assert_as_good_as_torch(got, expected, case.plain())
