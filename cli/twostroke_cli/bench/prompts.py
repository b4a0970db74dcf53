"""What is asked: request after request, each a function of the workload and its number alone."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from twostroke_cli.bench.lengths import Length
from twostroke_cli.bench.trace import MOONCAKE_BLOCK_LEN, Row, read_trace
from twostroke_cli.bench.words import ids_of, text_of
from twostroke_cli.errors import CommandError

Prompt = str | list[int] | list[dict[str, Any]]
"""Text, token ids, or the messages of a chat."""


class Draft(NamedTuple):
    """One request before it has a form."""

    prompt: Prompt
    max_tokens: int


class Prompts(Protocol):
    """A source of requests."""

    def draft(self, number: int) -> Draft:
        """Request `number`, from 0."""
        ...


class Synthetic(msgspec.Struct, frozen=True, tag="synthetic"):
    """Random words, or token ids if `vocab_size` is given; the first `prefix_share` of each is one of `groups`."""

    length: Length
    max_tokens: Length
    prefix_share: float = 0.0
    groups: int = 1
    vocab_size: int = 0


class FromFile(msgspec.Struct, frozen=True, tag="file"):
    """A file of prompts: JSON lines with `prompt` or `messages` (and `max_tokens` if they like), else text by line."""

    path: str
    max_tokens: Length


class FromTrace(msgspec.Struct, frozen=True, tag="trace"):
    """Lengths, and where the trace knows them prefixes, of a recorded load."""

    path: str
    length_scale: float = 1.0
    max_prompt_len: int | None = None
    """Longer prompts are cut."""


PromptSpec = Synthetic | FromFile | FromTrace


def open_prompts(spec: PromptSpec, seed: int) -> Prompts:
    """The source that a workload names.

    Raises:
        CommandError: its file cannot be read.
    """
    if isinstance(spec, Synthetic):
        return SyntheticPrompts(spec, seed)
    if isinstance(spec, FromFile):
        return FilePrompts(spec, seed)
    return TracePrompts(spec, seed)


class SyntheticPrompts:
    """Text made up on the spot."""

    def __init__(self, spec: Synthetic, seed: int) -> None:
        self._spec = spec
        self._seed = seed

    def draft(self, number: int) -> Draft:
        """Its own words after those of its group."""
        spec, source = self._spec, random.Random(f"{self._seed}/{number}")
        length = spec.length.draw(source)
        shared = round(spec.prefix_share * length)
        group = source.randrange(spec.groups)
        max_tokens = spec.max_tokens.draw(source)
        parts = ((f"{self._seed}/group/{group}", shared), (f"{self._seed}/own/{number}", length - shared))
        if spec.vocab_size:
            return Draft([id for key, size in parts for id in ids_of(key, size, spec.vocab_size)], max_tokens)
        return Draft(" ".join(text_of(key, size) for key, size in parts if size), max_tokens)


class _PromptLine(msgspec.Struct):
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None


class FilePrompts:
    """The lines of a file, shuffled by the seed; from the beginning again when they have all been asked."""

    def __init__(self, spec: FromFile, seed: int) -> None:
        self._seed = seed
        self._max_tokens = spec.max_tokens
        self._lines = _prompt_lines(Path(spec.path))
        random.Random(f"{seed}/order").shuffle(self._lines)
        self.size = len(self._lines)

    def check_for(self, endpoint: str) -> None:
        """`CommandError` where the endpoint cannot take what the lines hold."""
        if endpoint == "completions" and any(line.messages for line in self._lines):
            raise CommandError("--prompts: lines with `messages` need --endpoint chat")
        if endpoint == "chat" and any(isinstance(line.prompt, list) for line in self._lines):
            raise CommandError("--prompts: lines with token ids need --endpoint completions")

    def draft(self, number: int) -> Draft:
        """Line `number` of the shuffled ones."""
        line = self._lines[number % self.size]
        drawn = self._max_tokens.draw(random.Random(f"{self._seed}/{number}"))
        return Draft(line.messages or line.prompt or "", line.max_tokens or drawn)


def _prompt_lines(path: Path) -> list[_PromptLine]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--prompts {path}: {getattr(error, 'strerror', None) or error}") from None
    is_json = path.suffix in (".jsonl", ".ndjson")
    found = [
        _json_line(path, number, line) if is_json else _PromptLine(prompt=line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise CommandError(f"--prompts {path}: holds no prompt")
    return found


def _json_line(path: Path, number: int, line: str) -> _PromptLine:
    try:
        found = msgspec.json.decode(line, type=_PromptLine)
    except msgspec.DecodeError as error:
        raise CommandError(f"--prompts {path}, line {number}: {error}") from None
    if not found.prompt and not found.messages:
        raise CommandError(f"--prompts {path}, line {number}: neither `prompt` nor `messages`")
    return found


class TracePrompts:
    """Words as long as a trace's prompts. Equal blocks of the trace become equal words, so prefixes hit as they did."""

    def __init__(self, spec: FromTrace, seed: int) -> None:
        self._seed = seed
        self._scale = spec.length_scale
        self._max_prompt_len = spec.max_prompt_len
        self._rows = read_trace(Path(spec.path))
        self.size = len(self._rows)
        self._block = lru_cache(maxsize=4096)(self._block_text)

    @property
    def times_s(self) -> list[float]:
        """When each request came."""
        return [row.at_s for row in self._rows]

    def draft(self, number: int) -> Draft:
        """Row `number` of the trace."""
        row = self._rows[number % self.size]
        length = max(1, round(row.prompt_len * self._scale))
        length = min(length, self._max_prompt_len or length)
        return Draft(self._text(row, number, length), max(1, round(row.max_tokens * self._scale)))

    def _text(self, row: Row, number: int, length: int) -> str:
        parts, block_len = [], max(1, round(MOONCAKE_BLOCK_LEN * self._scale))
        for block in row.blocks:
            if length <= 0:
                break
            parts.append(self._block(block, min(length, block_len)))
            length -= block_len
        if length > 0:
            parts.append(text_of(f"{self._seed}/own/{number}", length))
        return " ".join(parts)

    def _block_text(self, block: int, length: int) -> str:
        return text_of(f"{self._seed}/block/{block}", length)
