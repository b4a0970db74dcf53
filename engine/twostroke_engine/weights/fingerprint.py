"""`model_fingerprint`: equal on two workers if and only if they run one model in the same number format and mode."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from twostroke_engine.model.config import ModelConfig
    from twostroke_engine.weights.loader import WeightSource


def model_fingerprint(config: ModelConfig, dtype: str, weights: WeightSource, batch_invariant: bool = False) -> str:
    """32 hex digits over config.json's meaning, the dtype and the weights, after a word if those were drawn.

    KV that was computed in batch-invariant mode goes to workers in that mode alone.
    """
    digest = blake2b(msgspec.msgpack.encode(config), digest_size=16)
    digest.update(dtype.encode() + (b" batch-invariant" if batch_invariant else b"") + b"\0")
    digest.update(weights.digest())
    return weights.kind + digest.hexdigest()


def tokenizer_hash(model_dir: Path) -> str:
    """32 hex digits over tokenizer.json; empty if the folder has none."""
    path = model_dir / "tokenizer.json"
    return blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.is_file() else ""
