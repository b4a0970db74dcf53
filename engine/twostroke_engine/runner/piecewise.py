"""`PieceForward`: steps with prompts replay a CUDA graph for each piece between two attentions.

What lies between attentions depends on the number of tokens alone, so it is captured for some padded numbers of them.
Attention itself, whose work depends on every sequence's length, is launched in between, as is whoever listens told of
each layer. A step thus costs the host one replay and one or two launches a layer, not a dozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from twostroke_engine.runner.decode_rows import size_for
from twostroke_engine.runner.inputs import ForwardInputs, HostStep, InputBuilder
from twostroke_engine.transfer.end import NoSink

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from twostroke_engine.model.decoder import Activations, Decoder
    from twostroke_engine.runner.capture import Capturer
    from twostroke_engine.runner.forward import ForwardPath
    from twostroke_engine.runner.inputs import Chunk, FreshTokens
    from twostroke_engine.transfer.end import KVSink

    Pieces = Sequence[Callable[[], None]]
    """A call for each piece of a forward pass, in order."""

MAX_PIECE_TOKENS = 2048
"""Beyond, a GPU computes for longer than a host takes to launch a step."""


def piece_sizes(max_step_tokens: int) -> tuple[int, ...]:
    """Numbers of tokens worth capturing, ascending; the last holds `max_step_tokens`.

    Products are cut into tiles of 128 rows or so: a step padded to a multiple of them takes hardly longer. Of the sizes
    beyond `MAX_PIECE_TOKENS` only the full step is captured: under load most steps are full, and launching two of them
    kernel by kernel fills the driver's queue, where the host then waits instead of passing tokens on.
    """
    sizes = (16, 32, 64, *range(128, MAX_PIECE_TOKENS + 1, 128))
    fine = sizes[: 1 + sum(size < max_step_tokens for size in sizes)]
    return fine if max_step_tokens <= MAX_PIECE_TOKENS else (*fine, max_step_tokens)


def piece_size(num_tokens: int, sizes: Sequence[int]) -> int | None:
    """The size that a step is padded to; None: it is larger than all, or padding would cost more than launching."""
    if num_tokens > sizes[-1]:
        return None
    size = size_for(num_tokens, sizes)
    return None if size > MAX_PIECE_TOKENS and 32 * (size - num_tokens) > size else size


class PieceBuffers:
    """What captured pieces read and write: the same memory in every step."""

    def __init__(self, decoder: Decoder, pool: Tensor, max_tokens: int) -> None:
        self.builder = InputBuilder(pool, pool.shape[3])
        self._scratch_slot = (pool.shape[0] - 1) * pool.shape[3]
        self._numbers = torch.empty(3 * max_tokens, dtype=torch.int64, device=pool.device)
        self._activations = decoder.activations(max_tokens)

    def activations(self, num_tokens: int) -> Activations:
        """The first rows."""
        return self._activations.first(num_tokens)

    def inputs(self, size: int) -> ForwardInputs:
        """What pieces of `size` tokens read: until a step is taken in, padding."""
        token_ids, positions, slots = numbers = self._numbers[: 3 * size].view(3, size)
        numbers[:2] = 0
        slots.fill_(self._scratch_slot)
        return ForwardInputs(token_ids, positions, slots, None, None, self.builder.kv_layers, NoSink())

    def fill(self, step: HostStep, size: int, sink: KVSink, fresh: FreshTokens | None) -> ForwardInputs:
        """Takes in a step, padded to `size` tokens, and returns what its attentions read; nothing is waited for.

        A padding token is token 0 at position 0 of the scratch block, which belongs to no sequence.
        """
        num_tokens = step.numbers.shape[1]
        numbers = np.zeros((3, size), dtype=np.int64)
        numbers[2, num_tokens:] = self._scratch_slot
        numbers[:, :num_tokens] = step.numbers
        sent, decode, prefill = HostStep(numbers, step.decode, step.prefill).send(self.builder.upload)
        static = self._numbers[: 3 * size].view(3, size)
        static.copy_(sent)
        token_ids, positions, slots = static
        if fresh is not None:
            fresh.write(token_ids, self.builder.upload)
        return ForwardInputs(token_ids, positions, slots, decode, prefill, self.builder.kv_layers, sink)


class PieceForward:
    """Computes steps that fit one of the sizes of pieces; others go to `eager`."""

    overlaps = True

    def __init__(
        self, decoder: Decoder, eager: ForwardPath, buffers: PieceBuffers, pieces: Mapping[int, Pieces], logits: Tensor
    ) -> None:
        """`pieces` by their number of tokens; logits of as many rows as `logits` [R, V] has are written there."""
        self.eager = eager
        self.num_steps = 0
        self._decoder = decoder
        self._buffers = buffers
        self._pieces = pieces
        self._logits = logits
        self._sizes = sorted(pieces)

    @torch.inference_mode()
    def logits(
        self, chunks: Sequence[Chunk], rows: Sequence[int], sink: KVSink, fresh: FreshTokens | None = None
    ) -> Tensor | None:
        """See `ForwardPath.logits`."""
        num_tokens = sum(chunk.count for chunk in chunks)
        size = piece_size(num_tokens, self._sizes)
        if size is None:
            return self.eager.logits(chunks, rows, sink, fresh)
        self.num_steps += 1
        builder, pieces = self._buffers.builder, self._pieces[size]
        inputs = self._buffers.fill(builder.on_host(chunks, fresh), size, sink, fresh)
        step = self._buffers.activations(num_tokens)
        self._decoder.run(inputs, step, lambda number: pieces[number]())
        if not rows:
            return None
        out = self._logits[: len(rows)] if len(rows) <= len(self._logits) else None
        return self._decoder.logits(step.hidden, builder.upload(np.array(rows, dtype=np.int64)), out)


def launched_pieces(decoder: Decoder, buffers: PieceBuffers, size: int) -> Pieces:
    """Pieces that launch every operation over the static buffers."""
    inputs, step = buffers.inputs(size), buffers.activations(size)

    def piece(number: int) -> Callable[[], None]:
        return lambda: decoder.run_piece(number, inputs, step)

    return [piece(number) for number in range(decoder.num_pieces)]


@torch.inference_mode()
def captured_pieces(
    decoder: Decoder, buffers: PieceBuffers, sizes: Sequence[int], capturer: Capturer
) -> dict[int, Pieces]:
    """Captures the pieces of every size."""
    captured: dict[int, Pieces] = {}
    for size in reversed(sizes):
        pieces = launched_pieces(decoder, buffers, size)
        # Pieces between two layers launch the same kernels.
        for number in sorted({0, min(1, len(pieces) - 1), len(pieces) - 1}):
            capturer.warm(pieces[number])
        captured[size] = [capturer.capture(piece) for piece in pieces]
    return captured
