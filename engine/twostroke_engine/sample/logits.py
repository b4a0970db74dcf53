"""Adjustments of logits: penalties, bias and masks of end tokens, kept per sequence and built only where needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
from twostroke_kernels.backend import Penalties

from twostroke_engine.runner.growing import GrowingInts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from twostroke_engine.request import SamplingParams
    from twostroke_engine.runner.upload import Upload


class LogitAdjustments:
    """The vocabulary cells of one sequence whose logits change, and how.

    Cells of bias and end tokens come first and are fixed; tokens that the sequence contains follow as they appear.
    """

    def __init__(
        self, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int, end_ids: Sequence[int]
    ) -> None:
        self._params = params
        self._penalizes = params.penalizes
        bias = dict(params.logit_bias)
        fixed = list(dict.fromkeys((*bias, *end_ids)))
        self._cells = {token: cell for cell, token in enumerate(fixed)}
        self._bias = np.array([bias.get(token, 0.0) for token in fixed], dtype=np.float32)
        self._is_end = np.isin(np.array(fixed, dtype=np.int64), np.array(end_ids, dtype=np.int64))
        self._tokens = GrowingInts(fixed)
        self._in_prompt = GrowingInts([0] * len(fixed))
        self._output_counts = GrowingInts([0] * len(fixed))
        if self._penalizes:
            self._count(token_ids, num_prompt_tokens)

    def append(self, token_id: int) -> None:
        """A token was generated."""
        if self._penalizes:
            self._output_counts.add(self._cell(token_id), 1)

    def active(self, num_generated: int) -> bool:
        """Whether any logit changes for the token after `num_generated` ones."""
        return self._penalizes or bool(self._params.logit_bias) or num_generated < self._params.min_tokens

    def tokens(self) -> NDArray[np.int64]:
        """The cells' vocabulary ids, distinct."""
        return self._tokens.view()

    def repetition(self) -> NDArray[np.float32]:
        """Per cell: the factor for tokens of prompt and output."""
        seen = (self._in_prompt.view() + self._output_counts.view()) > 0
        return np.where(seen, self._params.repetition_penalty, 1.0).astype(np.float32)

    def subtract(self, num_generated: int) -> NDArray[np.float32]:
        """Per cell: penalties of the output minus bias; infinity for end tokens that would come too early."""
        counts = self._output_counts.view()
        presence = self._params.presence_penalty * (counts > 0)
        subtract = (presence + self._params.frequency_penalty * counts).astype(np.float32)
        fixed = subtract[: len(self._bias)]
        fixed -= self._bias
        if num_generated < self._params.min_tokens:
            fixed[self._is_end] = np.inf
        return subtract

    def _count(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        for token in dict.fromkeys(token_ids[:num_prompt_tokens]):
            self._in_prompt.add(self._cell(token), 1)
        for token in token_ids[num_prompt_tokens:]:
            self._output_counts.add(self._cell(token), 1)

    def _cell(self, token: int) -> int:
        cell = self._cells.get(token)
        if cell is None:
            cell = self._cells[token] = len(self._tokens)
            self._tokens.append(token)
            self._in_prompt.append(0)
            self._output_counts.append(0)
        return cell


def adjustments_for(
    params: SamplingParams,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    eos_token_ids: Sequence[int],
    vocab_size: int,
) -> LogitAdjustments | None:
    """None for a sequence whose logits are never touched: the common case costs nothing.

    Ids outside the vocabulary are dropped: what cannot be sampled needs neither bias nor mask.
    """
    if not (params.penalizes or params.logit_bias or params.min_tokens):
        return None
    # What does not end the sequence is not masked: with ignore_eos an end token is a token like others.
    ends = (*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)) if params.min_tokens else ()
    end_ids = [token for token in ends if 0 <= token < vocab_size]
    if any(not 0 <= token < vocab_size for token, _ in params.logit_bias):
        params = _with_bias_inside(params, vocab_size)
    return LogitAdjustments(params, token_ids, num_prompt_tokens, end_ids)


def gather_penalties(rows: Sequence[tuple[int, LogitAdjustments, int]], upload: Upload) -> Penalties | None:
    """The adjustments of a batch, (row, adjustments, generated tokens) each; None if no logit changes."""
    active = [entry for entry in rows if entry[1].active(entry[2])]
    if not active:
        return None
    tokens = [adjustments.tokens() for _, adjustments, _ in active]
    row_ids = np.repeat([row for row, _, _ in active], [len(cells) for cells in tokens])
    return Penalties(
        rows=upload(row_ids),
        tokens=upload(np.concatenate(tokens)),
        repetition=upload(np.concatenate([entry[1].repetition() for entry in active])),
        subtract=upload(np.concatenate([entry[1].subtract(entry[2]) for entry in active])),
    )


def _with_bias_inside(params: SamplingParams, vocab_size: int) -> SamplingParams:
    inside = tuple((token, bias) for token, bias in params.logit_bias if 0 <= token < vocab_size)
    return msgspec.structs.replace(params, logit_bias=inside)
