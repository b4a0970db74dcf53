"""The Triton attention kernels against float64: interpreted where there is no GPU, else compiled, with real shapes."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor
from twostroke_kernels.backend import Backend, HeadNorm, PagedBatch, RotaryTable, Rotation

from tests.support.paged_attention import LAYER, PagedCase, Shape, make_case
from tests.support.tolerance import assert_as_good_as_torch
from tests.support.triton_device import DEVICE, DTYPES, HAS_GPU, REPEATS, gpu

from twostroke_kernels.gpu.decode_attention import DecodeConfig, decode_attention, decode_config  # isort: skip
from twostroke_kernels.gpu.prefill_attention import PrefillConfig, prefill_attention, prefill_config  # isort: skip
from twostroke_kernels.gpu.rotary import rotate_and_write_kv  # isort: skip

pytestmark = pytest.mark.slow  # interpreted, they take half a minute
HALF_DTYPES = DTYPES[1:]
SHAPES = [
    Shape(1, 2, 64, 16),
    Shape(3, 1, 80, 16),
    Shape(5, 1, 96, 32),
    Shape(4, 2, 128, 64),
    Shape(16, 1, 64, 128),
    Shape(2, 1, 256, 64),
    Shape(2, 1, 64, 48),
]
LLAMA_8B = Shape(4, 8, 128, 64)


def check_decode(case: PagedCase, exact: Tensor, config: DecodeConfig | None = None) -> None:
    out = decode_attention(case.q, case.layer, case.batch, case.scale, config)
    assert_as_good_as_torch(out, exact, case.plain())


def check_prefill(case: PagedCase, exact: Tensor, config: PrefillConfig | None = None) -> None:
    out = prefill_attention(case.q, case.layer, case.batch, case.scale, config)
    assert_as_good_as_torch(out, exact, case.plain())


def around(block_size: int) -> list[int]:
    return [block_size - 1, block_size, block_size + 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(reference: Backend, rng: torch.Generator, shape: Shape, dtype: torch.dtype) -> None:
    lengths = [*around(shape.block_size), 1, 2 * shape.block_size + 3]
    case = make_case(rng, shape, [1] * len(lengths), lengths, dtype, DEVICE)
    exact = reference.decode_attention(case.q, case.layer, case.batch, case.scale)
    config = decode_config(case.layer, len(lengths), max(lengths))
    for num_splits in (1, 4):
        check_decode(case, exact, dataclasses.replace(config, num_splits=num_splits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(reference: Backend, rng: torch.Generator, shape: Shape, dtype: torch.dtype) -> None:
    """Whole prompts, a chunk after a prefix, an empty chunk, one of several tiles, and a one-token row."""
    size = shape.block_size
    query_lens, context_lens = [size, 3, 0, size + 1, 70, 1], [size, size + 2, 5, size + 1, 90, 1]
    case = make_case(rng, shape, query_lens, context_lens, dtype, DEVICE)
    exact = reference.prefill_attention(case.q, case.layer, case.batch, case.scale)
    check_prefill(case, exact)


@pytest.mark.parametrize("shape", [Shape(4, 2, 64, 64), Shape(2, 1, 128, 128)], ids=str)
def test_tiles_as_boxes_equal_tiles_by_pointer(reference: Backend, rng: torch.Generator, shape: Shape) -> None:
    """Descriptors are fetched by the interpreter too, whatever a card without them would choose."""
    if HAS_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this card has no tensor memory accelerator")
    size = shape.block_size
    lengths = [*around(2 * size), 1]
    decode = make_case(rng, shape, [1] * 4, lengths, torch.float16, DEVICE)
    prefill = make_case(rng, shape, [70, size, 3, 1], lengths, torch.float16, DEVICE)
    exact_decode = reference.decode_attention(decode.q, decode.layer, decode.batch, decode.scale)
    exact_prefill = reference.prefill_attention(prefill.q, prefill.layer, prefill.batch, prefill.scale)
    for tma in (False, True):
        check_decode(decode, exact_decode, DecodeConfig(64, 2, 4, 2, tma))
        for queries in (64, 128):
            check_prefill(prefill, exact_prefill, PrefillConfig(queries, 64, queries // 16, 2, tma, None))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_large_scores(reference: Backend, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Tokens that compete at scores near a hundred: scores rounded to bfloat16 would be half a unit apart."""
    case = make_case(rng, Shape(3, 2, 64, 16), [1, 1], [90, 64], dtype, DEVICE)
    case.layer[:, 0] = case.layer[:, 0] * 0.1 + 1
    case = PagedCase((1.5 + 0.5 * case.q.float()).to(dtype), case.pool, case.batch, 1.0)
    exact = reference.decode_attention(case.q, case.layer, case.batch, case.scale)
    check_decode(case, exact)
    check_prefill(case, exact)


