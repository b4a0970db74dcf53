"""How decode attention cuts contexts into stretches, and where it writes; its results: test_triton_attention.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from twostroke_kernels.backend import Backend, PagedBatch

from tests.support.paged_attention import Shape, make_case
from tests.support.tolerance import assert_as_good_as_torch
from tests.support.triton_device import DEVICE, HAS_GPU

from twostroke_kernels.gpu.decode_attention import decode_attention, decode_config  # isort: skip

pytestmark = pytest.mark.slow  # interpreted, they take many seconds
SHAPE = Shape(4, 2, 64, 64)
SMALL = Shape(1, 2, 64, 16)


@pytest.mark.parametrize("num_splits", [2, 16])
def test_each_length_is_cut_for_itself(reference: Backend, rng: torch.Generator, num_splits: int) -> None:
    """A grid for longer contexts than there are: most stretches do not exist, and no one reads what they left."""
    lengths = [1, 64, 130, 0, 300]
    case = make_case(rng, SHAPE, [1] * len(lengths), lengths, torch.float16, DEVICE)
    batch = dataclasses.replace(case.batch, max_context_len=4096)
    exact = reference.decode_attention(case.q, case.layer, case.batch, case.scale)
    config = dataclasses.replace(decode_config(case.layer, len(lengths), 4096), num_splits=num_splits)
    assert_as_good_as_torch(decode_attention(case.q, case.layer, batch, case.scale, config), exact, case.plain())


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("stretch", [64, 128])
def test_stretches_of_a_fixed_length(reference: Backend, rng: torch.Generator, stretch: int, tma: bool) -> None:
    """Their bits depend on no other sequence, nor on the longest context that a graph is made for, nor on the grid."""
    if tma and HAS_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this card has no tensor memory accelerator")
    lengths = [1, 64, 130, 0, 129, 64 * 20 + 5]
    case = make_case(rng, SHAPE, [1] * len(lengths), lengths, torch.float16, DEVICE)
    config = dataclasses.replace(decode_config(case.layer, 6, max(lengths), fixed_stretch=stretch), tma=tma)
    out = decode_attention(case.q, case.layer, case.batch, case.scale, config)
    exact = reference.decode_attention(case.q, case.layer, case.batch, case.scale)
    assert_as_good_as_torch(out, exact, case.plain())
    for num_splits in (1, 3, 32):
        other = dataclasses.replace(config, num_splits=num_splits)
        longer = dataclasses.replace(case.batch, max_context_len=5000)
        assert torch.equal(decode_attention(case.q, case.layer, longer, case.scale, other), out)
    for row, length in enumerate(lengths):
        batch = case.batch
        alone = PagedBatch(
            batch.block_tables[row : row + 1], batch.query_starts[:2], batch.context_lens[row : row + 1], 1, length
        )
        assert torch.equal(
            decode_attention(case.q[row : row + 1], case.layer, alone, case.scale, config), out[row : row + 1]
        )


def test_decode_writes_where_it_is_told(rng: torch.Generator) -> None:
    case = make_case(rng, SMALL, [1, 1, 1], [20, 33, 7], torch.float16, DEVICE)
    wide = torch.full((5, *case.q.shape[1:]), float("nan"), dtype=torch.float16, device=DEVICE)
    for num_splits in (1, 2):
        config = dataclasses.replace(decode_config(case.layer, 3, 33), num_splits=num_splits)
        out = decode_attention(case.q, case.layer, case.batch, case.scale, config, wide[1:4])
        assert torch.equal(out, decode_attention(case.q, case.layer, case.batch, case.scale, config))
        assert bool(wide[1:4].isfinite().all())
        assert bool(wide[[0, -1]].isnan().all())
    for bad in (wide, wide[:3].float(), wide.transpose(1, 2)[:3]):
        with pytest.raises(ValueError, match="out"):
            decode_attention(case.q, case.layer, case.batch, case.scale, None, bad)


def test_a_stretch_that_is_no_whole_number_of_tiles_is_refused(rng: torch.Generator) -> None:
    case = make_case(rng, SMALL, [1], [20], torch.float16, DEVICE)
    config = decode_config(case.layer, 1, 20)
    for stretch in (config.tile + 1, -config.tile):
        with pytest.raises(ValueError, match="fixed_stretch"):
            decode_attention(case.q, case.layer, case.batch, 1.0, dataclasses.replace(config, fixed_stretch=stretch))
