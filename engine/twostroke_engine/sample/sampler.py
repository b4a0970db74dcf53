"""`Sampler`: logits of a step and how each row is sampled -> tokens with their logprobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from twostroke_kernels.backend import SamplingRows

from twostroke_engine.request import TokenOut
from twostroke_engine.runner.upload import downloader, uploader
from twostroke_engine.sample.logits import gather_penalties

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from twostroke_kernels.backend import Backend, SampledRows

    from twostroke_engine.request import SamplingParams
    from twostroke_engine.runner.upload import Download
    from twostroke_engine.sample.logits import LogitAdjustments

NOTHING = TokenOut(0)
"""Stands for the token of a row whose logits were not finite."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to be chosen."""

    params: SamplingParams
    choice: int
    position: int
    """Absolute index of the token to be chosen."""
    num_generated: int
    adjustments: LogitAdjustments | None


@dataclass(frozen=True, slots=True)
class Chosen:
    """One chosen token."""

    token: TokenOut
    finite: bool


class Choosing:
    """Tokens that a device is choosing."""

    def __init__(self, sampled: SampledRows, rows: Sequence[SampleRow], download: Download) -> None:
        self.token_ids = sampled.token_ids
        """On the device, for whoever goes on there."""
        self._rows = rows
        wants_logprobs = any(row.params.logprobs is not None for row in rows)
        logprobs = (sampled.logprobs, sampled.top_ids, sampled.top_logprobs) if wants_logprobs else ()
        self._fetch = download((sampled.token_ids, sampled.finite, *logprobs))

    def result(self) -> list[Chosen]:
        """Waits for them."""
        ids, finite, *logprobs = (tensor.tolist() for tensor in self._fetch())
        if not logprobs:
            return [Chosen(TokenOut(ids[at]) if finite[at] else NOTHING, finite[at]) for at in range(len(ids))]
        return [
            Chosen(_token(row.params.logprobs, at, ids, *logprobs) if finite[at] else NOTHING, finite[at])
            for at, row in enumerate(self._rows)
        ]


def _token(
    num_top: int | None,
    at: int,
    ids: list[int],
    logprobs: list[float],
    top_ids: list[list[int]],
    top_logprobs: list[list[float]],
) -> TokenOut:
    if num_top is None:
        return TokenOut(ids[at])
    top = tuple(zip(top_ids[at][:num_top], top_logprobs[at][:num_top], strict=True))
    return TokenOut(ids[at], logprobs[at], top)


class Sampler:
    """Chooses tokens with a backend's operations."""

    def __init__(self, backend: Backend, vocab_size: int) -> None:
        self._backend = backend
        self._vocab_size = vocab_size
        self._upload = uploader(backend.device)
        self._download = downloader(backend.device)

    def sample(self, raw_logits: Tensor, rows: Sequence[SampleRow]) -> list[Chosen]:
        """One token per row of `raw_logits` [R, V], float32."""
        return self.start(raw_logits, rows).result()

    def start(self, raw_logits: Tensor, rows: Sequence[SampleRow]) -> Choosing:
        """The same, not waited for."""
        penalties = gather_penalties(
            [(at, row.adjustments, row.num_generated) for at, row in enumerate(rows) if row.adjustments is not None],
            self._upload,
        )
        logits = raw_logits
        if penalties is not None:
            logits = raw_logits.clone()
            self._backend.penalize(logits, penalties)
        sampled = self._backend.sample(raw_logits, logits, self._sampling_rows(rows))
        return Choosing(sampled, rows, self._download)

    def _sampling_rows(self, rows: Sequence[SampleRow]) -> SamplingRows:
        params = [row.params for row in rows]
        # Keeping the whole vocabulary, however it was said, is 0: the backend then skips the filter.
        top_k = [p.top_k if 0 < p.top_k < self._vocab_size else 0 for p in params]
        seeds = np.array([p.seed & 0xFFFF_FFFF_FFFF_FFFF for p in params], dtype=np.uint64).view(np.int64)
        choices, positions = [row.choice for row in rows], [row.position for row in rows]
        # Two copies to the device, not seven.
        integers = self._upload(np.array([top_k, seeds, choices, positions], dtype=np.int64))
        floats = self._upload(
            np.array([[getattr(p, name) for p in params] for name in ("temperature", "top_p", "min_p")], np.float32)
        )
        return SamplingRows(
            temperature=floats[0],
            top_k=integers[0],
            top_p=floats[1],
            min_p=floats[2],
            seed=integers[1],
            choice=integers[2],
            position=integers[3],
            all_greedy=all(p.temperature == 0 for p in params),
            num_logprobs=min(self._vocab_size, max(-1 if p.logprobs is None else p.logprobs for p in params)),
        )
