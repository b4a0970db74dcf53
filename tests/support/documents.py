"""The Markdown documents of the tree: their links, headings and blocks of code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?:[^][]|\[[^][]*\])*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
RUNNABLE = "runnable"


@dataclass(frozen=True)
class Block:
    """A fenced block of code; its first line is ```LANGUAGE [runnable] [shows="what its output must contain"]."""

    document: Path
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def is_runnable(self) -> bool:
        return RUNNABLE in self.words

    @property
    def shows(self) -> list[str]:
        """What its output must contain."""
        return [word.removeprefix("shows=") for word in self.words if word.startswith("shows=")]


@cache
def documents() -> tuple[Path, ...]:
    """Every Markdown file that people read here."""
    folders = ("docs", "benchmarks", "deploy")
    return tuple(sorted([*ROOT.glob("*.md"), *(path for name in folders for path in (ROOT / name).rglob("*.md"))]))


def blocks(document: Path) -> Iterator[Block]:
    """A document's blocks of code, in order."""
    text = document.read_text()
    for match in _FENCE.finditer(text):
        language, *words = shlex.split(match[2]) or [""]
        yield Block(
            document,
            text.count("\n", 0, match.start()) + 1,
            language,
            tuple(words),
            re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE),
        )


def links(document: Path) -> list[str]:
    """Targets of a document's links and images."""
    return _LINK.findall(_FENCE.sub("", document.read_text()))


def anchors(document: Path) -> set[str]:
    """The names by which a document's headings can be linked to, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", document.read_text())):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found
