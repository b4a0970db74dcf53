"""The same inputs give the same bits, every time: every kernel that ships, through the backends, at serving sizes.

A race shows up as bits that differ between repeats long before it shows up as an error. On a GPU each operation runs a
hundred times at the shape of Llama-3.1-8B, in bf16, with as many rows as steps and chunks have; interpreted, a tiny one
runs three times. The last test asks the profiler whether every kernel of the package was among them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import twostroke_kernels.gpu
from torch import Tensor
from twostroke_kernels.backend import (
    Backend,
    HeadNorm,
    KVItems,
    KVWire,
    PagedBatch,
    Penalties,
    RotaryTable,
    Rotation,
    RowNorm,
    SamplingRows,
)

from tests.kernels.test_sampling import make_rows
from tests.support.triton_device import DEVICE, HAS_GPU, assert_repeatable, gpu

from twostroke_kernels.gpu.decode_attention import decode_attention, decode_config  # isort: skip
from twostroke_kernels.gpu.fixed_gemm import fixed_linear  # isort: skip
from twostroke_kernels.gpu.prefill_attention import prefill_attention, prefill_config  # isort: skip
from twostroke_kernels.invariant_triton import InvariantTritonBackend  # isort: skip
from twostroke_kernels.triton_backend import TritonBackend  # isort: skip

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Model:
    """The shapes of a decoder."""

    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    vocabulary: int


MODEL = Model(4096, 14336, 32, 8, 128, 64, 128256) if HAS_GPU else Model(64, 48, 4, 2, 16, 16, 130)
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16
BACKENDS = {"usual": TritonBackend(DEVICE), "invariant": InvariantTritonBackend(DEVICE)}
ROWS = (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 300, 1024, 4096) if HAS_GPU else (1, 3)
Compute = Callable[[], Tensor | tuple[Tensor, ...]]

each_backend = pytest.mark.parametrize("name", BACKENDS)


@cache
def fixed(*shape: int, size: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    """The same random numbers whenever they are asked for; no one changes them."""
    rng = torch.Generator(DEVICE).manual_seed(sum(shape))
    return (size * torch.randn(shape, generator=rng, device=DEVICE)).to(dtype)


def whole(*shape: int, below: int) -> Tensor:
    rng = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randint(below, shape, generator=rng, device=DEVICE)


# ---- what runs -------------------------------------------------------------------------------------------------------


def products(backend: Backend, rows: int) -> dict[str, Compute]:
    """Every product of a layer, and the head."""
    norm = RowNorm(fixed(MODEL.hidden), 1e-5)
    qkv = (MODEL.num_heads + 2 * MODEL.num_kv_heads) * MODEL.head_size
    x, inner = fixed(rows, MODEL.hidden), fixed(rows, MODEL.inner)
    out_qkv, gate_up = fixed(qkv, MODEL.hidden, size=0.02), fixed(2 * MODEL.inner, MODEL.hidden, size=0.02)
    o, down = fixed(MODEL.hidden, MODEL.hidden, size=0.02), fixed(MODEL.hidden, MODEL.inner, size=0.02)

    def added(operand: Tensor, weight: Tensor) -> Tensor:
        residual = x.clone()
        backend.add_linear(residual, operand, weight)
        return residual

    head = min(rows, 256)
    return {
        "linear": lambda: backend.linear(x, out_qkv),
        "norm_linear": lambda: backend.norm_linear(x, norm, out_qkv, fixed(qkv)),
        "o": lambda: added(x, o),
        "norm_gated_linear": lambda: backend.norm_gated_linear(x, norm, gate_up),
        "down": lambda: added(inner, down),
        "norm_logits": lambda: backend.norm_logits(x[:head], norm, fixed(MODEL.vocabulary, MODEL.hidden, size=0.02)),
        "rms_norm": lambda: backend.rms_norm(x, norm.weight, norm.eps),
        "silu_mul": lambda: backend.silu_mul(fixed(rows, 2 * MODEL.inner)),
    }


def rotation(backend: Backend, rows: int, normed: bool) -> Compute:
    """The rotated queries and everything in the pool."""
    size, num_blocks = MODEL.head_size, -(-rows // MODEL.block_size) + 1
    qkv = fixed(rows, (MODEL.num_heads + 2 * MODEL.num_kv_heads) * size)
    pool = torch.zeros(num_blocks, 1, 2, MODEL.block_size, MODEL.num_kv_heads, size, dtype=DTYPE, device=DEVICE)
    slots = torch.arange(rows, device=DEVICE) + 3
    table = RotaryTable(fixed(64, size // 2, dtype=torch.float32), fixed(65, size // 2, dtype=torch.float32)[:64])
    head_norm = HeadNorm(fixed(size), fixed(size + 1)[:size], 1e-6) if normed else None

    def rotated() -> tuple[Tensor, Tensor]:
        pool.zero_()
        q = backend.rotate_and_write_kv(qkv, slots % 64, Rotation(table, head_norm), pool[:, 0], slots)
        return q, pool

    return rotated


def paged(query_lens: list[int], context_lens: list[int]) -> tuple[Tensor, Tensor, PagedBatch]:
    """Queries, one layer of a pool, and the batch."""
    size = MODEL.block_size
    counts = [-(-length // size) for length in context_lens]
    ids = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).split(counts)
    tables = torch.stack([torch.cat((row, row[:1].expand(max(counts) - len(row)))) for row in ids]).to(DEVICE)
    pool = fixed(sum(counts), 1, 2, size, MODEL.num_kv_heads, MODEL.head_size)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(DEVICE)
    lengths = torch.tensor(context_lens, device=DEVICE)
    q = fixed(sum(query_lens), MODEL.num_heads, MODEL.head_size)
    return q, pool[:, 0], PagedBatch(tables, starts, lengths, max(query_lens), max(context_lens))


def sampling_rows(num_rows: int, num_logprobs: int, **fields: object) -> SamplingRows:
    made = make_rows(num_rows, num_logprobs, position=torch.arange(num_rows) + 9, **fields)
    tensors = [field for field in made.__slots__ if field not in ("all_greedy", "num_logprobs")]
    columns = {field: getattr(made, field).to(DEVICE) for field in tensors}
    return SamplingRows(all_greedy=made.all_greedy, num_logprobs=num_logprobs, **columns)


def sampling(backend: Backend, num_rows: int, num_logprobs: int, **fields: object) -> Compute:
    """Everything that is said of the chosen tokens."""
    logits = fixed(num_rows, MODEL.vocabulary, size=3.0, dtype=torch.float32)
    rows = sampling_rows(num_rows, num_logprobs, **fields)

    def sampled() -> tuple[Tensor, ...]:
        out = backend.sample(logits, logits, rows)
        return out.token_ids, out.logprobs, out.top_ids, out.top_logprobs, out.finite

    return sampled


def penalties(backend: Backend, num_rows: int) -> Compute:
    """A few hundred cells in each row."""
    each = min(300, MODEL.vocabulary)
    tokens = torch.rand(num_rows, MODEL.vocabulary, device=DEVICE).topk(each).indices.flatten()
    rows = torch.arange(num_rows, device=DEVICE).repeat_interleave(each)
    cells = Penalties(rows, tokens, torch.full_like(rows, 2).float(), 0.1 * torch.ones_like(rows).float())
    logits = fixed(num_rows, MODEL.vocabulary, dtype=torch.float32)

    def penalized() -> Tensor:
        changed = logits.clone()
        backend.penalize(changed, cells)
        return changed

    return penalized


def blocks(backend: Backend, count: int) -> dict[str, Compute]:
    """What moves whole blocks."""
    shape = (2 * count, 3, 2, MODEL.block_size, MODEL.num_kv_heads, MODEL.head_size)
    pool, ids = fixed(*shape), whole(2 * count, below=1 << 20).argsort()
    wire = KVWire(MODEL.block_size, pool.dtype)
    segment, _ = backend.pack_kv(pool, ids[:count], 1, 2, wire)
    int8 = KVWire(MODEL.block_size, torch.int8)
    small, _ = backend.pack_kv(pool, ids[:count], 1, 2, int8)

    def changed(change: Callable[[Tensor], None]) -> Tensor:
        copy = pool.clone()
        change(copy)
        return copy

    def pushed(target: Tensor) -> None:
        backend.push_kv(KVItems(pool, ids[:count]), KVItems(target, ids[count:]), 1, 2, wire)

    return {
        "push": lambda: changed(pushed),
        "digest in place": lambda: backend.digest_kv(KVItems(pool, ids), 1, 2, wire),
        "pack": lambda: backend.pack_kv(pool, ids[:count], 1, 2, wire),
        "digest": lambda: backend.digest(segment),
        "unpack": lambda: changed(lambda copy: backend.unpack_kv(copy, ids[count:], 1, segment, wire)),
        "pack int8": lambda: backend.pack_kv(pool, ids[:count], 1, 2, int8),
        "unpack int8": lambda: changed(lambda copy: backend.unpack_kv(copy, ids[count:], 1, small, int8)),
        "copy": lambda: changed(lambda copy: backend.copy_blocks(copy, ids[:count], ids[count:])),
    }


PROMPTS = [([1000, 100, 1, 64], [1000, 130, 1, 3000]), ([5000], [5000])] if HAS_GPU else [([17, 1, 5], [17, 9, 40])]
CONTEXTS = (
    [[1024], [8192], [32768, 1, 17], [1060] * 4, [1060] * 64, [1060] * 256, [8192] * 16] if HAS_GPU else [[17, 1], [40]]
)
FILTERS = [
    {"temperature": 0.0},
    {},
    {"top_p": 0.9},
    {"top_k": 40},
    {"top_k": 20, "top_p": 0.8},
    {"min_p": 0.05},
]

# ---- the repeats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@each_backend
def test_products(name: str, rows: int) -> None:
    for compute in products(BACKENDS[name], rows).values():
        assert_repeatable(compute)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", (1, 8, 64, 300, 4096) if HAS_GPU else (1, 5))
@each_backend
def test_rotation(name: str, rows: int, normed: bool) -> None:
    assert_repeatable(rotation(BACKENDS[name], rows, normed))


@pytest.mark.parametrize("lengths", PROMPTS, ids=str)
@each_backend
def test_prefill_attention(name: str, lengths: tuple[list[int], list[int]]) -> None:
    q, layer, batch = paged(*lengths)
    assert_repeatable(lambda: BACKENDS[name].prefill_attention(q, layer, batch, 0.09))


@pytest.mark.parametrize("context_lens", CONTEXTS, ids=lambda lengths: f"{len(lengths)}x{lengths[0]}")
@each_backend
def test_decode_attention(name: str, context_lens: list[int]) -> None:
    q, layer, batch = paged([1] * len(context_lens), context_lens)
    assert_repeatable(lambda: BACKENDS[name].decode_attention(q, layer, batch, 0.09))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("num_logprobs", [-1, 5])
def test_sampling(filters: dict[str, float], num_logprobs: int) -> None:
    for num_rows in (1, 64, 256) if HAS_GPU else (2,):
        assert_repeatable(sampling(BACKENDS["usual"], num_rows, num_logprobs, **filters))


def test_penalties() -> None:
    assert_repeatable(penalties(BACKENDS["usual"], 64 if HAS_GPU else 2))


@pytest.mark.parametrize("count", (1, 64) if HAS_GPU else (2,))
def test_blocks(count: int) -> None:
    for compute in blocks(BACKENDS["usual"], count).values():
        assert_repeatable(compute)


@gpu
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_what_others_ask_for_changes_no_token(filters: dict[str, float]) -> None:
    """Logprobs are asked for by a batch, and change which kernels run; greedy rows may stand beside drawn ones."""
    backend = BACKENDS["usual"]
    tokens = [sampling(backend, 256, count, **filters)()[0] for count in (-1, 0, 1, 20, 100)]
    assert all(torch.equal(other, tokens[0]) for other in tokens)
    if filters.get("temperature") == 0.0:
        mixed = {"temperature": [1.0] + [0.0] * 255}
        assert torch.equal(sampling(backend, 256, -1, **mixed)()[0][1:], tokens[0][1:])


# ---- nothing is left out ---------------------------------------------------------------------------------------------


def entry_kernels() -> set[str]:
    """Names of the package's compiled functions that no other one calls."""
    folder = Path(next(iter(twostroke_kernels.gpu.__path__)))
    trees = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}
    compiled, called = set(), set()
    for module, tree in trees.items():
        origin = {
            alias.name: (node.module or "").rpartition(".")[2]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef) and is_compiled(node)):
            compiled.add((module, function.name))
            names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            called |= {(origin.get(name, module), name) for name in names}
    return {name for _, name in compiled - called}


