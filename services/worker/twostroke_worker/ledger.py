"""What each router asked of this worker and what it has been told. Pure: no I/O, no clock.

News is not queued: a record remembers the tokens of its request and how far the router has been sent them, and each
router has a set of dirty records. A slow router therefore only coalesces; it costs no memory beyond the tokens of its
requests and never holds up a step. After a reconnect the router names the offsets it wants and the ledger goes on
from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from twostroke_engine.messages import RequestEnd, RequestUpdate
from twostroke_engine.request import ErrorCode, RequestFacts

from twostroke_worker.record import RequestRecord

RESUME_GRACE_S = 10.0
"""How long an ended request is kept after it was sent, and a silent router's requests before they are cancelled."""

MAX_TAKE_UNITS = 100_000
"""Tokens and alternatives in one message, so that it stays well below gRPC's 4 MiB."""


def ended(error: ErrorCode, message: str) -> RequestEnd:
    """The end of a request that the engine never saw, or no longer knows."""
    return RequestEnd(error=error, message=message, facts=RequestFacts())


@dataclass(slots=True)
class _RouterLog:
    """One router's records. `stream` numbers its latest stream; `left_s` is None while that stream is open."""

    stream: int = 0
    left_s: float | None = None
    records: dict[str, RequestRecord] = field(default_factory=dict)
    dirty: dict[str, None] = field(default_factory=dict)
    receipts: list[tuple[str, float]] = field(default_factory=list)


