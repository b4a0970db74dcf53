from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twostroke_engine.kv.spec import KVSpec, LayerGroup
from twostroke_engine.transfer.layout import KVLayout, plan_routes, rank_layouts
from twostroke_engine.transfer.plan import (
    BEFORE_STEP,
    ChunkBlocks,
    KVSegment,
    SegmentShape,
    Tiling,
    plan_transfer,
)
from twostroke_engine.transfer.wire import WIRE_DTYPES, WireFormat

WIRE = WireFormat(16, "bfloat16")


def spec_of(num_layers: int, num_heads: int = 2, block_size: int = 16) -> KVSpec:
    group = LayerGroup(num_layers=num_layers, num_kv_heads=num_heads, head_dim=4)
    return KVSpec(block_size=block_size, dtype="bfloat16", groups=(group,))


def shape_of(
    num_layers: int, layers_per_segment: int, blocks_per_segment: int = 1000, split: int = 1, dtype: str = "bfloat16"
) -> SegmentShape:
    layout, wire = KVLayout.whole(spec_of(num_layers, block_size=16 * split)), WireFormat(16, dtype)
    max_bytes = wire.layer_block_bytes(2, 4) * layers_per_segment * blocks_per_segment
    return SegmentShape(layout, layers_per_segment, wire, max_bytes)


Case = tuple[SegmentShape, list[ChunkBlocks], int, int]


@st.composite
def staircases(draw: st.DrawFn) -> Case:
    """A prompt's chunks, how many tokens it has, and how many blocks of the wire the receiver holds."""
    split = draw(st.sampled_from([1, 2, 4]))
    dtype = draw(st.sampled_from(WIRE_DTYPES))
    shape = shape_of(draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(st.integers(1, 4)), split, dtype)
    num_blocks = draw(st.integers(1, 12))
    num_tokens = num_blocks * 16 * split - draw(st.integers(0, 16 * split - 1))
    cuts = sorted(draw(st.sets(st.integers(1, num_blocks), max_size=4)) | {num_blocks})
    chunks: list[ChunkBlocks] = []
    for first, ready in zip([0, *cuts], cuts, strict=False):
        hits = draw(st.integers(first, ready)) if not chunks else first
        chunks.append(ChunkBlocks(first, hits, ready))
    return shape, chunks, num_tokens, draw(st.integers(0, WIRE.num_blocks(num_tokens)))


@given(staircases())
@settings(max_examples=200, deadline=None)
def test_segments_tile_layers_and_blocks_exactly_once(case: Case) -> None:
    shape, chunks, num_tokens, num_held = case
    tiling = Tiling(shape.layout.num_layers, num_held, WIRE.num_blocks(num_tokens))
    for chunk in chunks:
        for segment in plan_transfer(shape, chunk, num_tokens, num_held).segments:
            tiling.add(segment)  # raises if anything comes twice, or lies outside
            size = segment.num_layers * segment.num_blocks * shape.layer_block_bytes
            assert size <= shape.max_bytes or segment.num_layers * segment.num_blocks == 1
    assert tiling.is_complete


