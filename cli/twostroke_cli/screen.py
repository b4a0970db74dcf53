"""Lines of progress, and a status line below them where output is a terminal."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from typing import TextIO


class Screen:
    """Writes to one stream. A closed terminal is no reason to end a cluster, so write errors are dropped."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self.is_terminal = self._stream.isatty()
        self._status = ""

    def line(self, text: str = "") -> None:
        """One line that stays."""
        self._write(f"\r\x1b[K{text}\n{self._status}" if self._status else f"{text}\n")

    def event(self, text: str) -> None:
        """One line that stays, with the time."""
        self.line(f"{time.strftime('%H:%M:%S')} {text}")

    def text(self, text: str) -> None:
        """A piece of a line."""
        self._write(text)

    def status(self, text: str) -> None:
        """Replaces the status line; an empty one removes it. Nothing where output is not a terminal."""
        if not self.is_terminal:
            return
        self._status = text[: shutil.get_terminal_size().columns - 1]
        self._write(f"\r\x1b[K{self._status}")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
