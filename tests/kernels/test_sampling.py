"""Penalties, filters, noise and logprobs of sampling."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from twostroke_kernels.backend import Backend, Penalties, SamplingRows
from twostroke_kernels.reference import passing
from twostroke_kernels.torch_sampling import first_argmax

INT_FIELDS = ("top_k", "seed", "choice", "position")
DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
DEFAULTS |= {"seed": 1, "choice": 0, "position": 5}


def make_rows(num_rows: int, num_logprobs: int = -1, **fields: Any) -> SamplingRows:
    """Fields are one value for all rows, or one a row."""
    columns = {}
    for name, default in DEFAULTS.items():
        dtype = torch.int64 if name in INT_FIELDS else torch.float32
        value = torch.as_tensor(fields.get(name, default), dtype=dtype)
        columns[name] = value.expand(num_rows).clone()
    all_greedy = bool((columns["temperature"] == 0).all())
    return SamplingRows(all_greedy=all_greedy, num_logprobs=num_logprobs, **columns)


def draw(backend: Backend, logits: Tensor, **fields: Any) -> Tensor:
    return backend.sample(logits, logits, make_rows(logits.shape[0], **fields)).token_ids


def model_like(rng: torch.Generator, num_rows: int, vocabulary: int) -> Tensor:
    """Logits in bfloat16 steps, so with ties, as a model gives them."""
    return (3 * torch.randn(num_rows, vocabulary, generator=rng)).bfloat16().float()


@pytest.mark.parametrize("vocabulary", [1, 7, 192, 384, 1000])
def test_greedy_takes_the_smaller_of_equals(backend: Backend, rng: torch.Generator, vocabulary: int) -> None:
    logits = torch.randint(4, (50, vocabulary), generator=rng).float()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert draw(backend, logits, temperature=0.0).tolist() == expected
    assert first_argmax(logits).tolist() == expected
    assert draw(backend, logits, temperature=[1.0] + [0.0] * 49).tolist()[1:] == expected[1:]
    assert draw(backend, logits, top_k=1).tolist() == expected


def test_no_rows(backend: Backend) -> None:
    for temperature in (0.0, 1.0):
        sampled = backend.sample(torch.zeros(0, 384), torch.zeros(0, 384), make_rows(0, 2, temperature=temperature))
        assert sampled.token_ids.shape == (0,)
        assert sampled.top_ids.shape == (0, 2)


@pytest.mark.parametrize("vocabulary", [5, 64, 1001])
def test_choices_are_those_of_the_reference(
    backend: Backend, reference: Backend, rng: torch.Generator, vocabulary: int
) -> None:
    """Every filter alone and together, with greedy rows among them, each row with its own key."""
    num_rows = 24
    logits = model_like(rng, num_rows, vocabulary)
    rows = make_rows(
        num_rows,
        num_logprobs=3,
        temperature=([0.0, 0.7, 1.0, 3.0] * num_rows)[:num_rows],
        top_k=([0, 5, 0, 1, 40, 2000] * num_rows)[:num_rows],
        top_p=([1.0, 0.9, 0.3, 1.0, 0.0] * num_rows)[:num_rows],
        min_p=([0.0, 0.0, 0.05] * num_rows)[:num_rows],
        seed=torch.randint(-(1 << 62), 1 << 62, (num_rows,), generator=rng),
        choice=torch.arange(num_rows) % 3,
        position=torch.arange(num_rows) * 100,
    )
    out, expected = (b.sample(logits, logits, rows) for b in (backend, reference))
    assert out.token_ids.tolist() == expected.token_ids.tolist()
    assert out.top_ids.tolist() == expected.top_ids.tolist()
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.top_logprobs, expected.top_logprobs, rtol=1e-5, atol=1e-5)
    assert out.finite.all()


def test_a_wide_vocabulary_in_the_reference_s_way(backend: Backend, reference: Backend, rng: torch.Generator) -> None:
    """Nearly flat logits: top-p reaches beyond the likeliest that are looked at first."""
    logits = torch.cat((model_like(rng, 2, 20_000), 0.01 * model_like(rng, 2, 20_000)))
    rows = make_rows(4, top_p=[0.95, 1.0, 0.6, 1.0], seed=[1, 2, 3, 4])
    out, expected = (b.sample(logits, logits, rows).token_ids for b in (backend, reference))
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.6},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.3},
        {"top_p": 0.0},
        {"top_k": 100},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_filters_let_exactly_their_set_pass(
    backend: Backend, rng: torch.Generator, filters: dict[str, Any], tied: bool
) -> None:
    """Over many positions every token of the brute-force set appears and no other does."""
    logits = torch.randn(12, generator=rng)
    logits = logits.round() if tied else logits
    expected = set(
        passing(logits.double(), filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0))
    )
    num_rows = 3000
    ids = draw(backend, logits.expand(num_rows, 12), position=torch.arange(num_rows), **filters)
    assert set(ids.tolist()) == expected


def test_brute_force_sets_by_hand() -> None:
    """`passing` itself, on probabilities 0.4, 0.3, 0.2, 0.1 and on ties."""
    scaled = torch.tensor([0.2, 0.4, 0.1, 0.3], dtype=torch.float64).log()
    assert passing(scaled, 0, 0.65, 0) == [1, 3]
    assert passing(scaled, 0, 0.75, 0) == [1, 3, 0]
    assert passing(scaled, 2, 0.55, 0) == [1]  # 4/7 of what top-k left
    assert passing(scaled, 0, 1.0, 0.6) == [1, 3]
    assert passing(scaled, 0, 0.0, 0) == [1]
    assert passing(torch.zeros(6, dtype=torch.float64), 2, 1.0, 0) == [0, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution(backend: Backend, temperature: float) -> None:
    """Chi-square over 20,000 positions, 7 degrees of freedom: 24.3 is the 0.1 % point. The draw is deterministic."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -1.0, -2.0, 1.5])
    count = 20_000
    ids = draw(backend, logits.expand(count, 8), position=torch.arange(count), temperature=temperature, seed=99)
    expected = (logits / temperature).double().softmax(0) * count
    chi_square = float(((ids.bincount(minlength=8) - expected).square() / expected).sum())
    assert chi_square < 24.3


