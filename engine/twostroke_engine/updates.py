"""`Updates`: what there is to say about requests since the last report, one entry per request."""

from __future__ import annotations

from dataclasses import dataclass, field

from twostroke_engine.messages import ChoiceDelta, LeaseGrant, RequestEnd, RequestUpdate, StageTimes


@dataclass(slots=True)
class _Entry:
    request_id: str
    deltas: list[ChoiceDelta] = field(default_factory=list)
    reserved: LeaseGrant | None = None
    end: RequestEnd | None = None
    stages: StageTimes | None = None

    def frozen(self) -> RequestUpdate:
        return RequestUpdate(
            request_id=self.request_id,
            deltas=tuple(self.deltas),
            reserved=self.reserved,
            end=self.end,
            stages=self.stages,
        )


class Updates:
    """Merges news by request; an id that comes again after its end gets an entry of its own."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._open: dict[str, _Entry] = {}

    def add(self, update: RequestUpdate) -> None:
        """Adds news that someone else put together."""
        entry = self._entry(update.request_id)
        entry.deltas.extend(update.deltas)
        entry.reserved = update.reserved or entry.reserved
        entry.stages = entry.stages or update.stages
        if update.end is not None:
            self.end(update.request_id, update.end)

    def delta(self, request_id: str, delta: ChoiceDelta) -> None:
        """Adds new tokens."""
        self._entry(request_id).deltas.append(delta)

    def stages(self, request_id: str, stages: StageTimes) -> None:
        """Adds what passed before the token just added."""
        entry = self._entry(request_id)
        entry.stages = entry.stages or stages

    def end(self, request_id: str, end: RequestEnd) -> None:
        """Adds the end; nothing can follow it."""
        self._entry(request_id).end = end
        del self._open[request_id]

    def take(self) -> tuple[RequestUpdate, ...]:
        """Everything so far, oldest first; empties it."""
        taken = tuple(entry.frozen() for entry in self._entries)
        self._entries.clear()
        self._open.clear()
        return taken

    def _entry(self, request_id: str) -> _Entry:
        entry = self._open.get(request_id)
        if entry is None:
            entry = self._open[request_id] = _Entry(request_id)
            self._entries.append(entry)
        return entry
