"""One try to run a request on one placement: what was asked of which worker, and what is still open there."""

from __future__ import annotations

from collections.abc import Callable

from twostroke_engine.request import Request, RequestFacts

from twostroke_router.events import Destination, Ended
from twostroke_router.link import Sink, WorkerLink


class Attempt:
    """Sends a request to its workers and remembers who has not said its end. `close` gives everything back."""

    def __init__(
        self,
        request: Request,
        prefill: WorkerLink | None,
        decode: WorkerLink | None,
        sink: Sink,
        left_s: Callable[[], float | None],
    ) -> None:
        self.request = request
        self._prefill = prefill
        self._decode = decode
        self._sink = sink
        self._left_s = left_s
        self._open: dict[str, WorkerLink] = {}
        self.facts: dict[str, RequestFacts] = {}
        """By worker, once it has ended."""

    def start(self, reservation_s: float) -> None:
        """Reserves on decode where prefill will push to it; else the request goes straight to its only worker."""
        if self._prefill is None or self._decode is None:
            alone = self._prefill or self._decode
            if alone is not None:
                self._open[alone.worker_id] = alone
                alone.submit(self.request, self._sink, self._left_s)
            return
        self._open[self._decode.worker_id] = self._decode
        self._decode.reserve(self.request, self._sink, self._left_s, reservation_s)

    def granted(self, destination: Destination) -> None:
        """Decode promised capacity: prefill may begin."""
        if self._prefill is not None and self._prefill.worker_id not in self._open:
            self._open[self._prefill.worker_id] = self._prefill
            self._prefill.submit(self.request, self._sink, self._left_s, destination)

    def ended(self, worker_id: str, end: Ended) -> None:
        """A worker has said its end."""
        self.facts[worker_id] = end.facts
        self._open.pop(worker_id, None)

    def lost(self, worker_id: str) -> None:
        """A worker is gone."""
        self._open.pop(worker_id, None)

    @property
    def open_workers(self) -> frozenset[str]:
        """Workers that have something of this request."""
        return frozenset(self._open)

    @property
    def workers(self) -> frozenset[str]:
        """All workers of the placement."""
        return frozenset(link.worker_id for link in (self._prefill, self._decode) if link)

    @property
    def prefill_id(self) -> str | None:
        """The prefill worker, if there is one."""
        return self._prefill.worker_id if self._prefill else None

    @property
    def decode_id(self) -> str | None:
        """The decode worker, if there is one."""
        return self._decode.worker_id if self._decode else None

    @property
    def prompt_worker(self) -> str | None:
        """The worker that computes the prompt."""
        return self.prefill_id or self.decode_id

    def cancel(self, reason: str) -> None:
        """Tells every worker that has something of it; they still say their end."""
        for link in self._open.values():
            link.cancel(self.request.id, reason)

    def close(self, reason: str) -> None:
        """Cancels what is open and wants to hear no more."""
        self.cancel(reason)
        for link in self._open.values():
            link.forget(self.request.id)
        self._open = {}
