"""When a choice ends. Stop strings are the router's; everything that tokens alone decide is here."""

from __future__ import annotations

from collections.abc import Iterable

from twostroke_engine.request import FinishReason, SamplingParams
from twostroke_engine.sequence import Sequence


class StopRules:
    """End tokens of the model, and the most tokens that a sequence may have."""

    def __init__(self, eos_token_ids: Iterable[int], max_model_len: int) -> None:
        self._eos = frozenset(eos_token_ids)
        self._max_model_len = max_model_len

    def finish(self, sequence: Sequence) -> FinishReason | None:
        """Why the choice ended with its newest token; None if it goes on. The end token itself belongs to it."""
        sampling = sequence.request.sampling
        if sequence.num_generated > sampling.min_tokens and self._is_end(sequence.token_ids[-1], sampling):
            return FinishReason.STOP
        if sequence.num_generated >= sampling.max_tokens or sequence.num_tokens >= self._max_model_len:
            return FinishReason.LENGTH
        return None

    def _is_end(self, token_id: int, sampling: SamplingParams) -> bool:
        return token_id in sampling.stop_token_ids or (token_id in self._eos and not sampling.ignore_eos)
