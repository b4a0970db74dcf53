from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twostroke_engine.kv.spec import KVSpec, LayerGroup
from twostroke_engine.transfer.layout import KVLayout
from twostroke_engine.transfer.plan import (
    BEFORE_STEP,
    ChunkBlocks,
    KVSegment,
    SegmentShape,
    Tiling,
    plan_transfer,
)


def shape_of(num_layers: int, layers_per_segment: int, blocks_per_segment: int = 1000) -> SegmentShape:
    group = LayerGroup(num_layers=num_layers, num_kv_heads=2, head_dim=4)
    spec = KVSpec(block_size=16, dtype="bfloat16", groups=(group,))
    max_bytes = spec.layer_block_bytes * layers_per_segment * blocks_per_segment
    return SegmentShape(KVLayout.whole(spec), layers_per_segment, max_bytes)


@st.composite
def staircases(draw: st.DrawFn) -> tuple[SegmentShape, list[ChunkBlocks], int, int]:
    """A prompt's chunks, how many blocks it has, and how many the receiver holds."""
    shape = shape_of(draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(st.integers(1, 4)))
    num_blocks = draw(st.integers(1, 12))
    cuts = sorted(draw(st.sets(st.integers(1, num_blocks), max_size=4)) | {num_blocks})
    chunks: list[ChunkBlocks] = []
    for first, ready in zip([0, *cuts], cuts, strict=False):
        hits = draw(st.integers(first, ready)) if not chunks else first
        chunks.append(ChunkBlocks(first, hits, ready))
    return shape, chunks, num_blocks, draw(st.integers(0, num_blocks))


@given(staircases())
@settings(max_examples=200, deadline=None)
def test_segments_tile_layers_and_blocks_exactly_once(case: tuple[SegmentShape, list[ChunkBlocks], int, int]) -> None:
    shape, chunks, num_blocks, num_held = case
    tiling = Tiling(shape.layout.num_layers, num_held, num_blocks)
    for chunk in chunks:
        for segment in plan_transfer(shape, chunk, num_held).segments:
            tiling.add(segment)  # raises if anything comes twice, or lies outside
            size = segment.num_layers * segment.num_blocks * shape.layout.layer_block_bytes
            assert size <= shape.max_bytes or segment.num_layers * segment.num_blocks == 1
    assert tiling.is_complete


@given(staircases(), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_segment_is_ready_with_its_last_layer_and_not_before(
    case: tuple[SegmentShape, list[ChunkBlocks], int, int], layer: int
) -> None:
    shape, chunks, _, num_held = case
    for chunk in chunks:
        plan = plan_transfer(shape, chunk, num_held)
        ready = plan.ready(0, layer)
        for segment in plan.segments:
            is_hit = segment.first_block + segment.num_blocks <= chunk.num_hit_blocks
            is_written = segment.first_layer + segment.num_layers - 1 <= layer
            assert (segment in ready) == (is_hit or is_written)
            assert is_hit or shape.is_boundary(segment.after_layer)
        assert plan.ready(len(plan.segments), layer) == ()


def test_prefix_hits_go_as_one_segment_before_the_step() -> None:
    shape = shape_of(4, 1)
    first, *others = plan_transfer(shape, ChunkBlocks(0, 3, 5), 1).segments
    assert first == KVSegment(0, 4, 1, 2, 0, 2, BEFORE_STEP)
    assert [(segment.after_layer, segment.first_block, segment.num_blocks) for segment in others] == [
        (layer, 3, 2) for layer in range(4)
    ]


@pytest.mark.parametrize(
    "segment",
    [
        KVSegment(0, 2, 1, 1, 0, 2),  # again
        KVSegment(3, 2, 2, 1, 0, 2),  # beyond the last layer
        KVSegment(0, 1, 0, 1, 0, 2),  # held
        KVSegment(0, 1, 3, 2, 0, 2),  # beyond the last block
        KVSegment(-1, 1, 2, 1, 0, 2),
        KVSegment(0, 0, 2, 1, 0, 2),
        KVSegment(0, 1, 2, 0, 0, 2),
    ],
)
def test_tiling_takes_nothing_outside_or_twice(segment: KVSegment) -> None:
    tiling = Tiling(num_layers=4, first_block=1, num_blocks=4)
    tiling.add(KVSegment(1, 1, 1, 1, 0, 2))
    assert not tiling.fits(segment)
    with pytest.raises(ValueError, match="does not tile"):
        tiling.add(segment)


def test_a_prompt_that_is_held_whole_needs_nothing() -> None:
    assert Tiling(num_layers=4, first_block=3, num_blocks=3).is_complete
    assert plan_transfer(shape_of(4, 1), ChunkBlocks(0, 3, 3), 3).segments == ()
