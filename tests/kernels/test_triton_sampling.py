"""Sampling and penalties in Triton: the same choices as the reference and as PyTorch make with the same noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from twostroke_kernels.backend import Backend, Penalties, SampledRows, SamplingRows
from twostroke_kernels.reference import passing
from twostroke_kernels.torch_backend import TorchBackend

from tests.kernels.test_sampling import make_rows, model_like, take
from tests.support.triton_device import DEVICE, HAS_GPU, assert_repeatable, gpu

from twostroke_kernels.gpu.sampling import best_ids  # isort: skip
from twostroke_kernels.triton_backend import TritonBackend  # isort: skip

pytestmark = pytest.mark.slow  # interpreted, they take half a minute
BACKEND, PLAIN = TritonBackend(DEVICE), TorchBackend(DEVICE)


def on_device(rows: SamplingRows) -> SamplingRows:
    moved = {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}
    return SamplingRows(**{name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in moved.items()})


def draw(logits: Tensor, **fields: Any) -> SampledRows:
    logits = logits.to(DEVICE)
    return BACKEND.sample(logits, logits, on_device(make_rows(logits.shape[0], **fields)))


def of_every_kind(rng: torch.Generator, num_rows: int, num_logprobs: int = -1) -> SamplingRows:
    """Every filter alone and together, with greedy rows among them, each row with its own key."""
    rows = make_rows(
        num_rows,
        num_logprobs=num_logprobs,
        temperature=([0.0, 0.7, 1.0, 3.0] * num_rows)[:num_rows],
        top_k=([0, 5, 0, 1, 40, 2000] * num_rows)[:num_rows],
        top_p=([1.0, 0.9, 0.3, 1.0, 0.0] * num_rows)[:num_rows],
        min_p=([0.0, 0.0, 0.05] * num_rows)[:num_rows],
        seed=torch.randint(-(1 << 62), 1 << 62, (num_rows,), generator=rng),
        choice=torch.arange(num_rows) % 3,
        position=torch.arange(num_rows) * 100,
    )
    return on_device(rows)


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 1001, 9001])
def test_choices_are_those_of_the_reference(rng: torch.Generator, reference: Backend, vocabulary: int) -> None:
    num_rows = 60 if vocabulary < 9000 else 12
    logits = model_like(rng, num_rows, vocabulary).to(DEVICE)
    rows = of_every_kind(rng, num_rows, num_logprobs=3)
    out, expected = (b.sample(logits, logits, rows) for b in (BACKEND, reference))
    assert out.token_ids.tolist() == expected.token_ids.tolist()
    assert out.top_ids.tolist() == expected.top_ids.tolist()
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.top_logprobs, expected.top_logprobs, rtol=1e-5, atol=1e-5)
    assert out.finite.all()


@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 9000])
def test_greedy_takes_the_smaller_of_equals(rng: torch.Generator, vocabulary: int) -> None:
    logits = torch.randint(4, (20, vocabulary), generator=rng).float()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert draw(logits, temperature=0.0).token_ids.tolist() == expected
    assert draw(logits, temperature=[1.0] + [0.0] * 19).token_ids.tolist()[1:] == expected[1:]
    assert draw(logits, top_k=1).token_ids.tolist() == expected
    assert draw(logits, top_p=0.0).token_ids.tolist() == expected


def test_no_rows() -> None:
    for temperature in (0.0, 1.0):
        sampled = draw(torch.zeros(0, 384), num_logprobs=2, temperature=temperature)
        assert sampled.token_ids.shape == (0,)
        assert sampled.top_ids.shape == sampled.top_logprobs.shape == (0, 2)


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.6},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.3},
        {"top_k": 100},
        {"min_p": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_filters_let_exactly_their_set_pass(rng: torch.Generator, filters: dict[str, Any], tied: bool) -> None:
    """Over many positions no other token than those of the brute-force set appears; over very many, each does."""
    num_rows = 3000 if HAS_GPU else 40
    logits = torch.randn(12, generator=rng)
    logits = logits.round() if tied else logits
    top_k, top_p, min_p = filters.get("top_k", 0), filters.get("top_p", 1.0), min(1.0, filters.get("min_p", 0))
    expected = set(passing(logits.double(), top_k, top_p, min_p))
    ids = draw(logits.expand(num_rows, 12).contiguous(), position=torch.arange(num_rows), **filters).token_ids
    assert set(ids.tolist()) <= expected
    assert not HAS_GPU or set(ids.tolist()) == expected


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.2}, {"top_k": 5, "top_p": 0.5}], ids=str)
def test_equal_logits(reference: Backend, filters: dict[str, Any]) -> None:
    """No logit tells tokens apart: every cut is by id."""
    logits = torch.zeros(20, 700, device=DEVICE)
    rows = on_device(make_rows(20, position=torch.arange(20), **filters))
    assert torch.equal(BACKEND.sample(logits, logits, rows).token_ids, reference.sample(logits, logits, rows).token_ids)


def test_a_row_s_token_does_not_depend_on_its_batch(rng: torch.Generator) -> None:
    logits, rows = model_like(rng, 16, 1003).to(DEVICE), of_every_kind(rng, 16)
    together = BACKEND.sample(logits, logits, rows).token_ids
    for row in range(16):
        alone, key = logits[row : row + 1], take(rows, torch.tensor([row], device=DEVICE))
        assert BACKEND.sample(alone, alone, key).token_ids == together[row]


def test_logprobs_are_of_the_raw_logits(rng: torch.Generator) -> None:
    raw = model_like(rng, 6, 300).to(DEVICE)
    changed = raw.clone()
    changed[:, :150] = -math.inf
    out = BACKEND.sample(raw, changed, on_device(make_rows(6, num_logprobs=20, temperature=0.3, top_k=3)))
    exact = raw.double().log_softmax(-1)
    assert (out.token_ids >= 150).all()
    torch.testing.assert_close(out.logprobs.double(), exact.gather(1, out.token_ids[:, None])[:, 0], rtol=0, atol=1e-5)
    order = torch.sort(raw, dim=-1, descending=True, stable=True).indices[:, :20]
    assert torch.equal(out.top_ids, order)
    torch.testing.assert_close(out.top_logprobs.double(), exact.gather(1, order), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("asked", "shape"), [(-1, 0), (0, 0), (2, 2)])
def test_logprobs_only_where_asked_for(rng: torch.Generator, asked: int, shape: int) -> None:
    out = draw(model_like(rng, 3, 50), num_logprobs=asked, temperature=0.0)
    assert out.top_ids.shape == out.top_logprobs.shape == (3, shape)
    assert bool((out.logprobs == 0).all()) == (asked < 0)


def test_best_ids_of_both_zeros() -> None:
    logits = torch.tensor([[-0.0, 0.0, -1.0, -2.0, 1.0]], device=DEVICE)
    assert best_ids(logits, 5).tolist() == [[4, 0, 1, 2, 3]]
    assert draw(logits, num_logprobs=5, temperature=0.0).top_ids.tolist() == [[4, 0, 1, 2, 3]]


def check_likeliest(logits: Tensor, count: int) -> None:
    out = draw(logits, num_logprobs=count, temperature=0.0)
    order = torch.sort(logits.to(DEVICE), dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(out.top_ids, order)
    exact = logits.to(DEVICE).double().log_softmax(-1).gather(1, order)
    torch.testing.assert_close(out.top_logprobs.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 20, 64, 65])
@pytest.mark.parametrize("vocabulary", [65, 1500, 9001])
def test_likeliest(rng: torch.Generator, vocabulary: int, count: int) -> None:
    """By rounds and by a sort; the best ones all in one stretch, spread, and equal to each other."""
    logits = model_like(rng, 4, vocabulary)
    logits[1] = -logits[1].abs() - 1
    logits[2] = torch.arange(vocabulary) / vocabulary
    logits[3] = torch.randint(3, (vocabulary,), generator=rng).float()
    check_likeliest(logits, count)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_logprobs", [-1, 3])
@pytest.mark.parametrize("filters", [{}, {"top_k": 9}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_non_finite_rows_are_named_and_leave_others_alone(
    rng: torch.Generator, temperature: float, num_logprobs: int, filters: dict[str, Any]
) -> None:
    fields = {"num_logprobs": num_logprobs, "temperature": temperature, **filters}
    logits = model_like(rng, 7, 400)
    good = draw(logits, **fields)
    bad = logits.clone()
    bad[1, 399], bad[2, 0], bad[3, 7], bad[5], bad[6] = math.nan, math.inf, -math.inf, math.nan, -math.inf
    out = draw(bad, **fields)
    assert out.finite.tolist() == [True, False, False, False, True, False, False]
    assert good.finite.all()
    assert ((out.token_ids >= 0) & (out.token_ids < 400)).all()
    assert ((out.top_ids >= 0) & (out.top_ids < 400)).all()
    for row in (0, 4):
        assert out.token_ids[row] == good.token_ids[row]
        assert torch.equal(out.top_ids[row], good.top_ids[row])


def test_a_large_finite_row_is_finite() -> None:
    assert draw(torch.full((1, 400), 3e38), temperature=0.0).finite.all()
    assert draw(torch.full((1, 400), 3e38), temperature=1e-3, top_p=0.5).finite.all()


def test_a_masked_token_is_never_chosen() -> None:
    logits = torch.zeros(60, 8)
    logits[:, [0, 3, 7]] = -math.inf
    for filters in ({}, {"top_k": 7}, {"top_k": 7, "top_p": 0.99}):
        ids = draw(logits, position=torch.arange(60), **filters).token_ids
        assert set(ids.tolist()) == {1, 2, 4, 5, 6}


def test_inputs_are_left_alone(rng: torch.Generator) -> None:
    logits, rows = model_like(rng, 12, 400).to(DEVICE), of_every_kind(rng, 12, 3)
    before = logits.clone()
    BACKEND.sample(logits, logits, rows)
    assert torch.equal(logits, before)


def test_rows_of_a_wider_tensor(rng: torch.Generator) -> None:
    wide, rows = model_like(rng, 12, 900).to(DEVICE), of_every_kind(rng, 12, 3)
    part = wide[:, 13:713]
    views, copies = BACKEND.sample(part, part, rows), BACKEND.sample(part.clone(), part.clone(), rows)
    assert torch.equal(views.token_ids, copies.token_ids)
    assert torch.equal(views.logprobs, copies.logprobs)


def test_penalize(rng: torch.Generator, reference: Backend) -> None:
    logits = torch.randn(4, 150, generator=rng).to(DEVICE)
    cells = torch.randperm(600, generator=rng)[:300].to(DEVICE)
    factors, less = (0.5 + 2 * torch.rand(300, generator=rng)).to(DEVICE), torch.randn(300, generator=rng).to(DEVICE)
    penalties = Penalties(cells // 150, cells % 150, factors, less)
    penalties.subtract[:5] = math.inf
    out, exact = logits.clone(), logits.double()
    BACKEND.penalize(out, penalties)
    reference.penalize(exact, penalties)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    assert (out.view(-1)[cells[:5]] == -math.inf).all()
    untouched = torch.ones(600, dtype=torch.bool, device=DEVICE)
    untouched[cells] = False
    assert torch.equal(out.view(-1)[untouched], logits.view(-1)[untouched])


def test_no_penalties() -> None:
    logits, none = torch.ones(2, 3, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    BACKEND.penalize(logits, Penalties(none, none, none.float(), none.float()))
    assert (logits == 1).all()


def test_repeatable(rng: torch.Generator) -> None:
    logits, rows = model_like(rng, 12, 5000).to(DEVICE), of_every_kind(rng, 12, 3)

    def all_of_it() -> tuple[Tensor, ...]:
        out = BACKEND.sample(logits, logits, rows)
        return out.token_ids, out.logprobs, out.top_ids, out.top_logprobs

    assert_repeatable(all_of_it)


@gpu
@pytest.mark.parametrize("size", [3.0, 0.3], ids=["peaked", "flat"])
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_p": 0.9}, {"top_k": 40}, {"top_k": 20, "top_p": 0.8}, {"min_p": 0.05}, {"top_k": 1000, "top_p": 0.5}],
    ids=str,
)
def test_real_vocabulary_chooses_as_pytorch_does(rng: torch.Generator, size: float, filters: dict[str, Any]) -> None:
    """Another order of sums or another logarithm may turn a near tie: at most one row in a thousand."""
    same, num_rows = 0, 256
    for round_ in range(4):
        logits = size * torch.randn(num_rows, 128256, device=DEVICE).bfloat16().float()
        keys = {"seed": torch.randint(1 << 62, (num_rows,), generator=rng), "position": torch.arange(num_rows) + round_}
        rows = on_device(make_rows(num_rows, temperature=0.8, **keys, **filters))
        out, expected = (b.sample(logits, logits, rows).token_ids for b in (BACKEND, PLAIN))
        same += int((out == expected).sum())
    assert same >= 0.999 * 4 * num_rows


@gpu
@pytest.mark.parametrize("count", [1, 5, 20])
def test_likeliest_of_a_real_vocabulary(rng: torch.Generator, count: int) -> None:
    check_likeliest(model_like(rng, 64, 128256), count)


@gpu
def test_captured_in_a_graph(rng: torch.Generator) -> None:
    logits, rows = model_like(rng, 12, 128256).to(DEVICE), of_every_kind(rng, 12, 5)
    expected = BACKEND.sample(logits, logits, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = BACKEND.sample(logits, logits, rows)
    for _ in range(100):
        graph.replay()
        assert torch.equal(out.token_ids, expected.token_ids)
        assert torch.equal(out.top_ids, expected.top_ids)
        assert torch.equal(out.logprobs, expected.logprobs)
