"""Linear layers of few rows: which kernel does one, and the one call that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from twostroke_kernels.gpu.fusion import PLAIN, Fusion
from twostroke_kernels.gpu.gemv import GemvConfig, gemv, gemv_config
from twostroke_kernels.gpu.rms_norm import rms_norm
from twostroke_kernels.gpu.skinny import MAX_SKINNY_ROWS, SkinnyConfig, skinny, skinny_config, suits_skinny
from twostroke_kernels.gpu.tuned import Product, card_name, tuned_choice

LinearConfig = GemvConfig | SkinnyConfig


def linear_config(
    num_rows: int, width_out: int, width_in: int, dtype: torch.dtype, gated: bool = False
) -> LinearConfig | None:
    """How x [num_rows, in] times weight [out, in] is done; None: by cuBLAS.

    Measured on an H100 in bfloat16 with Llama-3.1-8B's layers: up to 32 rows ours are faster by 2 to 20 % in each of
    them, at 64 rows in the wide and in the deep ones, at 128 in the head alone. More rows were not faster, and a GEMV
    of two rows was slower than tensor cores that are mostly idle.
    """
    if num_rows == 1:
        return gemv_config(width_out, width_in, gated)
    if 2 <= num_rows <= MAX_SKINNY_ROWS and suits_skinny(dtype):
        return skinny_config(num_rows, width_out, width_in, gated)
    return None


class ConfigChoice(Protocol):
    """Decides how a linear layer of few rows is done."""

    def __call__(self, x: Tensor, weight: Tensor, gated: bool = False) -> LinearConfig | None:
        """For x [T, in] and weight [out, in]; None: by what does many rows."""
        ...


def config_for(x: Tensor, weight: Tensor, gated: bool = False) -> LinearConfig | None:
    """What was measured to be fastest on this card; `linear_config` where nothing was."""
    return _config_on(card_name(x.device), x.shape[0], *weight.shape, x.dtype, gated)


@lru_cache(maxsize=4096)
def _config_on(
    card: str, num_rows: int, width_out: int, width_in: int, dtype: torch.dtype, gated: bool
) -> LinearConfig | None:
    operation = "gated_linear" if gated else "linear"
    known = tuned_choice(card, Product(operation, num_rows, width_out, width_in, str(dtype).removeprefix("torch.")))
    if known is None:
        return linear_config(num_rows, width_out, width_in, dtype, gated)
    return None if known.config is None else config_of(known.config)


def config_of(fields: Mapping[str, int | bool]) -> LinearConfig:
    """The config with these fields, as a JSON object has them: a GEMV's has no `weight_left`."""
    return SkinnyConfig(**fields) if "weight_left" in fields else GemvConfig(**fields)  # type: ignore[arg-type]


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: LinearConfig,
    fusion: Fusion = PLAIN,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, in] times weight [out, in], with what `fusion` says, into `out` (contiguous; new where None).

    A GEMV takes one row, and norms it on the way; the other kernel takes 1 to 128 rows, and its norm runs before it.

    Raises:
        ValueError: operands that do not fit each other.
    """
    if isinstance(config, GemvConfig):
        return gemv(x, weight, bias, config, fusion, out)
    if fusion.norm is not None:
        x, fusion = rms_norm(x, fusion.norm.weight, fusion.norm.eps), replace(fusion, norm=None)
    return skinny(x, weight, bias, config, fusion, out)
