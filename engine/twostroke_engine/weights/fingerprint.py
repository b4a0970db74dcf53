"""`model_fingerprint`: equal on two workers if and only if they run the same model in the same number format."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from twostroke_engine.model.config import ModelConfig
    from twostroke_engine.weights.loader import WeightSource


def model_fingerprint(config: ModelConfig, dtype: str, weights: WeightSource) -> str:
    """32 hex digits over config.json's meaning, the dtype and the weights, after a word if those were drawn."""
    digest = blake2b(msgspec.msgpack.encode(config), digest_size=16)
    digest.update(dtype.encode() + b"\0")
    digest.update(weights.digest())
    return weights.kind + digest.hexdigest()
