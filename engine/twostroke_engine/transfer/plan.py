"""What to send of a prompt, and when: segments that tile layers x tokens exactly once. Pure, torch-free.

A prompt is computed in chunks and a chunk layer by layer, so its KV becomes ready as a staircase. `plan_transfer` cuts
one chunk's part of it into segments, leaves out the blocks that decode holds already, and says after which layer of the
forward pass each segment may go. `Tiling` is the receiver's proof that nothing is missing and nothing came twice.

Segments count in blocks of the wire, of which whole numbers make a block of either side. A hit is whole blocks of the
side that has it, so it is whole blocks of the wire, wherever it ends in a block of the other side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from twostroke_engine.transfer.layout import KVLayout
from twostroke_engine.transfer.wire import WireFormat

MAX_SEGMENT_BYTES = 32 << 20
"""Of a segment that takes up memory on its way."""
MAX_WRITTEN_BYTES = 1 << 30
"""Of a segment that is written where it belongs."""
"""Larger segments gain no bandwidth and need a larger staging buffer on both sides."""

BEFORE_STEP = -1
"""As `after_layer`: ready without a forward pass (prefix hits)."""


@dataclass(frozen=True, slots=True)
class KVSegment:
    """One channel message: layers x blocks x heads; the wire's blocks are counted from the prompt's first."""

    first_layer: int
    num_layers: int
    first_block: int
    num_blocks: int
    first_head: int
    num_heads: int
    after_layer: int = BEFORE_STEP
    """It exists once the forward pass has written this layer."""


@dataclass(frozen=True, slots=True)
class KVTransferPlan:
    """A chunk's segments in the order in which they become ready."""

    segments: tuple[KVSegment, ...]

    def ready(self, num_sent: int, layer: int) -> tuple[KVSegment, ...]:
        """Segments after the first `num_sent` that may go once `layer` was written."""
        stop = num_sent
        while stop < len(self.segments) and self.segments[stop].after_layer <= layer:
            stop += 1
        return self.segments[num_sent:stop]


@dataclass(frozen=True, slots=True)
class ChunkBlocks:
    """Blocks of a prompt that one chunk makes ready: [first, hit) before the step, [hit, ready) layer by layer."""

    first_block: int
    num_hit_blocks: int
    num_ready_blocks: int

    def divided(self, split: int, num_blocks: int) -> ChunkBlocks:
        """The same in blocks of which `split` make one of these, and `num_blocks` the prompt: the last ones of a
        partial block hold no token."""
        first, hit, ready = self.first_block * split, self.num_hit_blocks * split, self.num_ready_blocks * split
        return ChunkBlocks(min(first, num_blocks), min(hit, num_blocks), min(ready, num_blocks))

    def without(self, num_held_blocks: int) -> ChunkBlocks:
        """The same, less the leading blocks that the receiver holds."""
        first = max(self.first_block, num_held_blocks)
        return ChunkBlocks(first, max(self.num_hit_blocks, first), max(self.num_ready_blocks, first))


