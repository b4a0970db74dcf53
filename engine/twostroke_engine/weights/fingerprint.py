"""`model_fingerprint`: equal on two workers if and only if they run the same model in the same number format."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from twostroke_engine.model.config import ModelConfig
    from twostroke_engine.weights.checkpoint import Checkpoint


def model_fingerprint(config: ModelConfig, dtype: str, checkpoint: Checkpoint) -> str:
    """32 hex digits over config.json's meaning, the dtype, and the weight files' headers and samples."""
    digest = blake2b(msgspec.msgpack.encode(config), digest_size=16)
    digest.update(dtype.encode() + b"\0")
    digest.update(checkpoint.digest())
    return digest.hexdigest()
