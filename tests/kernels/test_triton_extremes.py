"""Long prompts, tensors whose elements have numbers that 32 bits do not hold, and outputs that someone else gave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twostroke_kernels.backend import PagedBatch, RotaryTable, Rotation, RowNorm

from tests.support.paged_attention import LAYER, Shape, make_case
from tests.support.tolerance import assert_as_good_as_torch
from tests.support.triton_device import DEVICE, gpu, normal

from twostroke_kernels.gpu.prefill_attention import prefill_attention, prefill_config  # isort: skip
from twostroke_kernels.triton_backend import TritonBackend  # isort: skip

pytestmark = pytest.mark.slow
BACKEND = TritonBackend(DEVICE)

# ---- outputs that are given ------------------------------------------------------------------------------------------


def check_given(compute: Callable[[Tensor | None], Tensor], dtype: torch.dtype) -> None:
    """`out` may be a slice of rows: every element of it is written, and nothing beside it."""
    expected = compute(None)
    around = torch.full((expected.shape[0] + 4, *expected.shape[1:]), float("nan"), dtype=dtype, device=DEVICE)
    out = around[2:-2]
    assert compute(out).data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    assert bool(around[:2].isnan().all())
    assert bool(around[-2:].isnan().all())


@pytest.mark.parametrize("prefix", [0, 30])
def test_attention_into_given_rows(rng: torch.Generator, prefix: int) -> None:
    shape, dtype = Shape(4, 2, 64, 16), torch.float16
    prompts = make_case(rng, shape, [17, 1, 33], [17 + prefix, 1, 33], dtype, DEVICE)
    decoding = make_case(rng, shape, [1, 1, 1], [17 + prefix, 1, 33], dtype, DEVICE)
    check_given(lambda out: BACKEND.prefill_attention(prompts.q, prompts.layer, prompts.batch, 0.1, out), dtype)
    check_given(lambda out: BACKEND.decode_attention(decoding.q, decoding.layer, decoding.batch, 0.1, out), dtype)


@pytest.mark.parametrize("rows", [1, 5])
def test_logits_into_given_rows(rng: torch.Generator, rows: int) -> None:
    x, weight, norm = (normal(rng, *shape, dtype=torch.float16) for shape in ((rows, 64), (130, 64), (64,)))
    check_given(lambda out: BACKEND.norm_logits(x, RowNorm(norm, 1e-5), weight, out), torch.float32)


def test_queries_into_given_rows(rng: torch.Generator) -> None:
    qkv, angles = normal(rng, 5, 4 * 32, dtype=torch.float16), normal(rng, 8, 16)
    pool = torch.zeros(2, 3, 2, 16, 1, 32, dtype=torch.float16, device=DEVICE)
    at, rotation = torch.arange(5, device=DEVICE), Rotation(RotaryTable(angles.cos(), angles.sin()), None)
    check_given(lambda out: BACKEND.rotate_and_write_kv(qkv, at, rotation, pool[:, LAYER], at + 7, out), torch.float16)


# ---- long prompts ----------------------------------------------------------------------------------------------------


def some_rows(q: Tensor, layer: Tensor, batch: PagedBatch, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's attention at `dtype` of some queries of one sequence whose whole context is in the step."""
    length = int(batch.context_lens[0])
    blocks = layer[batch.block_tables[0]].to(dtype)
    keys, values = (blocks[:, which].flatten(0, 1)[:length].transpose(0, 1) for which in (0, 1))
    ratio = q.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(ratio, 0), values.repeat_interleave(ratio, 0)
    mask = torch.arange(length, device=q.device)[None] <= rows[:, None]
    queries = q[rows].to(dtype).transpose(0, 1)
    out = F.scaled_dot_product_attention(queries[None], keys[None], values[None], attn_mask=mask, scale=0.09)
    return out[0].transpose(0, 1)


@gpu
@pytest.mark.parametrize("kernel", ["best", "plain"])
@pytest.mark.parametrize("length", [16384, 32767, 32768])
def test_a_prompt_of_32k_tokens(rng: torch.Generator, length: int, kernel: str) -> None:
    """First and last queries, and some between."""
    case = make_case(rng, Shape(4, 2, 128, 64), [length], [length], torch.bfloat16, DEVICE)
    config = None if kernel == "best" else prefill_config(case.layer, length)
    out = prefill_attention(case.q, case.layer, case.batch, 0.09, config)
    between = torch.randint(length, (60,), generator=rng)
    rows = torch.cat((torch.tensor([0, 1, length - 2, length - 1]), between)).to(DEVICE)
    exact, plain = (some_rows(case.q, case.layer, case.batch, rows, dtype) for dtype in (torch.float64, out.dtype))
    assert_as_good_as_torch(out[rows], exact, plain)
    assert bool(out.isfinite().all())


# ---- more than 2**31 elements ----------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 300])
def test_a_head_of_more_than_two_to_the_31_weights(rng: torch.Generator, rows: int) -> None:
    """The last rows' logits are those of the last rows alone."""
    weight = torch.zeros(264000, 8192, dtype=torch.bfloat16, device=DEVICE)
    assert weight.numel() > 2**31
    weight[-512:] = 0.02 * torch.randn(512, 8192, device=DEVICE).bfloat16()
    x, norm = normal(rng, rows, 8192, dtype=torch.bfloat16), RowNorm(torch.ones(8192, device=DEVICE).bfloat16(), 1e-5)
    logits = BACKEND.norm_logits(x, norm, weight)
    exact = BACKEND.rms_norm(x, norm.weight, norm.eps).double() @ weight[-512:].double().t()
    assert float((logits[:, -512:].double() - exact).abs().max()) < 0.02 * float(exact.abs().max())
    assert bool((logits[:, :-512] == 0).all())
    linear = BACKEND.linear(x, weight)
    assert_as_good_as_torch(linear[:, -512:], x.double() @ weight[-512:].double().t(), F.linear(x, weight[-512:]))


@gpu
def test_activations_of_more_than_two_to_the_31_elements() -> None:
    """A step of 75 thousand tokens: the last rows are what they are alone."""
    gate_up = torch.zeros(75000, 28672, dtype=torch.bfloat16, device=DEVICE)
    assert gate_up.numel() > 2**31
    gate_up[-3:].normal_()
    last, weight = gate_up[-3:].clone(), torch.ones(28672, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(BACKEND.silu_mul(gate_up)[-3:], BACKEND.silu_mul(last))
    assert torch.equal(BACKEND.rms_norm(gate_up, weight, 1e-5)[-3:], BACKEND.rms_norm(last, weight, 1e-5))
