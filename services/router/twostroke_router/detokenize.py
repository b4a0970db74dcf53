"""Incremental detokenization: new text for each new token, at a cost that does not grow with the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

PROMPT_WINDOW_TOKENS = 6
MAX_PENDING_TOKENS = 16
KEPT_PENDING_TOKENS = 6
REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not (yet) a character."""


class Detokenizer:
    """Turns one choice's tokens into text, whole characters only.

    It decodes a short window of tokens: those already shown, which give the decoder its context (a leading space, a
    byte run), and those pending. Text that ends in a replacement character waits, since the next token may complete
    the character.
    """

    def __init__(self, decode: Decode, prompt_tail: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_tail[-PROMPT_WINDOW_TOKENS:])
        self._shown_text = decode(self._window) if self._window else ""
        if self._shown_text.endswith(REPLACEMENT):
            self._window, self._shown_text = [], ""
        self._num_shown = len(self._window)

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return self._relieve()
        return self._show(text)

    def flush(self) -> str:
        """What is still pending, incomplete characters as replacement characters. Nothing may be added afterwards."""
        return self._show(self._decode(self._window)) if self._num_pending else ""

    def _show(self, text: str) -> str:
        new = text[len(self._shown_text) :]
        if new:
            # What was pending is the next context; what was context before is no longer needed.
            self._window = self._window[self._num_shown :]
            self._shown_text = self._decode(self._window)
            self._num_shown = len(self._window)
        elif self._num_pending > MAX_PENDING_TOKENS:
            self._window.pop()  # a long run of tokens without text, special ones for instance
        return new

    @property
    def _num_pending(self) -> int:
        return len(self._window) - self._num_shown

    def _relieve(self) -> str:
        """Bounds the window under an endless run of invalid bytes: shows its head where cutting changes no text."""
        if self._num_pending < MAX_PENDING_TOKENS:
            return ""
        whole = self._decode(self._window)
        for cut in range(len(self._window) - KEPT_PENDING_TOKENS, self._num_shown, -1):
            head = self._decode(self._window[:cut])
            if head + self._decode(self._window[cut:]) == whole:
                new = head[len(self._shown_text) :]
                self._window, self._shown_text, self._num_shown = self._window[cut:], "", 0
                return new
        return self._show(whole)
