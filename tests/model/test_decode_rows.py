"""Static buffers of decode steps, without a GPU: padding, block tables, and logits equal to the plain way's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from twostroke_engine.config import EngineConfig
from twostroke_engine.request import SamplingParams
from twostroke_engine.runner.cuda_graphs import DecodeBuffers
from twostroke_engine.runner.decode_rows import (
    CONTEXT_LEN,
    MAX_GRAPH_BATCH,
    POSITION,
    SLOT,
    TOKEN,
    DecodeRows,
    padded_sizes,
    size_for,
)
from twostroke_engine.runner.forward import EagerForward
from twostroke_engine.runner.inputs import Chunk, FreshTokens, InputBuilder
from twostroke_engine.runner.model_runner import LoadedModel, ModelRunner
from twostroke_engine.runner.sequence import RunnerSequence
from twostroke_engine.schedule.plan import NewSequence
from twostroke_engine.transfer.end import KVSink, NoSink

from tests.support.engine_bench import make_request
from tests.support.graph_engine import run_requests
from tests.support.model_oracle import load

BLOCK_SIZE, SCRATCH = 4, 99


@given(st.integers(1, 2000))
def test_sizes_hold_every_batch_and_waste_little(max_running: int) -> None:
    sizes = padded_sizes(max_running)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == min(max_running, MAX_GRAPH_BATCH)
    for num_rows in range(1, sizes[-1] + 1):
        size = size_for(num_rows, sizes)
        assert num_rows <= size <= max(2 * num_rows, num_rows + 4)
        assert num_rows < 16 or size - num_rows < 32


def make_sequence(number: int, num_tokens: int) -> RunnerSequence:
    blocks = tuple(random.sample(range(SCRATCH), -(-num_tokens // BLOCK_SIZE)))
    tokens = tuple(1000 * number + position for position in range(num_tokens))
    new = NewSequence(
        sequence_id=number, token_ids=tokens, num_prompt_tokens=1, sampling=SamplingParams(), block_ids=blocks
    )
    return RunnerSequence(new, None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_are_what_the_plain_way_builds(data: st.DataObject) -> None:
    """Over steps in which sequences come, go, grow and change places."""
    rows = DecodeRows(max_rows=8, max_blocks=10, block_size=BLOCK_SIZE, scratch_block=SCRATCH)
    plain = InputBuilder(torch.zeros(1, 1, 2, BLOCK_SIZE, 1, 1), BLOCK_SIZE)
    on_device = torch.full((8, 10), SCRATCH)
    pool = [make_sequence(number, data.draw(st.integers(1, 40))) for number in range(1, 7)]
    for _ in range(6):
        chosen = data.draw(st.lists(st.sampled_from(pool), unique_by=id, max_size=6))
        size = data.draw(st.integers(max(1, len(chosen)), 8))
        chunks = []
        for sequence in chosen:
            start = data.draw(st.integers(0, len(sequence.tokens) - 1))
            chunks.append(Chunk(sequence, start, start + 1, is_decode=True))
        if rows.fill(chunks, size):
            tables = torch.from_numpy(rows.tables(size))
            on_device[:size, : tables.shape[1]] = tables
        numbers = rows.numbers(size)
        assert numbers[:, len(chunks) :].tolist() == [
            [value] * (size - len(chunks)) for value in (0, 0, SCRATCH * BLOCK_SIZE, 1)
        ]
        assert on_device[len(chunks) : size, 0].tolist() == [SCRATCH] * (size - len(chunks))
        if not chunks:
            continue
        inputs = plain.build(chunks, NoSink())
        assert inputs.decode is not None
        expected = {
            TOKEN: inputs.token_ids,
            POSITION: inputs.positions,
            SLOT: inputs.slots,
            CONTEXT_LEN: inputs.decode.context_lens,
        }
        for name, tensor in expected.items():
            assert numbers[name, : len(chunks)].tolist() == tensor.tolist()
        for row, chunk in enumerate(chunks):
            needed = chunk.start // BLOCK_SIZE + 1
            assert on_device[row, :needed].tolist() == chunk.sequence.blocks.view(0, needed).tolist()


def test_tables_are_sent_only_when_they_change() -> None:
    rows = DecodeRows(max_rows=4, max_blocks=4, block_size=BLOCK_SIZE, scratch_block=SCRATCH)
    sequence = make_sequence(1, 12)
    sent = [rows.fill([Chunk(sequence, start, start + 1, is_decode=True)], size=2) for start in range(12)]
    assert sent == [start % BLOCK_SIZE == 0 for start in range(12)]
    assert rows.fill([Chunk(make_sequence(2, 12), 0, 1, is_decode=True)], size=2)
    assert rows.fill([], size=2)
    assert not rows.fill([], size=2)


def test_a_token_or_block_that_is_not_there_is_an_error() -> None:
    rows = DecodeRows(max_rows=4, max_blocks=4, block_size=BLOCK_SIZE, scratch_block=SCRATCH)
    with pytest.raises(IndexError):
        rows.fill([Chunk(make_sequence(1, 3), 3, 4, is_decode=True)], size=1)
    with pytest.raises(IndexError):
        rows.fill([Chunk(make_sequence(1, 4), 4, 5, is_decode=True)], size=1)


class StaticForward:
    """What a graph does, launched kernel by kernel: it reads and writes the static buffers alone."""

    overlaps = True

    def __init__(self, eager: EagerForward, pool: Tensor, sizes: tuple[int, ...], vocab_size: int) -> None:
        self.num_steps = self.num_fresh = 0
        self._eager = eager
        self._sizes = sizes
        logits = torch.full((sizes[-1], vocab_size), float("nan"))
        self._buffers = DecodeBuffers(pool, sizes[-1], max_blocks=96, logits=logits)

    def logits(
        self, chunks: Sequence[Chunk], rows: Sequence[int], sink: KVSink, fresh: FreshTokens | None = None
    ) -> Tensor | None:
        self.num_fresh += fresh is not None
        if not chunks[-1].is_decode or len(chunks) > self._sizes[-1]:
            return self._eager.logits(chunks, rows, sink, fresh)
        self.num_steps += 1
        size = size_for(len(chunks), self._sizes)
        self._buffers.fill(chunks, size, fresh)
        decoder = self._eager._decoder
        decoder.write_logits(decoder(self._buffers.inputs(size)), self._buffers.logits[:size])
        return self._buffers.logits[rows] if rows else None


def static_twin(model: LoadedModel) -> tuple[ModelRunner, StaticForward]:
    """The same decoder over a pool with a scratch block of NaN: nothing of it may reach a sequence."""
    runner = model.runner
    pool = torch.zeros(model.num_blocks + 1, *runner.kv_pool.shape[1:])
    pool[-1] = float("nan")
    assert isinstance(runner.forward, EagerForward)
    eager = EagerForward(runner.forward._decoder, pool)
    forward = StaticForward(eager, pool, padded_sizes(6), model.vocab_size)
    return ModelRunner(forward, runner.backend, pool[: model.num_blocks], runner.model), forward


@pytest.mark.parametrize("num_blocks", [96, 14])
def test_padded_steps_give_the_tokens_of_plain_ones(num_blocks: int, tiny_llama: Path) -> None:
    """Mixed contexts, forks, and, in the smaller pool, preemption; greedy and drawn; steps run ahead of plans."""
    model = load(tiny_llama, num_blocks=num_blocks)
    runner, forward = static_twin(model)
    requests = [
        make_request(
            f"r{number}", 5 + 11 * number, n=1 + number % 3, temperature=number % 2, seed=number, max_tokens=40
        )
        for number in range(5)
    ]
    config = EngineConfig(model_dir="", max_step_tokens=64, max_running=6)
    plain, num_preempted = run_requests(config, model, model.runner, requests)
    padded, _ = run_requests(config, model, runner, requests)
    assert padded == plain
    assert (num_preempted > 0) == (num_blocks == 14)
    assert forward.num_steps > 40
    assert forward.num_fresh > 20, "most steps are launched before the last one's tokens are known"
