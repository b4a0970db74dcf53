"""A model folder without weights: a config.json, and a tokenizer that has a word for every id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PRINTABLE = [chr(code) for code in range(0x21, 0x7F)]
SPACE = "Ġ"
"""How byte-level vocabularies write a space."""


def write_model_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Fills a folder that servers take as a checkpoint once told to draw weights at random.

    Servers must turn tokens into text, so each of `vocab_size` ids needs one: any random token then gives every stream
    an event, as real tokens nearly always do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    word_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level: single ASCII characters first, then made-up words with a space before them."""
    words = [*PRINTABLE, SPACE, *(f"{SPACE}w{number}" for number in range(max(0, vocab_size - len(PRINTABLE) - 1)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words[:vocab_size])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