def test_no_sequences_and_empty_contexts(rng: torch.Generator) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    nobody = PagedBatch(none.view(0, 1), torch.zeros(1, dtype=torch.int64, device=DEVICE), none, 0, 0)
    case = make_case(rng, SHAPES[0], [1, 1], [0, 5], torch.float16, DEVICE)
    for attention in (decode_attention, prefill_attention):
        assert attention(case.q[:0], case.layer, nobody, 1.0).shape == (0, 2, 64)
    for num_splits in (1, 2):
        config = dataclasses.replace(decode_config(case.layer, 2, 5), num_splits=num_splits)
        out = decode_attention(case.q, case.layer, case.batch, case.scale, config)
        assert bool((out[0] == 0).all())
        assert bool(out[1].isfinite().all())


def test_rows_that_lie_apart(rng: torch.Generator) -> None:
    """Queries cut from a wider tensor, tables and lengths cut from larger ones."""
    case = make_case(rng, SHAPES[0], [1, 1, 1], [20, 33, 7], torch.float16, DEVICE)
    wide = torch.cat((case.q.flatten(1), case.q.flatten(1)), 1)[:, : case.q[0].numel()].view(case.q.shape)
    batch = case.batch
    tables = torch.cat((batch.block_tables, batch.block_tables), 1)[1:, : batch.block_tables.shape[1]]
    part = PagedBatch(tables, batch.query_starts[:3], batch.context_lens[1:], 1, 33)
    for attention in (decode_attention, prefill_attention):
        whole = attention(case.q, case.layer, batch, case.scale)
        assert torch.equal(attention(wide, case.layer, batch, case.scale), whole)
        torch.testing.assert_close(attention(wide[1:], case.layer, part, case.scale), whole[1:])


def test_a_layer_with_holes_is_refused(rng: torch.Generator) -> None:
    case = make_case(rng, SHAPES[0], [1], [5], torch.float16, DEVICE)
    with pytest.raises(ValueError, match="kv_layer"):
        decode_attention(case.q, case.layer[:, :, ::2], case.batch, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        prefill_attention(case.q.float(), case.layer, case.batch, 1.0)


# ---- rotation -------------------------------------------------------------------------------------------------------


def rotary_table(size: int, length: int = 64) -> RotaryTable:
    inverse = 10000.0 ** -(torch.arange(0, size, 2).float() / size)
    angles = torch.arange(length).float()[:, None] * inverse
    return RotaryTable(angles.cos().to(DEVICE), angles.sin().to(DEVICE))


def plain_rotation(x: Tensor, positions: Tensor, rotary: RotaryTable, weight: Tensor | None, eps: float) -> Tensor:
    """As transformers does it: angles in the model's dtype."""
    if weight is not None:
        x = torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    cos, sin = (torch.cat((t, t), -1)[positions][:, None].to(x.dtype) for t in (rotary.cos, rotary.sin))
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, -1)
    return torch.cat((turning * cos + torch.cat((-second, first), -1) * sin, rest), -1)


@dataclasses.dataclass
class Written:
    """What one call made of random heads."""

    q: Tensor
    keys: Tensor
    values: Tensor
    pool: Tensor


