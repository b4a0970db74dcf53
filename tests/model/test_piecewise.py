"""Forward passes in pieces over static buffers, without a GPU: padding, mixed steps, hand-offs, fresh tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from twostroke_engine.config import EngineConfig
from twostroke_engine.model.decoder import Decoder
from twostroke_engine.request import SamplingParams
from twostroke_engine.runner.forward import EagerForward
from twostroke_engine.runner.inputs import Chunk, FreshTokens
from twostroke_engine.runner.model_runner import LoadedModel, ModelRunner
from twostroke_engine.runner.piecewise import (
    MAX_PIECE_TOKENS,
    PieceBuffers,
    PieceForward,
    launched_pieces,
    piece_size,
    piece_sizes,
)
from twostroke_engine.runner.sequence import RunnerSequence
from twostroke_engine.schedule.plan import NewSequence
from twostroke_engine.transfer.end import NoSink

from tests.support.engine_bench import make_request
from tests.support.graph_engine import run_requests
from tests.support.model_oracle import load
from tests.support.plan_driver import RecordingSink

SIZES = (4, 16, 40)
BLOCK_SIZE = 16
VOCAB = 300


@given(st.integers(1, 9000))
def test_sizes_hold_every_step_and_waste_less_than_a_tile(max_step_tokens: int) -> None:
    sizes = piece_sizes(max_step_tokens)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] >= max_step_tokens
    assert len(sizes) == 1 or sizes[-2] < max_step_tokens
    assert all(after - before <= 128 or after > MAX_PIECE_TOKENS for before, after in pairwise(sizes))


def test_a_large_step_is_padded_if_that_is_next_to_nothing() -> None:
    sizes = piece_sizes(8192)
    chosen = {tokens: piece_size(tokens, sizes) for tokens in (1, 129, 2048, 2049, 7935, 7936, 8192, 8193)}
    assert chosen == {1: 16, 129: 256, 2048: 2048, 2049: None, 7935: None, 7936: 8192, 8192: 8192, 8193: None}


class Pieces(dict[int, Sequence[Callable[[], None]]]):
    """What graphs do, launched kernel by kernel, and new for every step: a CPU's backend remembers a step's tensors.

    Everything static is NaN before, and no padding may carry that into a token.
    """

    def __init__(self, decoder: Decoder, buffers: PieceBuffers) -> None:
        super().__init__(dict.fromkeys(SIZES, ()))
        self._decoder, self._buffers = decoder, buffers

    def __getitem__(self, size: int) -> Sequence[Callable[[], None]]:
        everything = self._buffers.activations(SIZES[-1])
        for tensor in (everything.hidden, everything.q, everything.attended):
            tensor.fill_(float("nan"))
        return launched_pieces(self._decoder, self._buffers, size)


def twin(model: LoadedModel, pool: Tensor, logits_rows: int = 8) -> PieceForward:
    """The same decoder in pieces, over a pool whose last block is scratch."""
    eager = model.runner.forward
    assert isinstance(eager, EagerForward)
    buffers = PieceBuffers(eager._decoder, pool, SIZES[-1])
    logits = torch.full((logits_rows, VOCAB), float("nan"))
    pieces = Pieces(eager._decoder, buffers)
    return PieceForward(eager._decoder, EagerForward(eager._decoder, pool), buffers, pieces, logits)


def scratch_pool(model: LoadedModel) -> Tensor:
    pool = torch.zeros(model.num_blocks + 1, *model.runner.kv_pool.shape[1:])
    pool[-1] = float("nan")
    return pool


def make_sequences(lengths: Sequence[int]) -> list[RunnerSequence]:
    blocks = iter(range(96))
    rng = random.Random(sum(lengths))
    made = []
    for number, length in enumerate(lengths, 1):
        new = NewSequence(
            sequence_id=number,
            token_ids=tuple(rng.randrange(3, VOCAB) for _ in range(length)),
            num_prompt_tokens=length,
            sampling=SamplingParams(),
            block_ids=tuple(next(blocks) for _ in range(-(-length // BLOCK_SIZE))),
        )
        made.append(RunnerSequence(new, None))
    return made


def chunk(sequence: RunnerSequence, start: int, end: int) -> Chunk:
    return Chunk(sequence, start, end, is_decode=end - start == 1)


STEPS = {
    "prompts that fill a size": [(0, 0, 30), (1, 0, 10)],
    "decodes beside a chunk": [(0, 30, 31), (1, 10, 11), (2, 0, 19)],
    "a chunk of a chunked prompt, padded": [(0, 31, 32), (2, 19, 26)],
    "decodes alone": [(2, 26, 27), (0, 32, 33), (1, 11, 12)],
    "one token": [(1, 12, 13)],
    "one chunk": [(2, 27, 29)],
}


@torch.inference_mode()
def test_mixed_steps_give_eager_logits_and_kv(loaded: LoadedModel) -> None:
    """Each step goes on from the cache of the one before."""
    pools = scratch_pool(loaded), scratch_pool(loaded)
    pieces = twin(loaded, pools[0])
    eager = EagerForward(pieces._decoder, pools[1])
    sequences = make_sequences((40, 20, 30))
    for name, entries in STEPS.items():
        chunks = [chunk(sequences[at], start, end) for at, start, end in entries]
        rows = [sum(c.count for c in chunks[: at + 1]) - 1 for at in range(len(chunks))]
        sinks = RecordingSink(), RecordingSink()
        got = pieces.logits(chunks, rows, sinks[0])
        wanted = eager.logits(chunks, rows, sinks[1])
        assert got is not None, name
        assert wanted is not None, name
        assert torch.allclose(got, wanted, atol=1e-4, rtol=0), name
        assert sinks[0].layers == sinks[1].layers == [0, 1], name
        assert torch.allclose(pools[0][:-1], pools[1][:-1], atol=1e-5, rtol=0), name
    assert pieces.num_steps == len(STEPS)


@torch.inference_mode()
def test_rows_without_logits_and_more_rows_than_there_is_room_for(loaded: LoadedModel) -> None:
    pieces = twin(loaded, scratch_pool(loaded), logits_rows=2)
    chunks = [chunk(sequence, 0, 5) for sequence in make_sequences((5, 5, 5))]
    assert pieces.logits(chunks, [], NoSink()) is None
    three = pieces.logits(chunks, [4, 9, 14], NoSink())
    assert three is not None
    assert three.shape == (3, VOCAB)
    two = pieces.logits(chunks, [9, 14], NoSink())
    assert two is not None
    assert torch.allclose(two, three[1:], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_larger_steps_go_to_the_eager_way(loaded: LoadedModel) -> None:
    pieces = twin(loaded, scratch_pool(loaded))
    (sequence,) = make_sequences((60,))
    sink = RecordingSink()
    assert pieces.logits([chunk(sequence, 0, SIZES[-1] + 1)], [SIZES[-1]], sink) is not None
    assert (pieces.num_steps, sink.layers) == (0, [0, 1])


@pytest.mark.parametrize("way", ["eager", "pieces"])
@torch.inference_mode()
def test_fresh_tokens_come_from_the_device(way: str, loaded: LoadedModel) -> None:
    """Two sequences whose newest token the host lacks, around one that it knows, beside a prompt."""
    pool = scratch_pool(loaded)
    pieces = twin(loaded, pool)
    forward = pieces if way == "pieces" else pieces.eager
    sequences = make_sequences((17, 9, 12, 8))
    prompts = [chunk(sequence, 0, len(sequence.tokens) - 1) for sequence in sequences[:3]]
    forward.logits(prompts, [], NoSink())
    chunks = [chunk(s, len(s.tokens) - 1, len(s.tokens)) for s in sequences[:3]] + [chunk(sequences[3], 0, 8)]
    wanted = forward.logits(chunks, [0, 1, 2, 10], NoSink())
    assert wanted is not None
    wanted = wanted.clone()
    newest = torch.tensor([sequences[at].tokens.at(len(sequences[at].tokens) - 1) for at in (0, 2)])
    for at in (0, 2):
        sequences[at].tokens._len -= 1
    rows = torch.tensor([0, 2]).numpy()
    got = forward.logits(chunks, [0, 1, 2, 10], NoSink(), FreshTokens(rows, newest))
    assert got is not None
    assert torch.equal(got, wanted)
    with pytest.raises(IndexError, match="2 token ids are missing"):
        forward.logits(chunks, [0, 1, 2, 10], NoSink(), FreshTokens(rows[:1], newest[:1]))


@pytest.mark.parametrize("num_blocks", [96, 14])
def test_engines_generate_the_same_tokens(num_blocks: int, tiny_llama: Path) -> None:
    """Chunked prompts beside decodes, forks, and, in the smaller pool, preemption; greedy and drawn."""
    model = load(tiny_llama, num_blocks=num_blocks)
    pool = scratch_pool(model)
    forward = twin(model, pool)
    runner = ModelRunner(forward, model.runner.backend, pool[: model.num_blocks], model.runner.model)
    requests = [
        make_request(
            f"r{number}", 5 + 11 * number, n=1 + number % 3, temperature=number % 2, seed=number, max_tokens=40
        )
        for number in range(5)
    ]
    config = EngineConfig(model_dir="", max_step_tokens=36, max_running=6)
    plain, num_preempted = run_requests(config, model, model.runner, requests)
    got, _ = run_requests(config, model, runner, requests)
    assert got == plain
    assert (num_preempted > 0) == (num_blocks == 14)
    assert forward.num_steps > 40
