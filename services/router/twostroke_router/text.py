"""Text in, text out: the tokenizer and chat template of a model folder."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from twostroke_router.chat_template import ChatTemplate, TemplateRefused, load_chat_template
from twostroke_router.detokenize import Detokenizer
from twostroke_router.errors import invalid
from twostroke_router.token_bytes import token_bytes_of

INLINE_CHARS = 4096
"""Texts up to this length are tokenized on the event loop (well under a millisecond); longer ones in a thread."""


class ModelFolderError(Exception):
    """The model folder cannot be used; one clear line."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} is not a JSON object")
    return value


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelFolderError(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _count(config: Mapping[str, Any], name: str) -> int | None:
    """A positive number of config.json, None if it does not say."""
    value = config.get(name)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ModelFolderError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value


class Text:
    """Tokenizes prompts and conversations of one model, and turns tokens back into text."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._token_bytes = lru_cache(maxsize=65536)(token_bytes_of(tokenizer))
        self.vocab_size = _count(config, "vocab_size") or tokenizer.get_vocab_size()
        self.max_model_len = _count(config, "max_position_embeddings")
        """From the model's configuration; workers may allow less."""

    async def encode(self, text: str, param: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text; `param` names the field that the text came from.

        Raises:
            RequestError: the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise invalid(param, "is not valid Unicode (a lone surrogate)") from error
        if len(text) <= INLINE_CHARS:
            return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self._encode_long, text, add_special_tokens
        )

    def _encode_long(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # encode_batch, unlike encode, lets go of Python's lock while it works.
        return tuple(self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], param: str = "messages", add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a conversation. The template writes the special tokens itself.

        Raises:
            RequestError: the model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise invalid(param, "this model has no chat template; use /v1/completions or a prompt")
        try:
            text = self._template.render(messages, add_generation_prompt)
        except TemplateRefused as error:
            raise invalid(param, str(error)) from error
        return await self.encode(text, param, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """A detokenizer for one choice that continues this prompt."""
        return Detokenizer(self.decode, prompt_token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; those of a special token are its name's."""
        return self._token_bytes(token_id)

    def close(self) -> None:
        """Ends the tokenizing threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def load_text(model_dir: Path) -> Text:
    """Reads tokenizer.json, the chat template and config.json of a HuggingFace folder.

    Raises:
        ModelFolderError: something is missing or broken.
    """
    if not model_dir.is_dir():
        raise ModelFolderError(f"model folder {model_dir} does not exist")
    for name in ("tokenizer.json", "config.json"):
        if not (model_dir / name).is_file():
            raise ModelFolderError(f"model folder {model_dir} has no {name}")
    tokenizer = _read_tokenizer(model_dir / "tokenizer.json")
    config = _read_json(model_dir / "config.json")
    tokenizer_config = model_dir / "tokenizer_config.json"
    try:
        template = load_chat_template(model_dir, _read_json(tokenizer_config) if tokenizer_config.is_file() else {})
    except ValueError as error:
        raise ModelFolderError(str(error)) from error
    return Text(tokenizer, template, config)
