"""`ForwardInputs`: everything a forward pass reads besides weights, built anew for each step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from twostroke_kernels.backend import PagedBatch

from twostroke_engine.runner.upload import uploader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from twostroke_engine.runner.sequence import RunnerSequence
    from twostroke_engine.runner.upload import Upload
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
    """The first rows; None if no sequence decodes."""
    prefill: PagedBatch | None
    """The rows after them; None if there are no prompt chunks."""
    kv_layers: tuple[Tensor, ...]
    """The pool's view of each layer."""
    sink: KVSink


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of one sequence."""

    sequence: RunnerSequence
    start: int
    end: int
    is_decode: bool
    """Computed by decode attention; such chunks hold one token."""

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


@dataclass(frozen=True, slots=True)
class FreshTokens:
    """Ids of a step's tokens that only the device knows: the host puts 0 in their place."""

    rows: NDArray[np.int64]
    """Rows among the step's tokens."""
    token_ids: Tensor
    """[rows] int64, on the device."""

    def write(self, token_ids: Tensor, upload: Upload) -> None:
        """In place: the ids among those of all tokens."""
        if np.array_equal(self.rows, np.arange(len(self.rows))):
            token_ids[: len(self.rows)].copy_(self.token_ids)
        else:
            token_ids.index_copy_(0, upload(self.rows), self.token_ids)


def chunks_in_order(
    scheduled: Sequence[Scheduled], sequences: dict[int, RunnerSequence], by_position: bool = False
) -> tuple[list[Chunk], list[int]]:
    """The plan's entries in the order of the batch, and the row of each entry's last token, in the plan's order.

    Entries of one token are decoded; `by_position`: entries behind the prompt are, and no others.
    """
    chunks = []
    for entry in scheduled:
        sequence = sequences[entry.sequence_id]
        is_decode = entry.start >= sequence.num_prompt_tokens if by_position else entry.count == 1
        chunks.append(Chunk(sequence, entry.start, entry.start + entry.count, is_decode))
    order = sorted(range(len(chunks)), key=lambda at: not chunks[at].is_decode)
    last_rows = [0] * len(chunks)
    num_rows = 0
    for at in order:
        num_rows += chunks[at].count
        last_rows[at] = num_rows - 1
    return [chunks[at] for at in order], last_rows


def token_ids_of(chunks: Sequence[Chunk], fresh: FreshTokens | None) -> NDArray[np.int64]:
    """Ids of a step's tokens, 0 for those that only the device knows.

    Raises:
        IndexError: more are missing than are fresh.
    """
    known = [chunk.sequence.tokens.view(chunk.start, min(chunk.end, len(chunk.sequence.tokens))) for chunk in chunks]
    counts = [chunk.count for chunk in chunks]
    num_missing = sum(counts) - sum(map(len, known))
    if num_missing > (0 if fresh is None else len(fresh.rows)):
        raise IndexError(f"{num_missing} token ids are missing, more than come from the device")
    if not num_missing:
        return np.concatenate(known)
    token_ids = np.zeros(sum(counts), dtype=np.int64)
    for first, ids in zip(accumulate(counts[:-1], initial=0), known, strict=True):
        token_ids[first : first + len(ids)] = ids
    return token_ids


@dataclass(frozen=True, slots=True)
class HostBatch:
    """A `PagedBatch` before it is sent."""

    block_tables: NDArray[np.int64]
    query_starts: NDArray[np.int64]
    context_lens: NDArray[np.int64]
    max_query_len: int

    @property
    def arrays(self) -> tuple[NDArray[np.int64], ...]:
        """What is sent."""
        return self.block_tables, self.query_starts, self.context_lens

    def on_device(self, arrays: Sequence[Tensor]) -> PagedBatch:
        """`arrays` were sent."""
        tables, starts, lens = arrays
        return PagedBatch(tables, starts, lens, self.max_query_len, int(self.context_lens.max()))


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step before it is sent."""

    numbers: NDArray[np.int64]
    """[3, T]: token ids, positions, slots."""
    decode: HostBatch | None
    prefill: HostBatch | None

    def send(self, upload: Upload) -> tuple[Tensor, PagedBatch | None, PagedBatch | None]:
        """The same on the device, in one copy."""
        batches = [batch for batch in (self.decode, self.prefill) if batch is not None]
        numbers, *rest = send([self.numbers, *(array for batch in batches for array in batch.arrays)], upload)
        sent = [batch.on_device(rest[3 * at : 3 * at + 3]) for at, batch in enumerate(batches)]
        prefill = sent.pop() if self.prefill is not None else None
        return numbers, sent[0] if sent else None, prefill


def send(arrays: Sequence[NDArray[np.int64]], upload: Upload) -> list[Tensor]:
    """Arrays on the device, in one copy."""
    sent = upload(np.concatenate([array.ravel() for array in arrays]))
    parts = sent.split_with_sizes([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


class InputBuilder:
    """Turns chunks into tensors on the device."""

    def __init__(self, pool: Tensor, block_size: int) -> None:
        self.kv_layers = tuple(pool[:, layer] for layer in range(pool.shape[1]))
        self.upload = uploader(pool.device)
        self._block_size = block_size

    def build(self, chunks: Sequence[Chunk], sink: KVSink, fresh: FreshTokens | None = None) -> ForwardInputs:
        """`chunks` hold at least one token each; decoding ones come first."""
        (token_ids, positions, slots), decode, prefill = self.on_host(chunks, fresh).send(self.upload)
        if fresh is not None:
            fresh.write(token_ids, self.upload)
        return ForwardInputs(token_ids, positions, slots, decode, prefill, self.kv_layers, sink)

    def on_host(self, chunks: Sequence[Chunk], fresh: FreshTokens | None) -> HostStep:
        """The same before it is sent; fresh token ids are 0."""
        counts = np.array([chunk.count for chunk in chunks], dtype=np.int64)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        query_starts = np.zeros(len(chunks) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_starts[1:])
        positions = np.arange(query_starts[-1]) - np.repeat(query_starts[:-1] - starts, counts)
        tables = self._block_tables(chunks)
        owners = np.repeat(np.arange(len(chunks)), counts)
        slots = tables[owners, positions // self._block_size] * self._block_size + positions % self._block_size
        num_decode = sum(chunk.is_decode for chunk in chunks)
        return HostStep(
            numbers=np.stack((token_ids_of(chunks, fresh), positions, slots)),
            decode=self._batch(chunks[:num_decode], tables[:num_decode]),
            prefill=self._batch(chunks[num_decode:], tables[num_decode:]),
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

    def _batch(self, chunks: Sequence[Chunk], tables: NDArray[np.int64]) -> HostBatch | None:
        if not chunks:
            return None
        context_lens = np.array([chunk.end for chunk in chunks], dtype=np.int64)
        counts = [chunk.count for chunk in chunks]
        query_starts = np.zeros(len(chunks) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_starts[1:])
        max_blocks = -(-int(context_lens.max()) // self._block_size)
        return HostBatch(tables[:, :max_blocks], query_starts, context_lens, max(counts))
