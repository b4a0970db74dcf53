"""`Architecture`: what a model family brings, and the table that finds it by a checkpoint's `architectures`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twostroke_engine.model.attention import Attention
from twostroke_engine.model.config import ModelConfig
from twostroke_engine.model.factory import LayerFactory
from twostroke_engine.model.layers import GatedMLP

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BuildAttention = Callable[[ModelConfig, LayerFactory, int], Attention]
"""(config, layers, number of the layer) -> its attention."""
BuildMLP = Callable[[ModelConfig, LayerFactory, int], GatedMLP]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where one family of decoders differs from the others."""

    names: tuple[str, ...]
    """Values of `architectures` in config.json."""
    attention: BuildAttention
    mlp: BuildMLP


def by_name(architectures: Iterable[Architecture]) -> Mapping[str, Architecture]:
    """The table from names to records.

    Raises:
        ValueError: two records claim one name.
    """
    table: dict[str, Architecture] = {}
    for architecture in architectures:
        for name in architecture.names:
            if name in table:
                raise ValueError(f"two architectures claim {name}")
            table[name] = architecture
    return table
