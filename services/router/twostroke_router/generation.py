"""The saga of one request, from admission to cleanup.

    admitted --> placed --> reserved --> prefilling --> decoding --> over
       |           ^ |         |             |             |          |
       |           | |         |             |             |          +-- ends are collected for usage and facts
       |           | +- colocated, or prefill alone: straight to the submission
       |           +---------------------------- a worker failed before any text was shown: placed again, elsewhere
       |                                         if possible, a bounded number of times
       +-- refused (429), no worker (503), deadline (504), a worker failed after text was shown (500, 503),
           the client went away (the generator is closed or cancelled)

Every path ends in `_end`, once: the workers are told to cancel what they still have of the request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from time import monotonic

import msgspec
from twostroke_chassis.backoff import Backoff
from twostroke_chassis.spans import OpenSpan
from twostroke_chassis.telemetry import RouterMetrics
from twostroke_engine.request import ErrorCode, FinishReason, RequestFacts

from twostroke_router.admission import Admission
from twostroke_router.attempt import Attempt
from twostroke_router.choice import Choice, Piece
from twostroke_router.conclusion import Conclusions, Record
from twostroke_router.directory import Directory, PromptHashes
from twostroke_router.errors import Fault, RequestError
from twostroke_router.events import DeadlinePassed, Delta, Ended, Event, Lost, Update
from twostroke_router.explanation import Usage
from twostroke_router.intake import Job
from twostroke_router.placement import Placement, RequestShape
from twostroke_router.stop_strings import StopScanner, StopStrings
from twostroke_router.text import Text
from twostroke_router.timing import Timing

FACTS_S = 1.0
"""How long the end of an answer waits for what the workers measured."""

_FAULTS: dict[ErrorCode, tuple[Fault, bool]] = {
    # Not by this router: a worker that drains, for instance.
    ErrorCode.CANCELLED: (Fault.UNAVAILABLE, True),
    ErrorCode.INVALID: (Fault.INVALID, False),
    ErrorCode.OVERLOADED: (Fault.OVERLOADED, True),
    ErrorCode.DEADLINE: (Fault.DEADLINE, False),
    ErrorCode.TRANSFER: (Fault.UNAVAILABLE, True),
    ErrorCode.NUMERIC: (Fault.INTERNAL, False),
    ErrorCode.DRAINING: (Fault.UNAVAILABLE, True),
    ErrorCode.INTERNAL: (Fault.INTERNAL, True),
}
"""What a worker's error is to a client, and whether another try may help."""


@dataclass(frozen=True)
class GenerationLimits:
    """How long and how often."""

    request_timeout_s: float = 3600.0
    reservation_s: float = 60.0
    max_retries: int = 3


@dataclass(frozen=True)
class Cluster:
    """What every saga uses."""

    text: Text
    directory: Directory
    admission: Admission
    metrics: RouterMetrics
    limits: GenerationLimits
    conclusions: Conclusions


@dataclass(frozen=True)
class _Failure:
    fault: Fault
    message: str
    may_retry: bool
    workers: frozenset[str]


