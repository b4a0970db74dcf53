"""`ParallelGroup`: the ranks that hold one model together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class ParallelGroup(Protocol):
    """This rank's place among others, and what they do together."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks; may reuse `x`'s memory."""
        ...


class OneRank:
    """A whole model on one rank."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over one rank."""
        return x
