"""`KVLayout`: which heads and layers of a `KVSpec` one rank holds. Pure, torch-free.

With one rank on each side both layouts are `KVLayout.whole(spec)`; the types carry heads so that unequal ranks need no
new message.
"""

from __future__ import annotations

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
    def layer_block_bytes(self) -> int:
        """Bytes of one layer of one block, of this rank's heads."""
        return self.spec.layer_block_bytes * self.num_heads // self.spec.groups[0].num_kv_heads
