"""`ForwardInputs`: everything a forward pass reads besides weights, built anew for each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from twostroke_kernels.backend import PagedBatch

from twostroke_engine.runner.upload import uploader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from twostroke_engine.runner.sequence import RunnerSequence
    from twostroke_engine.schedule.plan import Scheduled
    from twostroke_engine.transfer.end import KVSink


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """The tokens of a step. Decoding sequences (one token each) come first, prompt chunks after them."""

    token_ids: Tensor
    """[T]."""
    positions: Tensor
    """[T]."""
    slots: Tensor
    """[T] where each token's KV goes."""
    decode: PagedBatch | None
    """The first rows; None if no sequence computes exactly one token."""
    prefill: PagedBatch | None
    """The rows after them; None if no sequence computes more than one token."""
    kv_layers: tuple[Tensor, ...]
    """The pool's view of each layer."""
    sink: KVSink


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of one sequence."""

    sequence: RunnerSequence
    start: int
    end: int

    @property
    def count(self) -> int:
        """Tokens to compute."""
        return self.end - self.start

    def begun_block(self, block_size: int) -> int | None:
        """The block that the chunk begins and does not fill: its unused rows hold what an earlier owner left."""
        index, num_used = divmod(self.end, block_size)
        if not num_used or self.start > index * block_size:
            return None
        return int(self.sequence.blocks.view(0, index + 1)[index])


def chunks_in_order(
    scheduled: Sequence[Scheduled], sequences: dict[int, RunnerSequence]
) -> tuple[list[Chunk], list[int]]:
    """The plan's entries in the order of the batch, and the row of each entry's last token, in the plan's order."""
    order = sorted(range(len(scheduled)), key=lambda at: scheduled[at].count > 1)
    chunks = []
    last_rows = [0] * len(scheduled)
    num_rows = 0
    for at in order:
        entry = scheduled[at]
        chunks.append(Chunk(sequences[entry.sequence_id], entry.start, entry.start + entry.count))
        num_rows += entry.count
        last_rows[at] = num_rows - 1
    return chunks, last_rows


class InputBuilder:
    """Turns chunks into tensors on the device."""

    def __init__(self, pool: Tensor, block_size: int) -> None:
        self._kv_layers = tuple(pool[:, layer] for layer in range(pool.shape[1]))
        self._block_size = block_size
        self._upload = uploader(pool.device)

    def build(self, chunks: Sequence[Chunk], sink: KVSink) -> ForwardInputs:
        """`chunks` hold at least one token each; those of one token come first."""
        counts = np.array([chunk.count for chunk in chunks], dtype=np.int64)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        query_starts = np.zeros(len(chunks) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_starts[1:])
        positions = np.arange(query_starts[-1]) - np.repeat(query_starts[:-1] - starts, counts)
        tables = self._block_tables(chunks)
        owners = np.repeat(np.arange(len(chunks)), counts)
        slots = tables[owners, positions // self._block_size] * self._block_size + positions % self._block_size
        num_decode = int((counts == 1).sum())
        return ForwardInputs(
            token_ids=self._upload(np.concatenate([c.sequence.tokens.view(c.start, c.end) for c in chunks])),
            positions=self._upload(positions),
            slots=self._upload(slots),
            decode=self._batch(chunks[:num_decode], tables[:num_decode]),
            prefill=self._batch(chunks[num_decode:], tables[num_decode:]),
            kv_layers=self._kv_layers,
            sink=sink,
        )

    def _block_tables(self, chunks: Sequence[Chunk]) -> NDArray[np.int64]:
        """[S, max blocks], each row padded with a block of its own: a stray read sees no other sequence's KV."""
        needed = [-(-chunk.end // self._block_size) for chunk in chunks]
        tables = np.empty((len(chunks), max(needed)), dtype=np.int64)
        for row, chunk, num_blocks in zip(tables, chunks, needed, strict=True):
            blocks = chunk.sequence.blocks.view(0, num_blocks)
            row[:num_blocks] = blocks
            row[num_blocks:] = blocks[0]
        return tables

    def _batch(self, chunks: Sequence[Chunk], tables: NDArray[np.int64]) -> PagedBatch | None:
        if not chunks:
            return None
        context_lens = [chunk.end for chunk in chunks]
        query_starts = np.zeros(len(chunks) + 1, dtype=np.int64)
        np.cumsum([chunk.count for chunk in chunks], out=query_starts[1:])
        max_blocks = -(-max(context_lens) // self._block_size)
        return PagedBatch(
            block_tables=self._upload(np.ascontiguousarray(tables[:, :max_blocks])),
            query_starts=self._upload(query_starts),
            context_lens=self._upload(np.array(context_lens, dtype=np.int64)),
            max_query_len=max(chunk.count for chunk in chunks),
            max_context_len=max(context_lens),
        )
