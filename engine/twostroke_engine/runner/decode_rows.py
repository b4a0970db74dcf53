"""The host's side of a decode step in static buffers: padded batch sizes, and the numbers of each row."""

from __future__ import annotations

from bisect import bisect_left
from itertools import count, takewhile
from typing import TYPE_CHECKING

import numpy as np

from twostroke_engine.runner.inputs import token_ids_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from twostroke_engine.config import EngineConfig
    from twostroke_engine.runner.inputs import Chunk, FreshTokens
    from twostroke_engine.runner.sequence import RunnerSequence

MAX_GRAPH_BATCH = 512
"""Larger batches keep a GPU busy without graphs."""
TOKEN, POSITION, SLOT, CONTEXT_LEN = range(4)
"""Rows of `DecodeRows.numbers`."""


def padded_sizes(max_running: int) -> tuple[int, ...]:
    """Batch sizes worth a graph, ascending; the last holds `max_running`, or `MAX_GRAPH_BATCH`.

    A padded row costs a few per cent of a step where it costs anything, so steps grow with the size.
    """
    largest = min(max_running, MAX_GRAPH_BATCH)
    fine = (1, 2, 4, 8, 16, 24, 32, 48, 64)
    sizes = (*fine, *takewhile(lambda size: size < largest, count(96, 32)))
    return (*(size for size in sizes if size < largest), largest)


def graph_rows(config: EngineConfig) -> int:
    """Rows of the largest decode step that is captured."""
    return min(config.max_running, config.max_step_tokens, MAX_GRAPH_BATCH)


def size_for(num_rows: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds so many rows; there must be one."""
    return sizes[bisect_left(sizes, num_rows)]


class DecodeRows:
    """Numbers of each sequence of a decode step, and of the rows that pad it.

    A padding row computes token 0 at position 0 of the scratch block, which belongs to no sequence: all of them write
    the same values to one slot, and attend to that slot alone.
    """

    def __init__(self, max_rows: int, max_blocks: int, block_size: int, scratch_block: int) -> None:
        self._block_size = block_size
        self._scratch_block = scratch_block
        self._numbers = np.zeros((4, max_rows), dtype=np.int64)
        self._tables = np.full((max_rows, max_blocks), scratch_block, dtype=np.int64)
        # Whose blocks a row of the tables holds, and how many of them: most steps change none.
        self._owners: list[RunnerSequence | None] = [None] * max_rows
        self._num_known = [0] * max_rows

    def fill(self, chunks: Sequence[Chunk], size: int, fresh: FreshTokens | None = None) -> bool:
        """Takes in a step of chunks of one token each, padded to `size` rows; whether the tables changed."""
        num_rows = len(chunks)
        changed = [self._set_table(row, chunk.sequence, chunk.start) for row, chunk in enumerate(chunks)]
        changed += [self._set_padding(row) for row in range(num_rows, size)]
        numbers = self._numbers[:, :size]
        if chunks:
            numbers[TOKEN, :num_rows] = token_ids_of(chunks, fresh)
        numbers[POSITION, :num_rows] = [chunk.start for chunk in chunks]
        numbers[:2, num_rows:] = 0
        positions = numbers[POSITION]
        blocks = self._tables[np.arange(size), positions // self._block_size]
        numbers[SLOT] = blocks * self._block_size + positions % self._block_size
        numbers[CONTEXT_LEN] = positions + 1
        return any(changed)

    def numbers(self, size: int) -> NDArray[np.int64]:
        """[4, size], a copy: token ids, positions, slots, context lengths."""
        return self._numbers[:, :size].copy()

    def tables(self, size: int) -> NDArray[np.int64]:
        """[size, as many blocks as any row has], a copy."""
        return self._tables[:size, : max(1, *self._num_known[:size])].copy()

    def _set_table(self, row: int, sequence: RunnerSequence, position: int) -> bool:
        needed = position // self._block_size + 1
        if self._owners[row] is not sequence:
            self._owners[row], self._num_known[row] = sequence, 0
        known = self._num_known[row]
        if needed <= known:
            return False
        self._tables[row, known:needed] = sequence.blocks.view(known, needed)
        self._num_known[row] = needed
        return True

    def _set_padding(self, row: int) -> bool:
        if self._owners[row] is None and not self._num_known[row]:
            return False
        self._owners[row], self._num_known[row] = None, 0
        self._tables[row, 0] = self._scratch_block
        return True