@pytest.mark.parametrize("field", ["seed", "choice", "position"])
def test_neighbouring_keys_are_independent(backend: Backend, field: str) -> None:
    """Of two fair draws with neighbouring keys, one in 16 is equal: 4,000 pairs within 4 standard deviations."""
    count = 4000
    logits = torch.zeros(count, 16)
    key = {"position": 3, "seed": 17, "choice": 1, field: torch.arange(count)}
    first = draw(backend, logits, **key)
    second = draw(backend, logits, **(key | {field: torch.arange(count) + 1}))
    equal = int((first == second).sum())
    assert abs(equal - count / 16) < 4 * math.sqrt(count * 15 / 256)


def test_the_high_half_of_the_seed_counts(backend: Backend) -> None:
    logits = torch.zeros(64, 1000)
    low = draw(backend, logits, seed=torch.arange(64))
    high = draw(backend, logits, seed=torch.arange(64) + (1 << 40))
    assert int((low == high).sum()) < 5


def test_a_row_s_token_does_not_depend_on_its_batch(backend: Backend, rng: torch.Generator) -> None:
    num_rows = 16
    logits = model_like(rng, num_rows, 1003)
    rows = make_rows(
        num_rows,
        temperature=[0.0, 0.7, 1.0, 1.5] * 4,
        top_k=[0, 0, 20, 0] * 4,
        top_p=[1.0, 0.8, 1.0, 1.0] * 4,
        seed=torch.arange(num_rows),
        position=torch.arange(num_rows) + 10,
    )
    together = backend.sample(logits, logits, rows).token_ids
    order = torch.randperm(num_rows, generator=rng)
    assert torch.equal(backend.sample(logits[order], logits[order], take(rows, order)).token_ids, together[order])
    alone = [backend.sample(logits[[i]], logits[[i]], take(rows, torch.tensor([i]))).token_ids for i in range(num_rows)]
    assert torch.equal(torch.cat(alone), together)


def take(rows: SamplingRows, order: Tensor) -> SamplingRows:
    picked = {name: getattr(rows, name)[order] for name in DEFAULTS}
    return dataclasses.replace(rows, **picked, all_greedy=bool((picked["temperature"] == 0).all()))


