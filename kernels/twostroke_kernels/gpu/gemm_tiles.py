"""What the large products share: which tile a program computes, in which order, and how many programs run.

Programs stay: as many as the card holds at once, each taking tile after tile. Tiles go up a group of row tiles before
the next column of outputs, so that programs that run together share tiles of both factors in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_H100_PROCESSORS = 132
_INTERPRETED_PROGRAMS = 3


@dataclass(frozen=True, slots=True)
class GemmTile:
    """A tile of the product and how it is computed; the bits of the product do not depend on it."""

    rows: int
    outputs: int
    inputs: int
    """Summed a step."""
    num_warps: int
    num_stages: int
    group: int = 8
    """Row tiles that are done before the next column of outputs."""
    programs: int = 1
    """That share a multiprocessor."""
    cost: float = 1.0
    """Time of one tile while every multiprocessor is busy, in any unit that its alternatives share."""


def choose_tile(tiles: tuple[GemmTile, ...], num_rows: int, width_out: int, processors: int) -> GemmTile:
    """The tile whose rounds over the whole card cost least; of equals, the first."""

    def cost(tile: GemmTile) -> float:
        rounds = -(-count_tiles(tile, num_rows, width_out) // (tile.programs * processors))
        return rounds * tile.programs * tile.cost

    return min(tiles, key=cost)


def count_tiles(tile: GemmTile, num_rows: int, width_out: int) -> int:
    """Tiles of a product [num_rows, width_out]."""
    return -(-num_rows // tile.rows) * -(-width_out // tile.outputs)


def num_processors(device: torch.device) -> int:
    """Multiprocessors of the card; an H100's where there is none."""
    return _card_processors(device) if device.type == "cuda" else _H100_PROCESSORS


def num_programs(tile: GemmTile, num_tiles: int, device: torch.device) -> int:
    """Programs to launch; few in the interpreter, so that they take several tiles there too."""
    room = tile.programs * num_processors(device) if device.type == "cuda" else _INTERPRETED_PROGRAMS
    return min(num_tiles, room)


@cache
def _card_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper(device: torch.device) -> bool:
    """The cards for which these kernels were tuned, and on which alone they were run."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def suits_tma(*matrices: Tensor) -> bool:
    """Whether these matrices can be fetched or stored as boxes of a TMA descriptor."""
    return all(
        matrix.stride(1) == 1 and (matrix.data_ptr() | matrix.stride(0) * matrix.element_size()) % 16 == 0
        for matrix in matrices
    )


def are_factors(x: Tensor, weight: Tensor) -> bool:
    """Whether x [T, in] and weight [out, in] are half-precision matrices that these kernels can multiply."""
    halves = x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16)
    return halves and x.shape[1] == weight.shape[1] and weight.is_contiguous() and suits_tma(x, weight)


def matrix_boxes(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix in boxes: what a box has outside of it reads as zero and is not written."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


@triton.jit
def place_tile(index, row_tiles, output_tiles, GROUP: tl.constexpr):
    """(row tile, output tile) of the order's tile `index`."""
    per_group = GROUP * output_tiles
    first = index // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = index % per_group
    return first + within % height, within // height
