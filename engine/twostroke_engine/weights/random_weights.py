"""`RandomWeights`: a model of a given shape without a checkpoint, for measuring and trying out.

Values are drawn, never zero: a multiplication by zeros takes less power, and a card that is not held back by its power
limit is faster than it would be with a real model.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from twostroke_engine.weights.loader import Pull

SEED = 20_240_607
SMALL_STD = 0.02


class RandomWeights:
    """The `WeightSource` of `--load-format random`; two workers on like devices draw the same values."""

    kind = "random-"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def fill(self, pulls: Sequence[Pull], unneeded: Collection[str]) -> None:
        """Draws every parameter, in order, on the device; activations keep their size from layer to layer."""
        generator = torch.Generator(self._device).manual_seed(SEED)
        for pull in pulls:
            target = pull.target
            if target.dim() > 1:
                target.normal_(0.0, target.shape[-1] ** -0.5, generator=generator)
            else:
                # Of the vectors, norms scale and biases add.
                mean = 1.0 if "norm" in pull.sources[0].name else 0.0
                target.normal_(mean, SMALL_STD, generator=generator)

    def digest(self) -> bytes:
        """A generator's values depend on the seed, the kind of device and how many cores a GPU has: on its name."""
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        return blake2b(f"{SEED}\0{name}".encode(), digest_size=16).digest()
