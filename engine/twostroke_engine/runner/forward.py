"""`ForwardPath`: from a step's chunks to logits. `EagerForward` is the plain way, and the only one on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from twostroke_engine.runner.inputs import InputBuilder
from twostroke_engine.runner.upload import uploader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from twostroke_engine.model.decoder import Decoder
    from twostroke_engine.runner.inputs import Chunk
    from twostroke_engine.transfer.end import KVSink


class ForwardPath(Protocol):
    """One way to run the model."""

    lookahead: int
    """Steps that may be launched before the tokens of the one before are known."""

    def logits(self, chunks: Sequence[Chunk], rows: Sequence[int], sink: KVSink) -> Tensor | None:
        """Computes a step and writes its KV.

        Args:
            chunks: at least one token each; those of one token come first.
            rows: of the step's tokens, those whose logits are wanted.
            sink: hears of each layer.

        Returns:
            float32 [rows, V], good until the next step; None if no rows are wanted.
        """
        ...

    def ahead(self, chunks: Sequence[Chunk], token_ids: Tensor) -> Tensor | None:
        """Launches a decode step whose tokens only the device knows, float32 logits [chunks, V]; None if it is no gain.

        The host does not wait, so this pays only where launching a step takes less time than the step.
        """
        ...


class EagerForward:
    """Builds new tensors for every step and launches every operation."""

    lookahead = 0

    def __init__(self, decoder: Decoder, pool: Tensor) -> None:
        self._decoder = decoder
        self._inputs = InputBuilder(pool, block_size=pool.shape[3])
        self._upload = uploader(pool.device)

    def logits(self, chunks: Sequence[Chunk], rows: Sequence[int], sink: KVSink) -> Tensor | None:
        """See `ForwardPath.logits`."""
        hidden = self._decoder(self._inputs.build(chunks, sink))
        if not rows:
            return None
        return self._decoder.logits(hidden, self._upload(np.array(rows, dtype=np.int64)))

    def ahead(self, chunks: Sequence[Chunk], token_ids: Tensor) -> Tensor | None:
        """Never: a CPU computes when it is told to."""
        return None
