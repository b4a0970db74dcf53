"""`GraphForward`: decode steps replay a CUDA graph, one for each padded batch size.

A decode step launches some three hundred kernels. Launched one by one they keep the host busy for longer than the GPU
computes; replayed, the whole step costs the host microseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from twostroke_kernels.backend import PagedBatch

from twostroke_engine.runner.capture import Capturer
from twostroke_engine.runner.decode_rows import CONTEXT_LEN, POSITION, SLOT, TOKEN, DecodeRows, padded_sizes, size_for
from twostroke_engine.runner.forward import EagerForward
from twostroke_engine.runner.inputs import ForwardInputs
from twostroke_engine.runner.piecewise import PieceBuffers, PieceForward, captured_pieces, piece_sizes
from twostroke_engine.runner.upload import uploader
from twostroke_engine.transfer.end import NoSink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from twostroke_engine.model.decoder import Decoder
    from twostroke_engine.runner.forward import ForwardPath
    from twostroke_engine.runner.inputs import Chunk, FreshTokens
    from twostroke_engine.transfer.end import KVSink


class DecodeBuffers:
    """What captured graphs read and write: the same memory in every step."""

    def __init__(self, pool: Tensor, max_rows: int, max_blocks: int, logits: Tensor) -> None:
        scratch_block = pool.shape[0] - 1
        self.logits = logits
        self._rows = DecodeRows(max_rows, max_blocks, pool.shape[3], scratch_block)
        self._upload = uploader(pool.device)
        self._numbers = torch.zeros(4, max_rows, dtype=torch.int64, device=pool.device)
        self._tables = torch.full((max_rows, max_blocks), scratch_block, dtype=torch.int64, device=pool.device)
        self._query_starts = torch.arange(max_rows + 1, device=pool.device)
        self._kv_layers = tuple(pool[:, layer] for layer in range(pool.shape[1]))
        self._max_context_len = max_blocks * pool.shape[3]
        self.fill((), max_rows)

    def fill(self, chunks: Sequence[Chunk], size: int, fresh: FreshTokens | None = None) -> None:
        """Takes in a step; the copies are queued, not waited for."""
        if self._rows.fill(chunks, size, fresh):
            tables = self._upload(self._rows.tables(size))
            self._tables[:size, : tables.shape[1]].copy_(tables)
        self._numbers[:, :size].copy_(self._upload(self._rows.numbers(size)))
        if fresh is not None:
            fresh.write(self._numbers[TOKEN], self._upload)

    def inputs(self, size: int) -> ForwardInputs:
        """The first rows, as a decoder reads them."""
        numbers = self._numbers[:, :size]
        batch = PagedBatch(
            block_tables=self._tables[:size],
            query_starts=self._query_starts[: size + 1],
            context_lens=numbers[CONTEXT_LEN],
            max_query_len=1,
            max_context_len=self._max_context_len,
        )
        return ForwardInputs(
            token_ids=numbers[TOKEN],
            positions=numbers[POSITION],
            slots=numbers[SLOT],
            decode=batch,
            prefill=None,
            kv_layers=self._kv_layers,
            sink=NoSink(),
        )


class GraphForward:
    """Replays what it captured at construction: nothing is captured while a request waits."""

    overlaps = True

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, rest: ForwardPath, buffers: DecodeBuffers, sizes: Sequence[int], capturer: Capturer
    ) -> None:
        """Steps that do more than decode, or decode more than the largest of `sizes`, go to `rest`."""
        self.rest = rest
        self.num_replays = 0
        self._decoder = decoder
        self._buffers = buffers
        self._upload = uploader(buffers.logits.device)
        self._sizes = tuple(sizes)
        # The largest first: the smaller ones then fit into the memory that it used.
        self._graphs = {size: self._capture(size, capturer) for size in reversed(self._sizes)}
        torch.cuda.synchronize()

    def logits(
        self, chunks: Sequence[Chunk], rows: Sequence[int], sink: KVSink, fresh: FreshTokens | None = None
    ) -> Tensor | None:
        """See `ForwardPath.logits`. A step that someone listens to goes to `rest`: a replay cannot tell of layers."""
        # Decoding chunks come first, so the last one speaks for all.
        if not chunks[-1].is_decode or len(chunks) > self._sizes[-1] or not isinstance(sink, NoSink):
            return self.rest.logits(chunks, rows, sink, fresh)
        size = size_for(len(chunks), self._sizes)
        self._buffers.fill(chunks, size, fresh)
        self._graphs[size]()
        self.num_replays += 1
        if len(rows) == len(chunks):
            return self._buffers.logits[: len(chunks)]
        return self._buffers.logits[self._upload(np.array(rows, dtype=np.int64))] if rows else None

    def _capture(self, size: int, capturer: Capturer) -> Callable[[], None]:
        inputs, out = self._buffers.inputs(size), self._buffers.logits[:size]

        def run() -> None:
            self._decoder.write_logits(self._decoder(inputs), out)

        capturer.warm(run)
        return capturer.capture(run)


def graph_forward(
    decoder: Decoder, pool: Tensor, max_model_len: int, max_step_tokens: int, logits: Tensor
) -> GraphForward:
    """Graphs over a pool whose last block is scratch; of decode steps of as many rows as `logits` [R, V] has."""
    max_rows = logits.shape[0]
    capturer = Capturer()
    sizes = piece_sizes(max_step_tokens)
    pieces = PieceBuffers(decoder, pool, sizes[-1])
    captured = captured_pieces(decoder, pieces, sizes, capturer)
    # A scratch block at the end is no one's: chunks never name it, so the eager path may see the whole pool.
    rest = PieceForward(decoder, EagerForward(decoder, pool), pieces, captured, logits)
    buffers = DecodeBuffers(pool, max_rows, -(-max_model_len // pool.shape[3]), logits)
    return GraphForward(decoder, rest, buffers, padded_sizes(max_rows), capturer)
