"""`ForwardPath`: from a step's chunks to logits. `EagerForward` is the plain way, and the only one on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from twostroke_engine.runner.inputs import InputBuilder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from twostroke_engine.model.decoder import Decoder
    from twostroke_engine.runner.inputs import Chunk, FreshTokens
    from twostroke_engine.transfer.end import KVSink


class ForwardPath(Protocol):
    """One way to run the model."""

    overlaps: bool
    """A step's launch returns before the device has computed it."""

    def logits(
        self, chunks: Sequence[Chunk], rows: Sequence[int], sink: KVSink, fresh: FreshTokens | None = None
    ) -> Tensor | None:
        """Computes a step and writes its KV.

        Args:
            chunks: at least one token each; decoding ones come first.
            rows: of the step's tokens, those whose logits are wanted.
            sink: hears of each layer.
            fresh: token ids that the chunks' sequences do not hold yet.

        Returns:
            float32 [rows, V], good until the next step; None if no rows are wanted.
        """
        ...


class EagerForward:
    """Builds new tensors for every step and launches every operation."""

    def __init__(self, decoder: Decoder, pool: Tensor) -> None:
        self.overlaps = pool.device.type == "cuda"
        self._decoder = decoder
        self._inputs = InputBuilder(pool, block_size=pool.shape[3])

    def logits(
        self, chunks: Sequence[Chunk], rows: Sequence[int], sink: KVSink, fresh: FreshTokens | None = None
    ) -> Tensor | None:
        """See `ForwardPath.logits`."""
        hidden = self._decoder(self._inputs.build(chunks, sink, fresh))
        if not rows:
            return None
        return self._decoder.logits(hidden, self._inputs.upload(np.array(rows, dtype=np.int64)))