@given(staircases(), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_segment_is_ready_with_its_last_layer_and_not_before(case: Case, layer: int) -> None:
    shape, chunks, num_tokens, num_held = case
    for chunk in chunks:
        plan = plan_transfer(shape, chunk, num_tokens, num_held)
        ready = plan.ready(0, layer)
        for segment in plan.segments:
            is_hit = segment.first_block + segment.num_blocks <= chunk.num_hit_blocks * shape.split
            is_written = segment.first_layer + segment.num_layers - 1 <= layer
            assert (segment in ready) == (is_hit or is_written)
            assert is_hit or shape.is_boundary(segment.after_layer)
        assert plan.ready(len(plan.segments), layer) == ()


def test_prefix_hits_go_as_one_segment_before_the_step() -> None:
    shape = shape_of(4, 1)
    first, *others = plan_transfer(shape, ChunkBlocks(0, 3, 5), 80, 1).segments
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
    assert plan_transfer(shape_of(4, 1), ChunkBlocks(0, 3, 3), 48, 3).segments == ()


def test_a_large_block_goes_as_the_small_ones_that_hold_tokens() -> None:
    """Blocks of 64 here, of 16 there; 150 tokens are 10 blocks of 16, of which the receiver holds 3."""
    shape = shape_of(1, 1, split=4)
    hits, rest = plan_transfer(shape, ChunkBlocks(0, 1, 3), 150, 3).segments
    assert (hits.first_block, hits.num_blocks, rest.first_block, rest.num_blocks) == (3, 1, 4, 6)
    assert shape.items(rest, (7, 9, 2)) == [36, 37, 38, 39, 8, 9]


def test_items_must_fill_a_block() -> None:
    with pytest.raises(ValueError, match="48"):
        SegmentShape(KVLayout.whole(spec_of(1, block_size=64)), 1, WireFormat(48, "bfloat16"))


@st.composite
def rank_pairs(draw: st.DrawFn) -> tuple[KVSpec, KVSpec, int, int]:
    """Two caches of one shape, and how many ranks share each."""
    num_heads = draw(st.sampled_from([1, 2, 4, 8]))
    ranks = st.sampled_from([1, 2, 4, 8, 16])
    sizes = st.sampled_from([16, 32, 64])
    num_layers = draw(st.integers(1, 3))
    specs = (spec_of(num_layers, num_heads, draw(sizes)) for _ in range(2))
    return (*specs, draw(ranks), draw(ranks))  # type: ignore[return-value]


@given(rank_pairs(), st.integers(1, 200), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_segments_of_all_ranks_tile_tokens_layers_and_heads_exactly_once(
    case: tuple[KVSpec, KVSpec, int, int], num_tokens: int, layers_per_segment: int
) -> None:
    sending, receiving, num_sources, num_targets = case
    wire = WireFormat(min(sending.block_size, receiving.block_size), "bfloat16")
    sources, targets = rank_layouts(sending, num_sources), rank_layouts(receiving, num_targets)
    arrived: Counter[tuple[int, int, int, int]] = Counter()
    for route in plan_routes(sources, targets):
        assert sources[route.source].shared(route.part) == route.part, "the source does not hold what it sends"
        shape = SegmentShape(route.part, layers_per_segment, wire)
        chunk = ChunkBlocks(0, 0, sending.num_blocks(num_tokens))
        for segment in plan_transfer(shape, chunk, num_tokens, 0).segments:
            arrived.update(
                (route.target, layer, head, token)
                for layer in range(segment.first_layer, segment.first_layer + segment.num_layers)
                for head in range(segment.first_head, segment.first_head + segment.num_heads)
                for token in range(segment.first_block * 16, (segment.first_block + segment.num_blocks) * 16, 16)
            )
    tokens = range(0, wire.num_blocks(num_tokens) * 16, 16)
    expected = Counter(
        (target, layer, head, token)
        for target, layout in enumerate(targets)
        for layer in range(layout.num_layers)
        for head in range(layout.first_head, layout.first_head + layout.num_heads)
        for token in tokens
    )
    assert arrived == expected


def test_a_head_that_several_ranks_hold_has_one_source() -> None:
    """2 heads on 4 ranks send to 1 rank: only ranks 0 and 2 do."""
    spec = spec_of(1, num_heads=2)
    routes = plan_routes(rank_layouts(spec, 4), rank_layouts(spec, 1))
    assert [(route.source, route.part.first_head, route.part.num_heads) for route in routes] == [(0, 0, 1), (2, 1, 1)]


@pytest.mark.parametrize(("num_heads", "num_ranks"), [(8, 3), (8, 12), (2, 0)])
def test_heads_that_cannot_be_shared(num_heads: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match="cannot be shared"):
        rank_layouts(spec_of(1, num_heads), num_ranks)


@pytest.mark.parametrize(("told", "written"), [(1, 16), (3, 18), (16, 16), (40, 40)])
def test_what_is_written_in_place_goes_in_whole_groups_of_layers(told: int, written: int) -> None:
    """A sender may have told of layers before it knew how its segments go: every end of theirs is one of those."""
    shape = shape_of(48, told, blocks_per_segment=1)
    in_place = shape.written_in_place(16)
    ends = [layer for layer in range(48) if in_place.is_boundary(layer)]
    assert ends[0] == min(written, 48) - 1
    assert all(shape.is_boundary(layer) for layer in ends)
    assert len(plan_transfer(in_place, ChunkBlocks(0, 0, 40), 640, 0).segments) == len(ends)
