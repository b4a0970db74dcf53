"""Every model family that can be built: the one place to add one to."""

from __future__ import annotations

from twostroke_engine.model import llama, qwen2, qwen3
from twostroke_engine.model.architecture import by_name

FAMILIES = by_name((llama.ARCHITECTURE, qwen2.ARCHITECTURE, qwen3.ARCHITECTURE))
"""Architecture record by its name in config.json."""
