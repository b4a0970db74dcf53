"""However a plan cuts and mixes the work, the tokens are those of each sequence alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from twostroke_engine.request import SamplingParams

from tests.support.model_oracle import all_logprobs, load, logprobs_along, random_tokens
from tests.support.plan_driver import GREEDY, Driven, PlanDriver, Take

if TYPE_CHECKING:
    from pathlib import Path

    from twostroke_engine.runner.model_runner import LoadedModel

SUM_TOLERANCE = 2e-5
"""Floating-point sums depend on how the work was cut."""


def tokens_alone(model: LoadedModel, prompt: list[int], num_tokens: int, **add: Any) -> list[int]:
    """What a sequence generates by itself, its prompt computed whole. Overwrites the pool of `model`."""
    driver = PlanDriver(model, seed=99)
    sequence = driver.add(prompt, **add)
    driver.prefill(sequence)
    driver.decode(sequence, num_tokens - 1)
    return sequence.tokens[len(prompt) :]


@pytest.mark.parametrize("chunks", [(16, 16), (1, 1, 1), (7, 9, 20), (40,), (1,) * 40, (15, 2)])
def test_chunked_prompt_equals_whole(chunks: tuple[int, ...], loaded: LoadedModel) -> None:
    tokens = random_tokens(44, seed=1)
    whole = logprobs_along(loaded, tokens, num_prompt=41, chunks=())
    assert torch.allclose(logprobs_along(loaded, tokens, 41, chunks), whole, atol=SUM_TOLERANCE, rtol=0)


def test_mixed_batch_equals_each_alone(loaded: LoadedModel) -> None:
    """Decodes and chunks in one step, in an order that is not the batch's; some chunks end a prompt, some do not."""
    prompts = [random_tokens(count, seed=count) for count in (5, 33, 16, 70)]
    expected = [tokens_alone(loaded, prompt, 4) for prompt in prompts]
    driver = PlanDriver(loaded)
    a, b, c, d = (driver.add(prompt) for prompt in prompts)
    driver.step(Take(a, 5, (0,)), Take(d, 30))
    driver.step(Take(d, 20), Take(a, 1, (0,)), Take(b, 32))
    driver.step(Take(d, 20, (0,)), Take(c, 16, (0,)), Take(b, 1, (0,)), Take(a, 1, (0,)))
    driver.step(*(Take(sequence, 1, (0,)) for sequence in (d, a, c, b)))
    driver.step(*(Take(sequence, 1, (0,)) for sequence in (b, c, d)))
    driver.step(*(Take(sequence, 1, (0,)) for sequence in (c, d, b)))
    assert [s.tokens[len(p) :] for s, p in zip((a, b, c, d), prompts, strict=True)] == expected


def test_prefix_hit_equals_cold(loaded: LoadedModel) -> None:
    """A second sequence starts behind the full blocks of the first."""
    prompt = random_tokens(50, seed=3)
    other = prompt[:32] + random_tokens(25, seed=4)
    driver = PlanDriver(loaded)
    first = driver.add(prompt)
    driver.prefill(first)
    second = driver.add(other, blocks=first.blocks[:2], num_computed=32)
    driver.step(Take(first, 1, (0,)), Take(second, 10))
    driver.prefill(second)
    driver.decode(second, 9)
    driver.decode(first, 3)
    assert second.tokens[len(other) :] == tokens_alone(loaded, other, 10)
    assert first.tokens[len(prompt) :] == tokens_alone(loaded, prompt, 5)


def test_choices_fork_at_the_end_of_the_prompt(loaded: LoadedModel) -> None:
    """n = 3: one prefill, full blocks shared, the last one copied; every choice is as if it ran alone."""
    sampling = SamplingParams(seed=7)
    prompt = random_tokens(37, seed=5)
    driver = PlanDriver(loaded)
    root = driver.add(prompt, sampling)
    sampled = driver.prefill(root, chunks=(20,), choices=(0, 1, 2))
    firsts = [token.id for token in sampled.tokens]
    forks = []
    for choice in (1, 2):
        blocks = [*root.blocks[:2], driver.copy(root.blocks[2])]
        tokens = [*prompt, firsts[choice]]
        forks.append(driver.add(tokens, sampling, len(prompt), choice, blocks, num_computed=len(prompt)))
    running = [root, *forks]
    for _ in range(9):
        driver.step(*(Take(sequence, 1, (sequence.choice,)) for sequence in running))
    got = [sequence.tokens[len(prompt) :] for sequence in running]
    expected = [tokens_alone(loaded, prompt, 10, sampling=sampling, choice=choice) for choice in range(3)]
    assert got == expected
    assert len({tuple(tokens) for tokens in got}) == 3