@dataclass(frozen=True, slots=True)
class SegmentShape:
    """How large segments are, and what they are made of."""

    layout: KVLayout
    """Heads and layers that travel, of one side's cache."""
    layers_per_segment: int
    wire: WireFormat
    max_bytes: int = MAX_SEGMENT_BYTES

    def __post_init__(self) -> None:
        if self.layout.spec.block_size % self.wire.block_size:
            raise ValueError(f"items of {self.wire.block_size} tokens, blocks of {self.layout.spec.block_size}")
        if self.layers_per_segment < 1:
            raise ValueError(f"layers_per_segment must be positive, not {self.layers_per_segment}")

    @property
    def split(self) -> int:
        """Blocks of the wire in a block of this side."""
        return self.layout.spec.block_size // self.wire.block_size

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one layer of one block on the wire."""
        return self.wire.layer_block_bytes(self.layout.num_heads, self.layout.head_dim)

    def items(self, segment: KVSegment, block_ids: Sequence[int]) -> list[int]:
        """Where a segment's blocks lie in this side's blocks of the prompt, see `Backend.pack_kv`."""
        return place_items(block_ids, segment.first_block, segment.num_blocks, self.split)

    def layer_groups(self, layers: int) -> Iterator[tuple[int, int]]:
        """(first layer, how many) of groups of `layers` layers; the last one may be smaller."""
        first, end = self.layout.first_layer, self.layout.first_layer + self.layout.num_layers
        for start in range(first, end, layers):
            yield start, min(layers, end - start)

    def block_runs(self, first: int, end: int, num_layers: int) -> Iterator[tuple[int, int]]:
        """(first block, how many) of runs of blocks [first, end) whose `num_layers` layers fit in a segment."""
        run = max(1, self.max_bytes // (num_layers * self.layer_block_bytes))
        for start in range(first, end, run):
            yield start, min(run, end - start)

    def written_in_place(self, min_layers: int) -> SegmentShape:
        """The same for a sender that writes into the receiver's blocks: whole multiples of these layers."""
        layers = -(-min_layers // self.layers_per_segment) * self.layers_per_segment
        return replace(self, layers_per_segment=layers, max_bytes=MAX_WRITTEN_BYTES)

    def is_boundary(self, layer: int) -> bool:
        """Whether a segment becomes ready by this layer."""
        done = layer + 1 - self.layout.first_layer
        return done % self.layers_per_segment == 0 or done == self.layout.num_layers


def place_items(block_ids: Sequence[int], first: int, count: int, split: int) -> list[int]:
    """Where blocks [first, first + count) of the wire lie, of which `split` make a block of these.

    Raises:
        ValueError: there are not so many.
    """
    if (first + count - 1) // split >= len(block_ids):
        raise ValueError(f"blocks {first} to {first + count} do not lie in {len(block_ids)} blocks of {split}")
    return [block_ids[place // split] * split + place % split for place in range(first, first + count)]


def plan_transfer(shape: SegmentShape, chunk: ChunkBlocks, num_tokens: int, num_held_blocks: int) -> KVTransferPlan:
    """Cuts one chunk into segments.

    Args:
        shape: layers of a segment, its largest size, and what travels.
        chunk: what the chunk makes ready, in the sender's blocks; consecutive chunks begin where the one before ended.
        num_tokens: length of the prompt.
        num_held_blocks: leading blocks of the prompt that the receiver has, in blocks of the wire: not sent.
    """
    left = chunk.divided(shape.split, shape.wire.num_blocks(num_tokens)).without(num_held_blocks)
    hit_layers = shape.layout.num_layers
    if hit_layers * shape.layer_block_bytes > shape.max_bytes:
        hit_layers = shape.layers_per_segment
    segments = [*_cut(shape, left.first_block, left.num_hit_blocks, hit_layers, is_hit=True)]
    segments += _cut(shape, left.num_hit_blocks, left.num_ready_blocks, shape.layers_per_segment, is_hit=False)
    return KVTransferPlan(tuple(segments))


def _cut(shape: SegmentShape, first: int, end: int, layers: int, *, is_hit: bool) -> Iterator[KVSegment]:
    heads = (shape.layout.first_head, shape.layout.num_heads)
    for first_layer, num_layers in shape.layer_groups(layers):
        after = BEFORE_STEP if is_hit else first_layer + num_layers - 1
        for first_block, num_blocks in shape.block_runs(first, end, num_layers):
            yield KVSegment(first_layer, num_layers, first_block, num_blocks, *heads, after)


class Tiling:
    """Which cells (layer, block of the wire) of a prompt have arrived; blocks before `first_block` are not expected."""

    def __init__(self, num_layers: int, first_block: int, num_blocks: int) -> None:
        self._first_block = first_block
        self._end_block = num_blocks
        self._expected = (1 << num_blocks) - (1 << first_block)
        self._layers = [0] * num_layers

    @property
    def first_block(self) -> int:
        """Blocks before it are not expected."""
        return self._first_block

    @property
    def num_blocks(self) -> int:
        """Blocks of the prompt."""
        return self._end_block

    @property
    def is_complete(self) -> bool:
        """Every expected cell has arrived, each once."""
        return all(mask == self._expected for mask in self._layers)

    def fits(self, segment: KVSegment) -> bool:
        """Whether the segment lies inside and covers no cell that has arrived."""
        if segment.num_layers < 1 or segment.num_blocks < 1 or segment.first_layer < 0:
            return False
        if segment.first_layer + segment.num_layers > len(self._layers) or segment.first_block < self._first_block:
            return False
        if segment.first_block + segment.num_blocks > self._end_block:
            return False
        return not any(mask & self._mask(segment) for mask in self._touched(segment))

    def add(self, segment: KVSegment) -> None:
        """Notes the arrival of a segment that fits."""
        if not self.fits(segment):
            raise ValueError(f"segment does not tile: {segment}")
        for layer in range(segment.first_layer, segment.first_layer + segment.num_layers):
            self._layers[layer] |= self._mask(segment)

    def _touched(self, segment: KVSegment) -> list[int]:
        return self._layers[segment.first_layer : segment.first_layer + segment.num_layers]

    def _mask(self, segment: KVSegment) -> int:
        return ((1 << segment.num_blocks) - 1) << segment.first_block
