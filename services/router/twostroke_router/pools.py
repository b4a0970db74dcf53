"""The cluster as placement sees it: the workers of each role as columns of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


_LONGEST = 2**62


def _zeros() -> Floats:
    return np.zeros(0)


@dataclass(slots=True, kw_only=True)
class Pool:
    """Workers of one role that take new work; row i of every column is worker `ids[i]`. Shapes [workers]."""

    ids: list[str] = field(default_factory=list)
    kinds: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """Workers of one kind can hand KV over to, or take it from, the same others: see `View.hands_over`."""
    max_model_len: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    shortest_len: int = 0
    """The least of `max_model_len`."""
    hit_tokens: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """Leading prompt tokens of the request in its prefix cache."""
    queued_tokens: Floats = field(default_factory=_zeros)
    """Prompt tokens to compute before the request's, those included that this router placed and it has not reported."""
    sequences: Floats = field(default_factory=_zeros)
    """Running, waiting, and placed but not reported."""
    free_tokens: Floats = field(default_factory=_zeros)
    """KV tokens that it has room for: free and evictable blocks, less what is promised or placed."""
    token_s: Floats = field(default_factory=_zeros)
    """Seconds that it takes to compute one more prompt token."""
    step_s: Floats = field(default_factory=_zeros)
    """Seconds of a decode step of no sequences."""
    sequence_s: Floats = field(default_factory=_zeros)
    """Seconds that each sequence adds to a decode step."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, ids: Sequence[str], **columns: Sequence[float]) -> Pool:
        """A pool with these columns, and zeros in the others."""
        num_workers = len(ids)
        pool = cls(ids=list(ids))
        for name in ("kinds", "max_model_len", "hit_tokens"):
            setattr(pool, name, np.array(columns.pop(name, [0] * num_workers), np.int64))
        for name in ("queued_tokens", "sequences", "free_tokens", "token_s", "step_s", "sequence_s"):
            setattr(pool, name, np.array(columns.pop(name, [0.0] * num_workers), np.float64))
        pool.shortest_len = int(pool.max_model_len.min(initial=_LONGEST))
        if columns:
            raise TypeError(f"a pool has no column {', '.join(columns)}")
        return pool


@dataclass(slots=True, frozen=True)
class View:
    """The cluster at one moment, for one request."""

    prefill: Pool
    decode: Pool
    hands_over: Bools
    """Whether prefill workers of kind i can hand over to decode workers of kind j, shape [kinds, kinds]."""
    turn: int = 0
    """Grows by one for each placement: breaks ties evenly."""

    def __iter__(self) -> Iterator[Pool]:
        return iter((self.prefill, self.decode))