class Ledger:
    """Records of all routers; request ids are unique among the live requests of all of them."""

    def __init__(self, grace_s: float = RESUME_GRACE_S, max_take_units: int = MAX_TAKE_UNITS) -> None:
        self._grace_s = grace_s
        self._max_take_units = max_take_units
        self._routers: dict[str, _RouterLog] = {}
        self._owners: dict[str, str] = {}  # live requests only

    # ---- routers -----------------------------------------------------------------------------------------------------

    def connect(self, router_id: str, resumes: Mapping[str, Sequence[int]]) -> tuple[int, list[str]]:
        """Opens a stream, which supersedes the router's earlier one. Returns its number and requests to cancel.

        `resumes` are the requests that the router still wants, with its next offset of each choice. It has given up
        those it does not name.
        """
        log = self._routers.setdefault(router_id, _RouterLog())
        log.stream += 1
        log.left_s = None
        log.dirty.clear()
        log.receipts.clear()
        forgotten = [request_id for request_id in log.records if request_id not in resumes]
        orphans = [request_id for request_id in forgotten if self._drop(router_id, request_id)]
        for request_id, next_offsets in resumes.items():
            if record := log.records.get(request_id):
                record.rewind(next_offsets)
                self._mark(log, record)
            else:
                self.refuse(router_id, request_id, ended(ErrorCode.INTERNAL, "unknown request: the worker restarted"))
        return log.stream, orphans

    def disconnect(self, router_id: str, stream: int, now_s: float) -> None:
        """The stream ended; nothing happens if a newer one has superseded it."""
        log = self._routers.get(router_id)
        if log and log.stream == stream:
            log.left_s = now_s

    def is_current(self, router_id: str, stream: int) -> bool:
        """Whether no newer stream of that router has superseded this one."""
        log = self._routers.get(router_id)
        return log is not None and log.stream == stream

    # ---- requests ----------------------------------------------------------------------------------------------------

    def knows(self, router_id: str, request_id: str) -> bool:
        """Whether a submission of this id is a duplicate. One that was told its end is not: the router tries again."""
        log = self._routers.get(router_id)
        record = log.records.get(request_id) if log else None
        return record is not None and record.end_sent_s is None

    def is_live(self, request_id: str) -> bool:
        """Whether the engine may still run this request, whoever owns it."""
        return request_id in self._owners

    def owns(self, router_id: str, request_id: str) -> bool:
        """Whether this live request is that router's."""
        return self._owners.get(request_id) == router_id

    @property
    def live(self) -> list[str]:
        """Ids of requests that have not ended."""
        return list(self._owners)

    def accept(self, router_id: str, request_id: str, now_s: float = 0.0, *, has_receipt: bool = False) -> None:
        """Opens the record of a new request that came now; its router may be told so at once."""
        log = self._routers.setdefault(router_id, _RouterLog())
        log.records[request_id] = RequestRecord(request_id, received_s=now_s)
        if has_receipt:
            log.receipts.append((request_id, now_s))
        self._owners[request_id] = router_id

    def refuse(self, router_id: str, request_id: str, end: RequestEnd) -> None:
        """Ends a request that never reached the engine."""
        log = self._routers.setdefault(router_id, _RouterLog())
        record = log.records[request_id] = RequestRecord(request_id)
        record.end = end
        self._mark(log, record)

    def apply(self, updates: Iterable[RequestUpdate]) -> list[str]:
        """Takes in an engine's news. Returns requests whose tokens had a gap: they ended here, cancel them there."""
        broken = []
        for update in updates:
            router_id = self._owners.get(update.request_id)
            if router_id is None:
                continue  # cancelled by expiry, or its router gave it up
            log = self._routers[router_id]
            record = log.records[update.request_id]
            if not record.add(update):
                record.end = ended(ErrorCode.INTERNAL, "the engine's tokens are not consecutive")
                broken.append(update.request_id)
            if record.end:
                del self._owners[update.request_id]
            self._mark(log, record)
        return broken

    # ---- news --------------------------------------------------------------------------------------------------------

    def has_news(self, router_id: str) -> bool:
        """Whether `take` or `take_receipts` would return anything."""
        log = self._routers.get(router_id)
        return bool(log and (log.dirty or log.receipts))

    @property
    def has_unsent(self) -> bool:
        """Whether a connected router has yet to be sent something."""
        return any(log.dirty and log.left_s is None for log in self._routers.values())

    def received_s(self, router_id: str, request_id: str) -> float:
        """When a request came that `take` has just told of."""
        return self._routers[router_id].records[request_id].received_s

    def take_receipts(self, router_id: str) -> list[tuple[str, float]]:
        """Requests whose router has not been told that they came, and when they did."""
        log = self._routers[router_id]
        taken, log.receipts = log.receipts, []
        return taken

    def take(self, router_id: str, now_s: float) -> list[RequestUpdate]:
        """What the router has not been sent, as much as fits one message; counts as sent from here on."""
        log = self._routers[router_id]
        units, updates = self._max_take_units, []
        for request_id in list(log.dirty):
            if units <= 0:
                break
            del log.dirty[request_id]
            update, cost = log.records[request_id].take(units, now_s)
            updates.append(update)
            units -= cost
            self._mark(log, log.records[request_id])
        return updates

    def expire(self, now_s: float) -> list[str]:
        """Drops what was kept long enough; returns live requests of routers that stayed away, to cancel."""
        orphans: list[str] = []
        for router_id, log in list(self._routers.items()):
            if log.left_s is not None and now_s - log.left_s > self._grace_s:
                orphans += [request_id for request_id in list(log.records) if self._drop(router_id, request_id)]
                del self._routers[router_id]
                continue
            for record in list(log.records.values()):
                if record.end_sent_s is not None and now_s - record.end_sent_s > self._grace_s:
                    self._drop(router_id, record.request_id)
        return orphans

    def _mark(self, log: _RouterLog, record: RequestRecord) -> None:
        if record.has_news:
            log.dirty[record.request_id] = None

    def _drop(self, router_id: str, request_id: str) -> bool:
        """Forgets a record; True if the engine may still run it."""
        del self._routers[router_id].records[request_id]
        is_live = self.owns(router_id, request_id)
        if is_live:
            del self._owners[request_id]
        return is_live