def run_rotation(
    rotate: object,
    qkv: Tensor,
    pool: Tensor,
    indices: tuple[Tensor, Tensor],
    angles: tuple[RotaryTable, HeadNorm | None],
) -> Written:
    positions, slots = indices
    q = rotate(qkv, positions, Rotation(*angles), pool[:, LAYER], slots)  # type: ignore[operator]
    block, token = slots // pool.shape[3], slots % pool.shape[3]
    return Written(q, pool[block, LAYER, 0, token], pool[block, LAYER, 1, token], pool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
@pytest.mark.parametrize(
    ("shape", "rotary_size", "normed"),
    [
        (Shape(1, 2, 64, 16), 64, False),
        (Shape(3, 3, 80, 16), 80, False),
        (Shape(4, 2, 128, 32), 128, True),
        (Shape(2, 1, 96, 16), 48, True),
        (Shape(16, 1, 256, 16), 64, False),
    ],
    ids=str,
)
def test_rotate_and_write_kv(
    reference: Backend,
    rng: torch.Generator,
    shape: Shape,
    rotary_size: int,
    normed: bool,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    if tokens == 300 and (not HAS_GPU and shape.group != 3):
        pytest.skip("once is enough for the interpreter")
    num_blocks, size = 330 // shape.block_size, shape.head_size
    qkv = torch.randn(tokens, (shape.num_heads + 2 * shape.num_kv_heads) * size, generator=rng).to(DEVICE, dtype)
    pool = torch.randn(num_blocks, 3, 2, shape.block_size, shape.num_kv_heads, size, generator=rng).to(DEVICE, dtype)
    positions = torch.randint(64, (tokens,), generator=rng).to(DEVICE)
    slots = torch.randperm(num_blocks * shape.block_size, generator=rng)[:tokens].to(DEVICE)
    weights = (torch.rand(2, size, generator=rng) + 0.5).to(DEVICE, dtype)
    angles = rotary_table(rotary_size), HeadNorm(weights[0], weights[1], 1e-6) if normed else None
    out = run_rotation(rotate_and_write_kv, qkv, pool.clone(), (positions, slots), angles)
    exact = run_rotation(reference.rotate_and_write_kv, qkv, pool.double(), (positions, slots), angles)
    counts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    heads = qkv.view(tokens, sum(counts), size).split(counts, 1)
    for got, wanted, plain, weight in zip((out.q, out.keys), (exact.q, exact.keys), heads[:2], weights, strict=True):
        own = plain_rotation(plain, positions, angles[0], weight if normed else None, 1e-6)
        assert_as_good_as_torch(got, wanted, own)
    assert torch.equal(out.values, heads[2])
    untouched = torch.ones(num_blocks * shape.block_size, dtype=torch.bool, device=DEVICE)
    untouched[slots] = False
    others = untouched.view(num_blocks, shape.block_size)
    assert torch.equal(out.pool[:, ::2], pool[:, ::2]), "another layer changed"
    assert torch.equal(out.pool[:, LAYER].transpose(1, 2)[others], pool[:, LAYER].transpose(1, 2)[others]), (
        "a slot that was not named changed"
    )


# ---- real shapes ----------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[1023, 1024, 1025, 17], [8191], [32768, 1, 30000], [700] * 64], ids=str)
@pytest.mark.parametrize("shape", [LLAMA_8B, Shape(7, 2, 64, 16), Shape(8, 4, 256, 32)], ids=str)
def test_decode_at_real_lengths(rng: torch.Generator, shape: Shape, lengths: list[int], dtype: torch.dtype) -> None:
    case = make_case(rng, shape, [1] * len(lengths), lengths, dtype, DEVICE)
    check_decode(case, case.plain(torch.float64))


@gpu
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1023, 1024, 1025, 1, 0, 63], [1023, 1024, 1025, 1, 9, 4000]),
        ([2049], [2049]),
        ([2048, 5], [8192, 32768]),
        ([2100], [8000]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    [LLAMA_8B, Shape(7, 2, 64, 16), Shape(7, 2, 64, 128), Shape(8, 1, 256, 32), Shape(2, 4, 80, 64)],
    ids=str,
)
def test_prefill_at_real_lengths(
    rng: torch.Generator, shape: Shape, query_lens: list[int], context_lens: list[int], dtype: torch.dtype
) -> None:
    case = make_case(rng, shape, query_lens, context_lens, dtype, DEVICE)
    exact = case.plain(torch.float64)
    check_prefill(case, exact)
    check_prefill(case, exact, prefill_config(case.layer, max(query_lens)))


