"""One choice of a request: tokens in, in any order and more than once; text out, in order and once."""

from __future__ import annotations

from dataclasses import dataclass

from twostroke_engine.request import FinishReason, TokenOut

from twostroke_router.detokenize import Detokenizer
from twostroke_router.stop_strings import StopScanner

_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice, and the tokens behind it. `finish` is set on the last piece of a choice."""

    choice: int
    text: str
    tokens: tuple[TokenOut, ...]
    finish: FinishReason | None = None


class Choice:
    """Merges the tokens of prefill and decode by offset, detokenizes them and looks for stop strings."""

    def __init__(
        self, index: int, detokenizer: Detokenizer, scanner: StopScanner | None = None, min_tokens: int = 0
    ) -> None:
        self._index = index
        self._detokenizer = detokenizer
        self._scanner = scanner
        self._min_tokens = min_tokens
        self._early: dict[int, tuple[tuple[TokenOut, ...], FinishReason | None]] = {}
        self._unshown: list[TokenOut] = []
        self.num_tokens = 0
        """Tokens billed: all up to the end, those after a stop string left out."""
        self.finish: FinishReason | None = None

    def add(self, offset: int, tokens: tuple[TokenOut, ...], finish: FinishReason | None) -> Piece | None:
        """Takes tokens whose first has `offset`; returns what can be shown now."""
        if self.finish is not None:
            return None
        if offset > self.num_tokens:
            # Decode's first tokens can overtake prefill's: they are on different streams.
            self._early[offset] = (tokens, finish)
            return None
        text = self._consume(tokens[self.num_tokens - offset :], finish)
        while self.finish is None and self.num_tokens in self._early:
            text += self._consume(*self._early.pop(self.num_tokens))
        return self._piece(text)

    def _piece(self, text: str) -> Piece | None:
        if not text and self.finish is None:
            return None
        tokens, self._unshown = tuple(self._unshown), []
        return Piece(self._index, text, tokens, self.finish)

    def _consume(self, tokens: tuple[TokenOut, ...], finish: FinishReason | None) -> str:
        text = ""
        for place, token in enumerate(tokens, start=1):
            self.num_tokens += 1
            self._unshown.append(token)
            # The token that made the engine stop is an end token or a stop id: no part of the text.
            if finish is not FinishReason.STOP or place < len(tokens):
                text += self._scan(self._detokenizer.add(token.id))
            if self.finish is not None:
                return text
        return text + self._end(finish) if finish in _ENDS else text

    def _end(self, finish: FinishReason | None) -> str:
        text = self._scan(self._detokenizer.flush())
        if self.finish is None:
            self.finish = finish
            text += self._scanner.flush() if self._scanner else ""
        return text

    def _scan(self, text: str) -> str:
        if self._scanner is None or self.num_tokens <= self._min_tokens:
            return text
        shown = self._scanner.add(text)
        if self._scanner.stopped:
            self.finish = FinishReason.STOP
        return shown