def test_logprobs_are_of_the_raw_logits(backend: Backend, rng: torch.Generator) -> None:
    raw = model_like(rng, 6, 300)
    changed = raw.clone()
    changed[:, :150] = -math.inf
    out = backend.sample(raw, changed, make_rows(6, num_logprobs=20, temperature=0.3, top_k=3))
    exact = raw.double().log_softmax(-1)
    assert (out.token_ids >= 150).all()
    torch.testing.assert_close(out.logprobs.double(), exact.gather(1, out.token_ids[:, None])[:, 0], rtol=0, atol=1e-5)
    order = torch.sort(raw, dim=-1, descending=True, stable=True).indices[:, :20]
    assert torch.equal(out.top_ids, order)
    torch.testing.assert_close(out.top_logprobs.double(), exact.gather(1, order), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("asked", "shape"), [(-1, 0), (0, 0), (2, 2)])
def test_logprobs_only_where_asked_for(backend: Backend, rng: torch.Generator, asked: int, shape: int) -> None:
    logits = model_like(rng, 3, 50)
    out = backend.sample(logits, logits, make_rows(3, num_logprobs=asked, temperature=0.0))
    assert out.top_ids.shape == out.top_logprobs.shape == (3, shape)
    assert bool((out.logprobs == 0).all()) == (asked < 0)
    assert out.logprobs.dtype == out.top_logprobs.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_logprobs", [-1, 3])
def test_non_finite_rows_are_named_and_leave_others_alone(
    backend: Backend, rng: torch.Generator, temperature: float, num_logprobs: int
) -> None:
    logits = model_like(rng, 5, 400)
    good = backend.sample(logits, logits, make_rows(5, num_logprobs, temperature=temperature, top_k=9))
    bad = logits.clone()
    bad[1, 399], bad[2, 0], bad[3, 7] = math.nan, math.inf, -math.inf
    out = backend.sample(bad, bad, make_rows(5, num_logprobs, temperature=temperature, top_k=9))
    assert out.finite.tolist() == [True, False, False, False, True]
    assert good.finite.all()
    assert ((out.token_ids >= 0) & (out.token_ids < 400)).all()
    for row in (0, 4):
        assert out.token_ids[row] == good.token_ids[row]
        assert torch.equal(out.top_ids[row], good.top_ids[row])


def test_a_large_finite_row_is_finite(backend: Backend) -> None:
    logits = torch.full((1, 400), 3e38)
    assert backend.sample(logits, logits, make_rows(1, temperature=0.0)).finite.all()


def test_penalize(backend: Backend, reference: Backend, rng: torch.Generator) -> None:
    logits = torch.randn(4, 50, generator=rng)
    cells = torch.randperm(200, generator=rng)[:60]
    penalties = Penalties(
        cells // 50, cells % 50, 0.5 + 2 * torch.rand(60, generator=rng), torch.randn(60, generator=rng)
    )
    penalties.subtract[:5] = math.inf
    out, exact = logits.clone(), logits.double()
    backend.penalize(out, penalties)
    reference.penalize(exact, penalties)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    assert (out.view(-1)[cells[:5]] == -math.inf).all()
    untouched = torch.ones(200, dtype=torch.bool)
    untouched[cells] = False
    assert torch.equal(out.view(-1)[untouched], logits.view(-1)[untouched])


def test_penalize_by_hand(backend: Backend) -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    zero = torch.tensor([0, 0])
    backend.penalize(logits, Penalties(zero, torch.tensor([0, 1]), torch.tensor([2.0, 2.0]), torch.tensor([0.5, -1.0])))
    assert logits.tolist() == [[0.5, -3.0, 1.0]]
    none = torch.zeros(0, dtype=torch.int64)
    backend.penalize(logits, Penalties(none, none, torch.zeros(0), torch.zeros(0)))
    assert logits.tolist() == [[0.5, -3.0, 1.0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_masked_token_is_never_chosen(backend: Backend, temperature: float) -> None:
    logits = torch.zeros(500, 8)
    logits[:, [0, 3, 7]] = -math.inf
    ids = draw(backend, logits, temperature=temperature, position=torch.arange(500), top_k=7)
    assert not set(ids.tolist()) & {0, 3, 7}


def test_inputs_are_left_alone(backend: Backend, rng: torch.Generator) -> None:
    logits = model_like(rng, 4, 400)
    before = logits.clone()
    backend.sample(logits, logits, make_rows(4, num_logprobs=3, top_k=[0, 5, 0, 0], top_p=[1.0, 1.0, 0.5, 1.0]))
    backend.sample(logits, logits, make_rows(4, top_k=3))
    assert torch.equal(logits, before)
