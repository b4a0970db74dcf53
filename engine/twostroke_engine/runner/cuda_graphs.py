"""`GraphForward`: decode steps replay a CUDA graph, one for each padded batch size; other steps run eagerly.

A decode step launches some three hundred kernels. Launched one by one they keep the host busy for longer than the GPU
computes; replayed, the whole step costs the host microseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from twostroke_kernels.backend import PagedBatch

from twostroke_engine.runner.decode_rows import CONTEXT_LEN, POSITION, SLOT, TOKEN, DecodeRows, padded_sizes, size_for
from twostroke_engine.runner.forward import EagerForward
from twostroke_engine.runner.inputs import ForwardInputs
from twostroke_engine.runner.upload import uploader
from twostroke_engine.transfer.end import NoSink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from twostroke_engine.model.decoder import Decoder
    from twostroke_engine.runner.forward import ForwardPath
    from twostroke_engine.runner.inputs import Chunk
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

    def fill(self, chunks: Sequence[Chunk], size: int, token_ids: Tensor | None = None) -> None:
        """Takes in a step; the copies are queued, not waited for. `token_ids`: what the host does not know yet."""
        if self._rows.fill(chunks, size, knows_tokens=token_ids is None):
            tables = self._upload(self._rows.tables(size))
            self._tables[:size, : tables.shape[1]].copy_(tables)
        self._numbers[:, :size].copy_(self._upload(self._rows.numbers(size)))
        if token_ids is not None:
            self._numbers[TOKEN, : len(chunks)].copy_(token_ids)

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

    lookahead = 1

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, eager: ForwardPath, buffers: DecodeBuffers, sizes: Sequence[int]) -> None:
        self.eager = eager
        self.num_replays = 0
        self._decoder = decoder
        self._buffers = buffers
        self._sizes = tuple(sizes)
        self._memory = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones then fit into the memory that it used.
        self._graphs = {size: self._capture(size) for size in reversed(self._sizes)}
        torch.cuda.synchronize()

    def logits(self, chunks: Sequence[Chunk], rows: Sequence[int], sink: KVSink) -> Tensor | None:
        """See `ForwardPath.logits`. A step that someone listens to runs eagerly: a replay cannot tell of layers."""
        # Chunks of one token come first, so the last one speaks for all.
        if chunks[-1].count > 1 or len(chunks) > self._sizes[-1] or not isinstance(sink, NoSink):
            return self.eager.logits(chunks, rows, sink)
        logits = self._replay(chunks, None)
        if len(rows) == len(chunks):
            return logits
        return self._buffers.logits[torch.tensor(rows, device=self._buffers.logits.device)] if rows else None

    def ahead(self, chunks: Sequence[Chunk], token_ids: Tensor) -> Tensor | None:
        """See `ForwardPath.ahead`."""
        return self._replay(chunks, token_ids) if len(chunks) <= self._sizes[-1] else None

    def _replay(self, chunks: Sequence[Chunk], token_ids: Tensor | None) -> Tensor:
        size = size_for(len(chunks), self._sizes)
        self._buffers.fill(chunks, size, token_ids)
        self._graphs[size].replay()
        self.num_replays += 1
        return self._buffers.logits[: len(chunks)]

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        inputs, out = self._buffers.inputs(size), self._buffers.logits[:size]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Once outside of the capture: kernels are compiled and libraries set up, which a capture does not allow.
            self._run(inputs, out)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
            self._run(inputs, out)
        return graph

    def _run(self, inputs: ForwardInputs, out: Tensor) -> None:
        self._decoder.write_logits(self._decoder(inputs), out)


def graph_forward(decoder: Decoder, pool: Tensor, max_model_len: int, logits: Tensor) -> GraphForward:
    """Graphs over a pool whose last block is scratch, as many rows as `logits` [R, V] has."""
    max_rows = logits.shape[0]
    buffers = DecodeBuffers(pool, max_rows, -(-max_model_len // pool.shape[3]), logits)
    # A scratch block at the end is no one's: chunks never name it, so the eager path may see the whole pool.
    return GraphForward(decoder, EagerForward(decoder, pool), buffers, padded_sizes(max_rows))