class Generation:
    """One request. Iterate `pieces` to its end, or close it; then ask for usage and facts."""

    def __init__(self, job: Job, cluster: Cluster) -> None:
        self._caller = job.caller
        self._cluster = cluster
        self._stops = StopStrings(job.stops) if job.stops else None
        self._hashes = PromptHashes(job.request)
        self._timing = Timing(cluster.metrics, job.caller.arrival)
        self._request = job.request
        timeout_s = min(cluster.limits.request_timeout_s, job.caller.deadline_s or float("inf"))
        self._deadline = monotonic() + timeout_s
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._choices: list[Choice] = []
        self._attempt: Attempt | None = None
        self._placement: Placement | None = None
        self._failure: _Failure | None = None
        self._avoid: frozenset[str] = frozenset()
        self._num_retries = 0
        self._backoff = Backoff(initial_s=0.05, max_s=1.0, factor=3.0)
        self._unshown: deque[Piece] = deque()
        self._has_shown = False

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer as it comes.

        Raises:
            RequestError: refused, failed or out of time.
        """
        outcome = "cancelled"
        span = self._cluster.conclusions.begin(self._caller)
        self._request = msgspec.structs.replace(self._request, traceparent=span.traceparent)
        timer = asyncio.get_running_loop().call_later(self._left_s(), self._events.put_nowait, DeadlinePassed())
        self._cluster.metrics.requests_active.inc()
        try:
            with self._cluster.admission.admitted():
                self._timing.admitted()
                self._reset_choices()
                while not self._is_over:
                    self._unshown += await self._advance()
                    while self._unshown and (self._is_over or not self._caller.wants_whole):
                        self._has_shown = True
                        yield self._unshown.popleft()
                await self._collect_facts()
            outcome = (self._choices[0].finish or FinishReason.STOP).name.lower()
        except RequestError as error:
            outcome = error.fault.name.lower()
            raise
        finally:
            timer.cancel()
            self._end(outcome, span)

    # ---- afterwards --------------------------------------------------------------------------------------------------

    @property
    def usage(self) -> Usage:
        """Tokens billed so far."""
        return Usage(
            prompt_tokens=self._request.num_prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
        )

    def explain(self) -> dict[str, object]:
        """Where the request ran and what was measured."""
        attempt = self._attempt
        facts = list(attempt.facts.values()) if attempt else []
        return {
            "request_id": self._caller.request_id,
            "prefill_worker": attempt.prefill_id if attempt else None,
            "decode_worker": attempt.decode_id if attempt else None,
            "kv_bytes": max((each.kv_bytes for each in facts), default=0),
            "kv_segments": max((each.kv_segments for each in facts), default=0),
            "cached_tokens": self._cached_tokens,
            "ttft_s": self._timing.ttft_s,
            "itl_s": self._timing.itl_s,
            "placement_reason": self._placement.reason if self._placement else None,
            "preemptions": sum(each.preemptions for each in facts),
        }

    @property
    def _cached_tokens(self) -> int:
        if self._attempt is None:
            return 0
        return self._attempt.facts.get(self._attempt.prompt_worker or "", RequestFacts()).cached_tokens

    # ---- steps -------------------------------------------------------------------------------------------------------

    @property
    def _is_over(self) -> bool:
        return all(choice.finish is not None for choice in self._choices)

    def _left_s(self) -> float:
        return max(0.0, self._deadline - monotonic())

    def _reset_choices(self) -> None:
        text, request = self._cluster.text, self._request
        self._choices = [
            Choice(
                index,
                text.detokenizer(request.token_ids),
                StopScanner(self._stops) if self._stops else None,
                request.sampling.min_tokens,
            )
            for index in range(request.n)
        ]

    async def _advance(self) -> Sequence[Piece]:
        if self._failure is not None:
            await self._retry(self._failure)
        if self._attempt is None:
            await self._start()
        return self._on(await self._events.get())

    async def _start(self) -> None:
        """Places the request and sends it out."""
        request = self._request
        shape = RequestShape(request.num_prompt_tokens, request.sampling.max_tokens, request.n, self._avoid)
        try:
            async with asyncio.timeout(self._left_s()):
                placement = await self._cluster.admission.place(shape, self._hashes)
        except TimeoutError:
            raise _out_of_time() from None
        links = [self._cluster.directory.link(name) if name else None for name in (placement.prefill, placement.decode)]
        if self._num_retries:
            # A late cancel of the last try must not hit this one.
            request = msgspec.structs.replace(request, id=f"{request.id}.{self._num_retries}")
        self._placement = placement
        self._timing.placed()
        self._attempt = Attempt(request, links[0], links[1], self._events.put_nowait, self._left_s)
        self._attempt.start(self._cluster.limits.reservation_s)
        self._cluster.metrics.placements.labels(_kind(placement)).inc()

    def _on(self, event: Event) -> Sequence[Piece]:
        if isinstance(event, DeadlinePassed):
            raise _out_of_time()
        if self._attempt is None or event.request_id != self._attempt.request.id:
            return ()  # of an earlier try
        if isinstance(event, Lost):
            self._on_lost(self._attempt, event)
            return ()
        return self._on_update(self._attempt, event)

    def _on_update(self, attempt: Attempt, update: Update) -> Sequence[Piece]:
        if update.held_s is not None:
            self._timing.receipt(update)
        pieces = [piece for delta in update.deltas if (piece := self._on_delta(delta, update))]
        if update.reserved is not None:
            self._timing.granted()
            attempt.granted(update.reserved)
        if update.end is not None:
            self._on_end(attempt, update.worker_id, update.end)
        if self._is_over and attempt.open_workers:
            self._stop_workers(attempt)
        return pieces

    def _on_delta(self, delta: Delta, update: Update) -> Piece | None:
        choice = self._choices[delta.choice]
        before = choice.num_tokens
        piece = choice.add(delta.offset, delta.tokens, delta.finish)
        self._timing.tokens(delta.choice, before, choice.num_tokens, update)
        return piece

    def _stop_workers(self, attempt: Attempt) -> None:
        """Every choice has ended here; workers that run past a stop string do not know it."""
        if self._stops is not None:
            attempt.cancel("ended by a stop string")

    # ---- failure -----------------------------------------------------------------------------------------------------

    def _on_end(self, attempt: Attempt, worker_id: str, end: Ended) -> None:
        attempt.ended(worker_id, end)
        if self._is_over or self._decode_may_go_on(attempt, worker_id):
            return
        if end.error is not None:
            fault, may_retry = _FAULTS[end.error]
            blamed = attempt.workers if end.error is ErrorCode.TRANSFER else frozenset({worker_id})
            self._fail(fault, end.message or f"the request failed ({end.error.name.lower()})", may_retry, blamed)
        elif not attempt.open_workers:
            self._fail(Fault.INTERNAL, "the workers ended without an end of the answer", True, attempt.workers)

    def _on_lost(self, attempt: Attempt, lost: Lost) -> None:
        attempt.lost(lost.worker_id)
        if not self._is_over and not self._decode_may_go_on(attempt, lost.worker_id):
            self._fail(Fault.UNAVAILABLE, lost.reason, True, frozenset({lost.worker_id}))

    def _decode_may_go_on(self, attempt: Attempt, worker_id: str) -> bool:
        """Prefill is done or gone, but its tokens are here and decode may have the KV: decode will say if not."""
        is_prefill = worker_id == attempt.prefill_id and attempt.decode_id in attempt.open_workers
        return is_prefill and all(choice.num_tokens for choice in self._choices)

    def _fail(self, fault: Fault, message: str, may_retry: bool, workers: frozenset[str]) -> None:
        self._failure = self._failure or _Failure(fault, message, may_retry, workers)

    async def _retry(self, failure: _Failure) -> None:
        """Gives this try up and prepares another, unless a client would notice or it has been tried enough."""
        if self._has_shown or not failure.may_retry or self._num_retries >= self._cluster.limits.max_retries:
            raise RequestError(failure.fault, failure.message)
        if self._attempt is not None:
            self._attempt.close(failure.message)
        self._attempt, self._failure = None, None
        self._cluster.metrics.retries.labels(failure.fault.name.lower()).inc()
        self._num_retries += 1
        self._avoid |= failure.workers
        self._unshown.clear()
        self._reset_choices()
        await asyncio.sleep(min(self._backoff.next_s(), self._left_s()))

    # ---- the end -----------------------------------------------------------------------------------------------------

    async def _collect_facts(self) -> None:
        """Waits a little for the ends: usage needs the prompt worker's, an explanation needs all."""
        attempt = self._attempt
        if attempt is None:
            return
        wanted = attempt.workers if self._caller.wants_facts else frozenset({attempt.prompt_worker})
        try:
            async with asyncio.timeout(min(FACTS_S, self._left_s())):
                while wanted & attempt.open_workers:
                    event = await self._events.get()
                    if isinstance(event, Update | Lost) and event.request_id == attempt.request.id:
                        self._on(event)
        except TimeoutError:
            return  # the answer is complete without them

    def _end(self, outcome: str, span: OpenSpan) -> None:
        """The one cleanup."""
        if self._attempt is not None:
            self._attempt.close("ended by the router")
        self._cluster.metrics.requests_active.dec()
        record = Record(
            caller=self._caller,
            request=self._request,
            outcome=outcome,
            timing=self._timing,
            usage=self.usage,
            placement=self._placement,
            facts=self._attempt.facts if self._attempt else {},
            finishes=[choice.finish.name.lower() for choice in self._choices if choice.finish is not None],
            num_retries=self._num_retries,
        )
        self._cluster.conclusions.end(record, span)


def _out_of_time() -> RequestError:
    return RequestError(Fault.DEADLINE, "the request ran out of time")


def _kind(placement: Placement) -> str:
    if placement.prefill is None:
        return "colocated"
    return "prefill_only" if placement.decode is None else "disaggregated"
