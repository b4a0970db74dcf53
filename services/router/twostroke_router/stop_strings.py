"""Stop strings, found in text that arrives in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """An Aho-Corasick automaton over the stop strings of a request; immutable, shared by its choices.

    A state is a prefix of some stop string: the longest one that the text so far ends with. So its length is how much
    text has to be held back.
    """

    ROOT = 0

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [self.ROOT]
        self.depth = [0]
        self.matched = [0]
        """Per state, the length of the longest stop string that the text ends with; 0 for none."""
        for stop in stops:
            self._insert(stop)
        self._link()

    def _insert(self, stop: str) -> None:
        state = self.ROOT
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(self.ROOT)
                self.depth.append(self.depth[state] + 1)
                self.matched.append(0)
            state = self._next[state][char]
        self.matched[state] = self.depth[state]

    def _link(self) -> None:
        queue = deque(self._next[self.ROOT].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], char)
                queue.append(child)
            self.matched[state] = max(self.matched[state], self.matched[self._fail[state]])

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state != self.ROOT and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, self.ROOT)


class StopScanner:
    """Looks for the first stop string to be complete in one choice's text."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = StopStrings.ROOT
        self._held = ""
        self.stopped = False
        """A stop string was found; nothing may be added afterwards."""

    @property
    def held(self) -> str:
        """Text held back because a stop string may begin with it."""
        return self._held

    def add(self, text: str) -> str:
        """The text that can be shown now; it ends before the stop string if one is complete."""
        held = self._held + text
        for position, char in enumerate(text, start=len(self._held)):
            self._state = self._stops.step(self._state, char)
            matched = self._stops.matched[self._state]
            if matched:
                self.stopped, self._held = True, ""
                return held[: position + 1 - matched]
        cut = len(held) - self._stops.depth[self._state]
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        """The text held back, at the end of a choice that no stop string ended."""
        held, self._held = self._held, ""
        return held
