"""Adjusted logits and sampled tokens through the runner, against brute force on transformers' logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from twostroke_engine.request import SamplingParams
from twostroke_engine.runner.upload import uploader
from twostroke_engine.sample.logits import adjustments_for, gather_penalties
from twostroke_kernels.backend import SamplingRows
from twostroke_kernels.choice import choose_backend

from tests.support.model_oracle import load, random_tokens, reference_logits
from tests.support.plan_driver import GREEDY, Driven, PlanDriver, Take
from tests.support.tiny_model import EOS_TOKEN_ID, make_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from twostroke_engine.runner.model_runner import LoadedModel

CPU = torch.device("cpu")
VOCAB = 12


def adjusted(logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> torch.Tensor:
    """The definition, token by token."""
    result = logits.clone()
    ends = set() if len(output) >= params.min_tokens else set(params.stop_token_ids)
    if len(output) < params.min_tokens and not params.ignore_eos:
        ends.add(EOS_TOKEN_ID)
    bias = dict(params.logit_bias)
    for token in range(len(logits)):
        value = float(logits[token])
        if token in prompt or token in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        count = output.count(token)
        value -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
        value += bias.get(token, 0.0)
        result[token] = -math.inf if token in ends else value
    return result


penalties = st.sampled_from([-1.5, -0.25, 0.0, 0.0, 0.5, 2.0])
ids = st.integers(0, VOCAB - 1)
params_strategy = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.0, 1.3]),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    logit_bias=st.dictionaries(st.integers(-2, VOCAB + 2), st.floats(-9, 9, width=32), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(st.integers(-1, VOCAB + 2), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)
row_strategy = st.tuples(
    params_strategy, st.lists(ids, min_size=1, max_size=6), st.lists(ids, max_size=4), st.integers(0, 4)
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(row_strategy, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_adjustments_equal_the_definition(rows: list[Any], seed: int) -> None:
    """Part of the output is there at once (a recomputed sequence), the rest is appended token by token."""
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    entries = []
    for at, (params, prompt, output, known) in enumerate(rows):
        known = min(known, len(output))
        tokens = [*prompt, *output[:known]]
        adjustments = adjustments_for(params, tokens, len(prompt), (EOS_TOKEN_ID,), VOCAB)
        if adjustments is not None:
            for token in output[known:]:
                adjustments.append(token)
            entries.append((at, adjustments, len(output)))
    gathered = gather_penalties(entries, uploader(CPU))
    got = logits.clone()
    if gathered is not None:
        cells = list(zip(gathered.rows.tolist(), gathered.tokens.tolist(), strict=True))
        assert len(set(cells)) == len(cells)
        choose_backend(CPU).penalize(got, gathered)
    expected = torch.stack(
        [adjusted(row, params, prompt, out) for row, (params, prompt, out, _) in zip(logits, rows, strict=True)]
    )
    assert torch.allclose(got, expected, atol=1e-5)


def test_untouched_sequences_cost_nothing() -> None:
    assert adjustments_for(SamplingParams(temperature=0.7, top_k=5), [1, 2], 2, (EOS_TOKEN_ID,), VOCAB) is None
    late = adjustments_for(SamplingParams(min_tokens=2), [1, 2], 2, (EOS_TOKEN_ID,), VOCAB)
    assert late is not None
    assert gather_penalties([(0, late, 2)], uploader(CPU)) is None


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0, repetition_penalty=1.6),
        SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=1.0),
        SamplingParams(temperature=0.0, logit_bias=((9, 4.0), (50, 3.5), (17, -100.0))),
        SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=-0.5, logit_bias=((9, 2.0),)),
    ],
)
def test_greedy_with_adjustments_equals_brute_force(
    sampling: SamplingParams, loaded: LoadedModel, reference: Any
) -> None:
    prompt = random_tokens(19, seed=21)
    output: list[int] = []
    for _ in range(16):
        logits = reference_logits(reference, prompt + output)[-1]
        output.append(int(adjusted(logits, sampling, prompt, output).argmax()))
    driver = PlanDriver(loaded)
    plain, sequence = driver.add(prompt), driver.add(prompt, sampling)
    for count in (19, *[1] * 7):
        driver.step(Take(plain, count, (0,)), Take(sequence, count, (0,)))
    driver.preempt(sequence, sampling)
    driver.prefill(sequence)
    driver.decode(sequence, 7)
    assert sequence.tokens[19:] == output
    assert plain.tokens[19:] != output[:8]


def test_min_tokens_masks_ends(loaded: LoadedModel, reference: Any) -> None:
    """Tokens that would come greedily are made stop ids: they are kept away until min_tokens, and no longer."""
    prompt = random_tokens(11, seed=22)
    first = int(reference_logits(reference, prompt)[-1].argmax())
    sampling = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(first,))
    masked = PlanDriver(loaded)
    sequence = masked.add(prompt, sampling)
    masked.prefill(sequence)
    masked.decode(sequence, 2)
    output: list[int] = []
    for _ in range(3):
        logits = reference_logits(reference, prompt + output)[-1]
        output.append(int(adjusted(logits, sampling, prompt, output).argmax()))
    assert output[0] != first
    assert sequence.tokens[11:] == output


def test_logprobs_are_of_the_raw_logits(loaded: LoadedModel, reference: Any) -> None:
    prompt = random_tokens(13, seed=23)
    expected = reference_logits(reference, prompt)[-1].log_softmax(-1)
    sampling = SamplingParams(temperature=0.3, top_k=3, logit_bias=((7, 30.0),), logprobs=4, seed=1)
    driver = PlanDriver(loaded)
    sequence, silent = driver.add(prompt, sampling), driver.add(prompt, GREEDY)
    sampled, quiet = driver.step(Take(sequence, 13, (0,)), Take(silent, 13, (0,)))
    (token,) = sampled.tokens
    assert token.id == 7
    assert token.logprob == pytest.approx(float(expected[7]), abs=1e-4)
    best = expected.topk(4)
    assert [i for i, _ in token.top] == best.indices.tolist()
    assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert quiet.tokens[0].top == ()


def test_zero_logprobs_still_gives_the_chosen_one(loaded: LoadedModel) -> None:
    driver = PlanDriver(loaded)
    sequence = driver.add([5, 6], SamplingParams(temperature=0.0, logprobs=0))
    (token,) = driver.prefill(sequence).tokens
    assert token.logprob < 0
    assert token.top == ()


def sampled_tokens(driver: PlanDriver, sequences: list[Driven], num_tokens: int) -> list[list[int]]:
    starts = [len(sequence.tokens) for sequence in sequences]
    for sequence in sequences:
        driver.prefill(sequence)
    for _ in range(num_tokens - 1):
        driver.step(*(Take(sequence, 1, (sequence.choice,)) for sequence in sequences))
    return [sequence.tokens[start:] for sequence, start in zip(sequences, starts, strict=True)]


def test_seeded_sampling_does_not_depend_on_the_batch(loaded: LoadedModel) -> None:
    prompt = random_tokens(18, seed=24)
    settings_ = [
        SamplingParams(seed=3),
        SamplingParams(seed=3, temperature=0.8, top_p=0.9),
        SamplingParams(seed=2**64 - 1, top_k=20, min_p=0.01),
        SamplingParams(seed=4),
        GREEDY,
    ]
    together = PlanDriver(loaded)
    batch = sampled_tokens(together, [together.add(prompt, sampling) for sampling in settings_], 12)
    alone = []
    for sampling in settings_:
        driver = PlanDriver(loaded, seed=5)
        alone += sampled_tokens(driver, [driver.add(prompt, sampling)], 12)
    assert batch == alone
    assert len({tuple(tokens) for tokens in batch}) == len(settings_)


@pytest.mark.parametrize(("seed", "bits"), [(5, 5), (2**64 - 3, -3)])
def test_noise_is_keyed_by_seed_choice_and_absolute_position(
    seed: int, bits: int, loaded: LoadedModel, reference: Any
) -> None:
    """The backend, asked by hand with the keys that the contract names, chooses the same tokens."""
    backend, prompt, choice = choose_backend(CPU), random_tokens(18, seed=28), 3
    driver = PlanDriver(loaded)
    sequence = driver.add(prompt, SamplingParams(temperature=1.5, seed=seed), choice=choice)
    driver.prefill(sequence)
    driver.decode(sequence, 7)
    for position in range(18, 26):
        logits = reference_logits(reference, sequence.tokens[:position])[-1:]
        rows = SamplingRows(
            temperature=torch.tensor([1.5]),
            top_k=torch.tensor([0]),
            top_p=torch.tensor([1.0]),
            min_p=torch.tensor([0.0]),
            seed=torch.tensor([bits]),
            choice=torch.tensor([choice]),
            position=torch.tensor([position]),
            all_greedy=False,
            num_logprobs=-1,
        )
        assert backend.sample(logits, logits, rows).token_ids.item() == sequence.tokens[position]


def test_a_resumed_sequence_continues_its_stream(loaded: LoadedModel) -> None:
    """Elsewhere, with what was generated as part of the given tokens: noise is keyed by absolute position."""
    prompt, sampling = random_tokens(18, seed=25), SamplingParams(seed=11, presence_penalty=1.0)
    driver = PlanDriver(loaded)
    (whole,) = sampled_tokens(driver, [driver.add(prompt, sampling)], 12)
    elsewhere = PlanDriver(loaded, seed=6)
    resumed = elsewhere.add(prompt + whole[:5], sampling, num_prompt_tokens=18)
    assert sampled_tokens(elsewhere, [resumed], 7) == [whole[5:]]


def test_top_k_and_top_p_keep_only_the_best(loaded: LoadedModel, reference: Any) -> None:
    prompt = random_tokens(18, seed=26)
    probabilities = reference_logits(reference, prompt)[-1].softmax(-1)
    order = probabilities.argsort(descending=True)
    nucleus = int((probabilities[order].cumsum(0) < 0.5).sum()) + 1
    for keep, sampling in ((4, {"top_k": 4}), (nucleus, {"top_p": 0.5})):
        allowed = set(order[:keep].tolist())
        driver = PlanDriver(loaded)
        rows = [driver.add(prompt, SamplingParams(temperature=1.0, seed=seed, **sampling)) for seed in range(30)]
        sampled = driver.step(*(Take(sequence, 18, (0,)) for sequence in rows))
        chosen = {entry.tokens[0].id for entry in sampled}
        assert chosen <= allowed
        assert len(chosen) > 1


def test_nan_weights_are_reported(tiny_llama: Path, tmp_path: Path) -> None:
    """Only the sequence whose embedding is NaN suffers; its neighbour's tokens are what they were."""
    folder = make_tiny(tmp_path / "nan", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][77] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    prompt = random_tokens(9, vocab_size=70, seed=27)
    healthy = PlanDriver(load(tiny_llama))
    expected = healthy.add(prompt)
    healthy.prefill(expected)
    driver = PlanDriver(load(folder))
    good, bad = driver.add(prompt), driver.add([*prompt, 77], SamplingParams(logprobs=2))
    sampled = driver.step(Take(bad, 10, (0, 1)), Take(good, 9, (0,)))
    assert [entry.finite for entry in sampled] == [False, True]
    assert len(sampled[0].tokens) == 2
    assert all(not math.isnan(token.logprob) for token in sampled[0].tokens)
    assert good.tokens == expected.tokens