def test_several_choices_beside_single_ones(loaded: LoadedModel) -> None:
    """Rows of logits are repeated for the sequence with more choices, and for no other."""
    prompts = [random_tokens(count, seed=count) for count in (6, 21, 9)]
    expected = [tokens_alone(loaded, prompt, 1) for prompt in prompts]
    driver = PlanDriver(loaded)
    one, several, two = (driver.add(prompt) for prompt in prompts)
    sampled = driver.step(Take(one, 6, (0,)), Take(several, 21, (0, 1, 2)), Take(two, 9, (0, 1)))
    assert [entry.sequence_id for entry in sampled] == [one.id, several.id, two.id]
    got = [[token.id for token in entry.tokens] for entry in sampled]
    assert got == [expected[0], expected[1] * 3, expected[2] * 2]


def test_preempted_sequence_goes_on_as_before(loaded: LoadedModel) -> None:
    """It is in `finished` and `new` of one plan, and its generated tokens are recomputed with its prompt."""
    prompt = random_tokens(20, seed=6)
    driver = PlanDriver(loaded)
    sequence, bystander = driver.add(prompt), driver.add(prompt[:9])
    driver.prefill(sequence)
    driver.prefill(bystander)
    driver.decode(sequence, 5)
    driver.preempt(sequence)
    driver.step(Take(bystander, 1, (0,)), Take(sequence, 17))
    driver.prefill(sequence)
    driver.decode(sequence, 4)
    assert sequence.tokens[20:] == tokens_alone(loaded, prompt, 11)
    assert bystander.tokens[9:] == tokens_alone(loaded, prompt[:9], 2)


def test_finished_sequences_are_forgotten(loaded: LoadedModel) -> None:
    driver = PlanDriver(loaded)
    sequence = driver.add(random_tokens(8))
    driver.prefill(sequence)
    driver.finish(sequence)
    assert driver.step() == []
    with pytest.raises(KeyError):
        driver.decode(sequence, 1)


def test_sink_hears_each_layer_once_when_its_kv_is_there(loaded: LoadedModel) -> None:
    """When layer i is told of, its rows are written and those of later layers are not."""
    seen: list[list[bool]] = []
    driver = PlanDriver(loaded)
    sequence = driver.add(random_tokens(20, seed=8))
    pool = loaded.runner.kv_pool

    class Sink:
        def layer_written(self, layer: int) -> None:
            last = pool[sequence.blocks[1], :, :, 3].abs().sum(dim=(1, 2, 3))
            seen.append([bool(value) for value in last > 0])
            assert len(seen) == layer + 1

    driver.sink = Sink()  # type: ignore[assignment]
    driver.step(Take(sequence, 20))
    assert seen == [[True, False], [True, True]]
    driver.sink = type(PlanDriver(loaded).sink)()
    driver.step(Take(driver.add([5, 6, 7]), 2), Take(driver.add([8]), 1, (0,)))
    assert driver.sink.layers == [0, 1]


def test_nan_left_in_blocks_reaches_no_one(tiny_llama: Path) -> None:
    """A sequence whose KV is NaN ends; whoever gets its blocks next is untouched."""
    model = load(tiny_llama)
    prompt = random_tokens(37, seed=9)
    expected = tokens_alone(load(tiny_llama), prompt, 30)
    model.runner.kv_pool.fill_(float("nan"))
    driver = PlanDriver(model)
    sequence, other = driver.add(prompt), driver.add(prompt[:3])

    def nothing_is_left() -> bool:
        return bool(model.runner.kv_pool[sequence.blocks + other.blocks].isfinite().all())

    driver.step(Take(sequence, 17), Take(other, 3, (0,)))
    assert nothing_is_left()
    driver.prefill(sequence)
    for _ in range(29):
        driver.step(Take(sequence, 1, (0,)), Take(other, 1, (0,)))
        assert nothing_is_left()
    assert sequence.tokens[37:] == expected


def test_larger_blocks_change_nothing(tiny_llama: Path, loaded: LoadedModel) -> None:
    prompt = random_tokens(70, seed=10)
    large = load(tiny_llama, block_size=64, num_blocks=8)
    assert tokens_alone(large, prompt, 12) == tokens_alone(loaded, prompt, 12)


def test_logits_do_not_depend_on_the_neighbours_much(loaded: LoadedModel) -> None:
    everything = SamplingParams(temperature=0.0, logprobs=loaded.vocab_size)
    prompt = random_tokens(30, seed=11)
    alone = logprobs_along(loaded, prompt, num_prompt=30, chunks=())[0]
    driver = PlanDriver(loaded)
    neighbours: list[Driven] = [driver.add(random_tokens(n, seed=n), GREEDY) for n in (1, 17, 40)]
    sequence = driver.add(prompt, everything)
    takes = [Take(n, len(n.tokens), (0,)) for n in neighbours]
    sampled = driver.step(*takes[:2], Take(sequence, 30, (0,)), takes[2])
    row = next(entry for entry in sampled if entry.sequence_id == sequence.id)
    assert torch.allclose(all_logprobs(row, loaded.vocab_size), alone, atol=SUM_TOLERANCE, rtol=0)
