"""`Sampler`: logits of a step and how each row is sampled -> tokens with their logprobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from twostroke_kernels.backend import SamplingRows

from twostroke_engine.request import TokenOut
from twostroke_engine.sample.logits import gather_penalties

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from twostroke_kernels.backend import Backend, SampledRows

    from twostroke_engine.request import SamplingParams
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


class Sampler:
    """Chooses tokens with a backend's operations."""

    def __init__(self, backend: Backend, vocab_size: int) -> None:
        self._backend = backend
        self._vocab_size = vocab_size

    def sample(self, raw_logits: Tensor, rows: Sequence[SampleRow]) -> list[Chosen]:
        """One token per row of `raw_logits` [R, V], float32."""
        penalties = gather_penalties(
            [(at, row.adjustments, row.num_generated) for at, row in enumerate(rows) if row.adjustments is not None],
            self._backend.device,
        )
        logits = raw_logits
        if penalties is not None:
            logits = raw_logits.clone()
            self._backend.penalize(logits, penalties)
        return _chosen(self._backend.sample(raw_logits, logits, self._sampling_rows(rows)), rows)

    def _sampling_rows(self, rows: Sequence[SampleRow]) -> SamplingRows:
        params = [row.params for row in rows]
        # Keeping the whole vocabulary, however it was said, is 0: the backend then skips the filter.
        top_k = [p.top_k if 0 < p.top_k < self._vocab_size else 0 for p in params]
        seeds = np.array([p.seed & 0xFFFF_FFFF_FFFF_FFFF for p in params], dtype=np.uint64)
        return SamplingRows(
            temperature=self._floats([p.temperature for p in params]),
            top_k=self._ints(top_k),
            top_p=self._floats([p.top_p for p in params]),
            min_p=self._floats([p.min_p for p in params]),
            seed=torch.from_numpy(seeds.view(np.int64)).to(self._backend.device),
            choice=self._ints([row.choice for row in rows]),
            position=self._ints([row.position for row in rows]),
            all_greedy=all(p.temperature == 0 for p in params),
            num_logprobs=min(self._vocab_size, max(-1 if p.logprobs is None else p.logprobs for p in params)),
        )

    def _floats(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._backend.device)

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._backend.device)


def _chosen(sampled: SampledRows, rows: Sequence[SampleRow]) -> list[Chosen]:
    ids, logprobs = sampled.token_ids.tolist(), sampled.logprobs.tolist()
    finite = sampled.finite.tolist()
    top_ids, top_logprobs = sampled.top_ids.tolist(), sampled.top_logprobs.tolist()
    chosen = []
    for at, row in enumerate(rows):
        if not finite[at]:
            chosen.append(Chosen(NOTHING, finite=False))
            continue
        num_top = row.params.logprobs
        if num_top is None:
            token = TokenOut(ids[at])
        else:
            top = tuple(zip(top_ids[at][:num_top], top_logprobs[at][:num_top], strict=True))
            token = TokenOut(ids[at], logprobs[at], top)
        chosen.append(Chosen(token, finite=True))
    return chosen