def is_compiled(function: ast.FunctionDef) -> bool:
    return any(re.match(r"(triton|gluon)\.jit\b", ast.unparse(decorator)) for decorator in function.decorator_list)


def test_kernels_are_found_in_the_source() -> None:
    found = entry_kernels()
    assert {"gemv_rows", "rotate_heads", "read_chunk", "list_row", "gather_words", "attend"} <= found
    assert found.isdisjoint({"with_noise", "choose_filtered", "soften"})


def everything() -> list[Compute]:
    """Each operation at a small, a middling and a large size."""
    computes: list[Compute] = []
    for backend in BACKENDS.values():
        for rows in (1, 16, 48, 1024):
            computes += [*products(backend, rows).values(), rotation(backend, rows, normed=False)]
        prompts, contexts = paged(*PROMPTS[0]), paged([1, 1], [3000, 40])
        computes.append(lambda backend=backend, case=prompts: backend.prefill_attention(*case, 0.09))
        computes.append(lambda backend=backend, case=contexts: backend.decode_attention(*case, 0.09))
    q, layer, batch = paged(*PROMPTS[0])
    computes.append(lambda: prefill_attention(q, layer, batch, 0.09, prefill_config(layer, 64)))
    weight = fixed(MODEL.hidden, MODEL.hidden, size=0.02)
    computes.append(lambda: fixed_linear(fixed(48, MODEL.hidden), weight, None))
    usual = BACKENDS["usual"]
    computes += [sampling(usual, 4, 5), penalties(usual, 4), *blocks(usual, 2).values()]
    return computes


@gpu
def test_every_kernel_of_the_package_is_among_them() -> None:
    """Those too that Hopper runs only for shapes that its own do not take."""
    computes = everything()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for compute in computes:  # compiled outside of the profile
        compute()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for compute in computes:
            compute()
        torch.cuda.synchronize()
    ran = {event.name for event in profile.events()}
    assert entry_kernels() - ran == set()


@gpu
def test_plain_attention_repeats_where_hoppers_does_not_serve() -> None:
    """Other configs that ship: pointers instead of boxes, and the plain prefill kernel at both sizes of tile."""
    q, layer, batch = paged(*PROMPTS[0])
    for longest in (64, 4096):
        config = prefill_config(layer, longest)
        assert_repeatable(lambda config=config: prefill_attention(q, layer, batch, 0.09, config))
    contexts = paged([1] * 3, [8192, 1000, 1])
    config = decode_config(contexts[1], 3, 8192)
    assert_repeatable(lambda: decode_attention(*contexts, 0.09, config))
