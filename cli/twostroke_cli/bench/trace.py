"""Recorded loads: Mooncake's JSON lines (times, lengths, prefix blocks) and Azure's CSV (times, lengths)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec

from twostroke_cli.errors import CommandError

MOONCAKE_BLOCK_LEN = 512
"""Prompt tokens that one of a Mooncake row's `hash_ids` stands for."""
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Row(msgspec.Struct, frozen=True):
    """One request of a trace."""

    at_s: float
    prompt_len: int
    max_tokens: int
    blocks: tuple[int, ...] = ()
    """What the prompt consists of, block by block: rows that begin with equal blocks share a prefix."""


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Row]:
    """Every row in the order of their times; `.csv` is Azure's form, anything else Mooncake's.

    Raises:
        CommandError: the file cannot be read, or is in neither form; the message names the line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(_azure_rows(path, file) if path.suffix == ".csv" else _mooncake_rows(path, file))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--trace {path}: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise CommandError(f"--trace {path}: holds no request")
    return sorted(rows, key=lambda row: row.at_s)


def _mooncake_rows(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    decode = msgspec.json.Decoder(_MooncakeRow).decode
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                row = decode(line)
                yield _checked(Row(row.timestamp / 1000, row.input_length, row.output_length, row.hash_ids))
        except (msgspec.DecodeError, ValueError) as error:
            raise CommandError(f"--trace {path}, line {number}: {error}") from None


def _azure_rows(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    reader = csv.DictReader(lines)
    if missing := [name for name in AZURE_COLUMNS if name not in (reader.fieldnames or ())]:
        raise CommandError(f"--trace {path}: no column {missing[0]}; Azure's traces have {', '.join(AZURE_COLUMNS)}")
    for row in reader:
        when, prompt_len, max_tokens = (row[name] or "" for name in AZURE_COLUMNS)
        try:
            # Seven digits of a second: one more than datetime takes.
            at_s = datetime.fromisoformat(when[:26]).timestamp()
            yield _checked(Row(at_s, int(prompt_len), int(max_tokens)))
        except ValueError as error:
            raise CommandError(f"--trace {path}, line {reader.line_num}: {error}") from None


def _checked(row: Row) -> Row:
    if row.prompt_len < 1 or row.max_tokens < 0 or row.at_s < 0:
        raise ValueError("lengths must be positive and times not negative")
    return row