@gpu
def test_blocks_beyond_two_to_the_31_elements(rng: torch.Generator) -> None:
    """The last blocks of a pool of 2.5e9 elements: read by both attentions, written by the rotation."""
    case = make_case(rng, LLAMA_8B, [1, 1], [1000, 129], torch.bfloat16, DEVICE)
    num_blocks, num_used = 600, case.pool.shape[0]
    pool = torch.full((num_blocks, 32, *case.pool.shape[2:]), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    pool[-num_used:, -1] = case.layer
    assert pool.numel() > 2**31
    batch = dataclasses.replace(case.batch, block_tables=case.batch.block_tables + (num_blocks - num_used))
    decode = decode_config(pool[:, -1], 2, 1000)
    prefill = prefill_config(pool[:, -1], 1)
    for run in (
        partial(decode_attention, config=decode),
        partial(decode_attention, config=dataclasses.replace(decode, tma=False)),
        partial(prefill_attention, config=None),
        partial(prefill_attention, config=prefill),
        partial(prefill_attention, config=dataclasses.replace(prefill, tma=False)),
    ):
        near = run(case.q, case.layer, case.batch, case.scale)
        assert torch.equal(run(case.q, pool[:, -1], batch, case.scale), near)
    qkv = torch.randn(2, 48 * 128, generator=rng).to(DEVICE, torch.bfloat16)
    slots = torch.tensor([num_blocks * 64 - 1, num_blocks * 64 - 64], device=DEVICE)
    rotate_and_write_kv(qkv, slots % 64, Rotation(rotary_table(128), None), pool[:, -1], slots)
    assert torch.equal(pool[-1, -1, 1, [63, 0]].flatten(1), qkv[:, -1024:])


@gpu
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("lengths", [[1024] * 64, [8192] * 3, [8000], [33]], ids=lambda x: f"{len(x)}x{x[0]}")
def test_decode_repeats_bit_for_bit(rng: torch.Generator, lengths: list[int], tma: bool) -> None:
    case = make_case(rng, LLAMA_8B, [1] * len(lengths), lengths, torch.bfloat16, DEVICE)
    config = dataclasses.replace(decode_config(case.layer, len(lengths), max(lengths)), tma=tma)
    first = decode_attention(case.q, case.layer, case.batch, case.scale, config)
    for _ in range(REPEATS):
        assert torch.equal(decode_attention(case.q, case.layer, case.batch, case.scale, config), first)


@gpu
@pytest.mark.parametrize("kernel", ["best", "boxes", "pointers"])
@pytest.mark.parametrize("query_lens", [[4096], [1000, 100, 1], [2500, 33]], ids=str)
def test_prefill_repeats_bit_for_bit(rng: torch.Generator, query_lens: list[int], kernel: str) -> None:
    case = make_case(rng, LLAMA_8B, query_lens, [length + 30 for length in query_lens], torch.bfloat16, DEVICE)
    boxes = prefill_config(case.layer, max(query_lens))
    pointers = dataclasses.replace(boxes, tma=False, max_registers=None)
    config = {"best": None, "boxes": boxes, "pointers": pointers}[kernel]
    first = prefill_attention(case.q, case.layer, case.batch, case.scale, config)
    for _ in range(REPEATS):
        assert torch.equal(prefill_attention(case.q, case.layer, case.batch, case.scale, config), first)


@gpu
@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_heads_norm_is_summed_alike_for_few_tokens_and_many(rng: torch.Generator, size: int) -> None:
    """Few tokens take one warp a program, many take four."""
    pool = torch.zeros(10, 3, 2, 64, 2, size, dtype=torch.bfloat16, device=DEVICE)
    qkv = torch.randn(300, 12 * size, generator=rng).to(DEVICE, torch.bfloat16)
    weights = (torch.rand(2, size, generator=rng) + 0.5).to(DEVICE, torch.bfloat16)
    rotation = Rotation(rotary_table(size), HeadNorm(weights[0], weights[1], 1e-6))
    positions, slots = torch.arange(300, device=DEVICE) % 64, torch.arange(300, device=DEVICE)
    whole = rotate_and_write_kv(qkv, positions, rotation, pool[:, LAYER], slots)
    for rows in (slice(0, 1), slice(3, 200)):
        part = rotate_and_write_kv(qkv[rows], positions[rows], rotation, pool[:, LAYER], slots[rows])
        assert torch.equal(part, whole[rows])


@gpu
@pytest.mark.parametrize("lengths", [[1025, 64], [700] * 40], ids=str)
def test_decode_in_a_captured_graph(rng: torch.Generator, lengths: list[int]) -> None:
    """Captured for the longest context; replayed with other lengths, blocks and queries in the same memory."""
    case = make_case(rng, LLAMA_8B, [1] * len(lengths), lengths, torch.bfloat16, DEVICE)
    other = [max(1, length // 2 + 3) for length in reversed(lengths)]
    config = decode_config(case.layer, len(lengths), max(lengths))
    decode_attention(case.q, case.layer, case.batch, case.scale, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(case.q, case.layer, case.batch, case.scale, config)
    for tables, context_lens in [(case.batch.block_tables, other), (case.batch.block_tables.flip(0), lengths[::-1])]:
        case.batch.block_tables.copy_(tables.clone())
        case.batch.context_lens.copy_(torch.tensor(context_lens))
        case.pool[:, LAYER] = torch.randn(case.layer.shape, generator=rng).to(DEVICE, torch.bfloat16)
        case.q.normal_()
        graph.replay()
        assert torch.equal(out, decode_attention(case.q, case.layer, case.batch, case.scale, config))
        assert_as_good_as_torch(out, case.plain(torch.float64), case.plain())
