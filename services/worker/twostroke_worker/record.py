"""One request's answer so far, and how much of it its router has been sent. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from twostroke_engine.messages import ChoiceDelta, LeaseGrant, RequestEnd, RequestUpdate, StageTimes
from twostroke_engine.request import FinishReason, TokenOut


@dataclass(slots=True)
class _ChoiceRecord:
    """Tokens of one choice made here. The first is at offset `base`: decode goes on after the one from prefill."""

    base: int
    sent: int
    """The next offset to send."""
    tokens: list[TokenOut] = field(default_factory=list)
    finish: FinishReason | None = None
    is_finish_sent: bool = False

    @property
    def end(self) -> int:
        """The offset after the last token."""
        return self.base + len(self.tokens)

    @property
    def has_news(self) -> bool:
        """Whether the router lacks a token or the finish reason."""
        return self.sent < self.end or (self.finish is not None and not self.is_finish_sent)

    def add(self, delta: ChoiceDelta) -> bool:
        """Appends new tokens; False if some are missing before them."""
        if delta.offset > self.end:
            return False
        self.tokens += delta.tokens[self.end - delta.offset :]
        self.finish = delta.finish or self.finish
        return True

    def rewind(self, next_offset: int) -> None:
        """The router has everything before `next_offset`, and perhaps not the finish."""
        self.sent = max(next_offset, self.base)
        self.is_finish_sent = False

    def take(self, choice: int, units: int) -> tuple[ChoiceDelta, int]:
        """The tokens to send next, up to about `units` of them and their alternatives; and their cost."""
        start = stop = min(self.sent, self.end)
        cost = 0
        while stop < self.end and cost < units:
            cost += 1 + len(self.tokens[stop - self.base].top)
            stop += 1
        self.sent = max(self.sent, stop)
        finish = self.finish if stop == self.end else None
        self.is_finish_sent = finish is not None
        tokens = tuple(self.tokens[start - self.base : stop - self.base])
        return ChoiceDelta(choice=choice, offset=start, tokens=tokens, finish=finish), cost


@dataclass(slots=True)
class RequestRecord:
    """What the engine has said of one request."""

    request_id: str
    received_s: float = 0.0
    end: RequestEnd | None = None
    end_sent_s: float | None = None
    """When the end was last sent."""
    _grant: LeaseGrant | None = None
    _is_grant_sent: bool = False
    _next_offsets: Sequence[int] = ()
    _choices: dict[int, _ChoiceRecord] = field(default_factory=dict)
    _stages: StageTimes | None = None
    """Not yet sent. They are sent once: after a reconnect they would be about another message."""

    @property
    def has_news(self) -> bool:
        """Whether the router lacks anything."""
        return (
            (self.end is not None and self.end_sent_s is None)
            or (self._grant is not None and not self._is_grant_sent)
            or any(choice.has_news for choice in self._choices.values())
        )

    def add(self, update: RequestUpdate) -> bool:
        """Takes in what the engine says; False if a choice's tokens are not consecutive."""
        self._grant = update.reserved or self._grant
        self.end = update.end or self.end
        self._stages = self._stages or update.stages
        is_whole = True
        for delta in update.deltas:
            is_whole &= self._choice(delta).add(delta)
        return is_whole

    def rewind(self, next_offsets: Sequence[int]) -> None:
        """A new stream: everything from these offsets on, and every single fact, is to be sent (again)."""
        self._next_offsets = next_offsets
        self._is_grant_sent = False
        self.end_sent_s = None
        for index, choice in self._choices.items():
            choice.rewind(self._next_offset(index))

    def take(self, units: int, now_s: float) -> tuple[RequestUpdate, int]:
        """What to send next, and its cost in units. The end goes only with or after the last token."""
        deltas, cost = [], 0
        for index, choice in self._choices.items():
            if choice.has_news and cost < units:
                delta, spent = choice.take(index, units - cost)
                deltas.append(delta)
                cost += spent
        reserved = None if self._is_grant_sent else self._grant
        self._is_grant_sent = self._grant is not None
        end = None
        if self.end_sent_s is None and self.end and not any(choice.has_news for choice in self._choices.values()):
            end, self.end_sent_s = self.end, now_s
        stages, self._stages = self._stages, None
        update = RequestUpdate(
            request_id=self.request_id, deltas=tuple(deltas), reserved=reserved, end=end, stages=stages
        )
        return update, cost + 1

    def _choice(self, delta: ChoiceDelta) -> _ChoiceRecord:
        choice = self._choices.get(delta.choice)
        if choice is None:
            wanted = max(self._next_offset(delta.choice), delta.offset)
            choice = self._choices[delta.choice] = _ChoiceRecord(base=delta.offset, sent=wanted)
        return choice

    def _next_offset(self, choice: int) -> int:
        return self._next_offsets[choice] if choice < len(self._next_offsets) else 0
