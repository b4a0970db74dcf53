"""What a plan's entries become as tensors."""

from __future__ import annotations

import pytest
import torch
from twostroke_engine.request import SamplingParams
from twostroke_engine.runner.growing import GrowingInts
from twostroke_engine.runner.inputs import Chunk, ForwardInputs, InputBuilder, chunks_in_order
from twostroke_engine.runner.sequence import RunnerSequence
from twostroke_engine.schedule.plan import NewSequence, Scheduled

from tests.support.plan_driver import RecordingSink

BLOCK_SIZE = 4


def sequence(number: int, num_tokens: int, blocks: tuple[int, ...]) -> RunnerSequence:
    tokens = tuple(100 * number + position for position in range(num_tokens))
    new = NewSequence(
        sequence_id=number, token_ids=tokens, num_prompt_tokens=1, sampling=SamplingParams(), block_ids=blocks
    )
    return RunnerSequence(new, None)


def build(*entries: Scheduled) -> tuple[ForwardInputs, list[int]]:
    known = {1: sequence(1, 11, (7, 2, 5)), 2: sequence(2, 6, (9, 1)), 3: sequence(3, 10, (3, 8, 6))}
    pool = torch.zeros(10, 2, 2, BLOCK_SIZE, 1, 2)
    chunks, last_rows = chunks_in_order(entries, known)
    return InputBuilder(pool, BLOCK_SIZE).build(chunks, RecordingSink()), last_rows


def test_decodes_come_first_and_chunks_after() -> None:
    inputs, last_rows = build(
        Scheduled(sequence_id=1, start=2, count=4),
        Scheduled(sequence_id=2, start=5, count=1),
        Scheduled(sequence_id=3, start=0, count=2),
    )
    assert inputs.token_ids.tolist() == [205, 102, 103, 104, 105, 300, 301]
    assert inputs.positions.tolist() == [5, 2, 3, 4, 5, 0, 1]
    assert inputs.slots.tolist() == [1 * 4 + 1, 7 * 4 + 2, 7 * 4 + 3, 2 * 4, 2 * 4 + 1, 3 * 4, 3 * 4 + 1]
    assert last_rows == [4, 0, 6]
    assert inputs.decode is not None
    assert inputs.decode.block_tables.tolist() == [[9, 1]]
    assert (inputs.decode.query_starts.tolist(), inputs.decode.context_lens.tolist()) == ([0, 1], [6])
    assert inputs.prefill is not None
    # Sequence 3 needs one block for its context; the padding is that block again, never someone else's.
    assert inputs.prefill.block_tables.tolist() == [[7, 2], [3, 3]]
    assert (inputs.prefill.query_starts.tolist(), inputs.prefill.context_lens.tolist()) == ([0, 4, 6], [6, 2])
    assert (inputs.prefill.max_query_len, inputs.prefill.max_context_len) == (4, 6)


def test_one_kind_alone_leaves_the_other_out() -> None:
    only_decode, _ = build(Scheduled(sequence_id=1, start=10, count=1), Scheduled(sequence_id=3, start=9, count=1))
    assert only_decode.prefill is None
    assert only_decode.decode is not None
    assert only_decode.decode.num_sequences == 2
    only_prefill, _ = build(Scheduled(sequence_id=1, start=0, count=11))
    assert only_prefill.decode is None
    assert only_prefill.slots.shape == (11,)


def test_tokens_or_blocks_that_are_not_there_are_an_error() -> None:
    with pytest.raises(IndexError):
        build(Scheduled(sequence_id=2, start=0, count=7))
    known = {1: sequence(1, 9, (7, 2))}
    chunks, _ = chunks_in_order([Scheduled(sequence_id=1, start=0, count=9)], known)
    with pytest.raises(IndexError):
        InputBuilder(torch.zeros(10, 2, 2, BLOCK_SIZE, 1, 2), BLOCK_SIZE).build(chunks, RecordingSink())


@pytest.mark.parametrize(
    ("start", "end", "block"),
    [(0, 3, 7), (0, 4, None), (0, 5, 2), (3, 5, 2), (4, 5, 2), (5, 6, None), (4, 8, None), (8, 9, 5), (0, 11, 5)],
)
def test_begun_block(start: int, end: int, block: int | None) -> None:
    assert Chunk(sequence(1, 11, (7, 2, 5)), start, end, is_decode=False).begun_block(BLOCK_SIZE) == block


def test_growing_ints_keep_their_values() -> None:
    grown, expected = GrowingInts([3, 4]), [3, 4]
    for value in range(40):
        grown.append(value)
        grown.extend([value, -value])
        expected += [value, value, -value]
    grown.add(1, 5)
    expected[1] += 5
    assert grown.view().tolist() == expected
    assert grown.view(2, 4).tolist() == expected[2:4]
    assert len(grown) == len(expected)
