"""`KVLayout`: which heads and layers of a `KVSpec` one rank holds, and which rank sends what to whom. Pure, torch-free.

With one rank on each side both layouts are `KVLayout.whole(spec)` and there is one route; the types carry heads so
that unequal ranks need no new message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twostroke_engine.kv.spec import KVSpec


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Layers [first_layer, first_layer + num_layers) and the KV heads likewise, of one rank."""

    spec: KVSpec
    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer < self.first_layer + self.num_layers <= self.spec.num_layers:
            raise ValueError(f"layers {self.first_layer} + {self.num_layers} of {self.spec.num_layers}")
        if not 0 <= self.first_head < self.first_head + self.num_heads <= self.spec.groups[0].num_kv_heads:
            raise ValueError(f"heads {self.first_head} + {self.num_heads} of {self.spec.groups[0].num_kv_heads}")

    @classmethod
    def whole(cls, spec: KVSpec) -> KVLayout:
        """The layout of a rank that is alone."""
        return cls(spec, 0, spec.num_layers, 0, spec.groups[0].num_kv_heads)

    @property
    def head_dim(self) -> int:
        """Numbers in a head."""
        return self.spec.groups[0].head_dim

    def shared(self, other: KVLayout) -> KVLayout | None:
        """The heads and layers that both hold, of this layout's spec; None if there are none."""
        first_layer = max(self.first_layer, other.first_layer)
        num_layers = min(self.first_layer + self.num_layers, other.first_layer + other.num_layers) - first_layer
        first_head = max(self.first_head, other.first_head)
        num_heads = min(self.first_head + self.num_heads, other.first_head + other.num_heads) - first_head
        if num_layers < 1 or num_heads < 1:
            return None
        return KVLayout(self.spec, first_layer, num_layers, first_head, num_heads)


@dataclass(frozen=True, slots=True)
class KVRoute:
    """What one rank of the sender sends to one rank of the receiver."""

    source: int
    target: int
    part: KVLayout


def rank_layouts(spec: KVSpec, num_ranks: int) -> tuple[KVLayout, ...]:
    """Tensor-parallel ranks: equal shares of the heads, or each head on equally many ranks if ranks outnumber them.

    Raises:
        ValueError: neither works out.
    """
    num_heads = spec.groups[0].num_kv_heads
    if num_ranks < 1 or (num_heads % num_ranks and num_ranks % num_heads):
        raise ValueError(f"{num_heads} KV heads cannot be shared by {num_ranks} ranks")
    share = max(1, num_heads // num_ranks)
    firsts = (rank * num_heads // num_ranks for rank in range(num_ranks))
    return tuple(KVLayout(spec, 0, spec.num_layers, first, share) for first in firsts)


def plan_routes(sources: Sequence[KVLayout], targets: Sequence[KVLayout]) -> tuple[KVRoute, ...]:
    """Who sends what: every head and layer of every target comes from one source, the first that holds it.

    Layouts of the sources must be equal or apart, as `rank_layouts` makes them.
    """
    owners = {(layout.first_layer, layout.first_head): rank for rank, layout in reversed(list(enumerate(sources)))}
    routes = []
    for target, wanted in enumerate(targets):
        for source in sorted(owners.values()):
            part = sources[source].shared(wanted)
            if part is not None:
                routes.append(KVRoute(source, target, part))
    return tuple(routes)
