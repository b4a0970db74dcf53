"""What was measured to be fastest on a card, from `tuned/<card>.json` beside this module.

`benchmarks.tune` writes such a file. Nothing is measured while serving: a card without a file, or a shape that its file
does not name, gets the defaults in the code of the kernels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("tuned")
Fields = Mapping[str, int | bool]


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer that can be done in several ways."""

    operation: str
    """`linear`, or `gated_linear`: silu(gate) * up, `width_out` counting rows of both."""
    num_rows: int
    width_out: int
    width_in: int
    dtype: str
    """`bfloat16` or `float16`."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The fastest way that was found."""

    config: Fields | None
    """A kernel's config; None: no kernel of few rows, but whatever does more rows."""


@cache
def card_name(device: torch.device) -> str:
    """The card as file names have it, `NVIDIA_H100_80GB_HBM3` for instance; empty without one."""
    return re.sub(r"\W+", "_", torch.cuda.get_device_name(device)) if device.type == "cuda" else ""


@cache
def choices_of(card: str, folder: Path = FOLDER) -> Mapping[Product, Choice]:
    """All that a card's file says; nothing if there is none.

    Raises:
        ValueError: the file is not one that `benchmarks.tune` writes.
    """
    path = folder / f"{card}.json"
    if not card or not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["choices"]
        return {_product(entry): Choice(entry["config"]) for entry in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of tuned configs: {error!r}") from error


def tuned_choice(card: str, product: Product, folder: Path = FOLDER) -> Choice | None:
    """What is known of a product; None: nothing. Rows are measured at powers of two, and go up to the next one."""
    rows = 1 << max(0, product.num_rows - 1).bit_length()
    key = Product(product.operation, rows, product.width_out, product.width_in, product.dtype)
    return choices_of(card, folder).get(key)


def _product(entry: Mapping[str, object]) -> Product:
    """The key of an entry, every field of the type that it must have."""
    rows, width_out, width_in = (int(str(entry[name])) for name in ("rows", "width_out", "width_in"))
    return Product(str(entry["operation"]), rows, width_out, width_in, str(entry["dtype"]))
