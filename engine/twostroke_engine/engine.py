"""`Engine`: continuous batching over one model and one pool of KV blocks. Owned by one thread; no locks.

A step is: plan, launch, land, report. A request comes in by `submit` (all of it is computed here) or by `adopt` (its
prompt's KV came from another worker); with a sink id it leaves after its first token, and its blocks stay referenced
until the transfer has closed.

Where launching returns before the device is done (`Runner.overlaps`), a step is planned and launched before the one
before it has landed, so that the device never waits for the host. What was computed for a sequence that turns out to
have ended lies behind its last token, in blocks that were its own at launch; whoever gets those next writes later.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from twostroke_engine.active import ActiveRequest
from twostroke_engine.config import EngineConfig
from twostroke_engine.kv.block_pool import BlockPool
from twostroke_engine.kv.spec import KVSpec
from twostroke_engine.messages import BlockEvents, ChoiceDelta, EngineLoad, RequestEnd, RequestUpdate
from twostroke_engine.request import ErrorCode, FinishReason, Request, RequestFacts, TokenOut
from twostroke_engine.schedule.plan import StepOutput, StepPlan
from twostroke_engine.schedule.scheduler import Scheduler
from twostroke_engine.schedule.stopping import StopRules
from twostroke_engine.sequence import Sequence
from twostroke_engine.transfer.absent import NoSender
from twostroke_engine.transfer.end import HandOffOutcome, KVSink, SendingEnd
from twostroke_engine.transfer.messages import FirstToken
from twostroke_engine.updates import Updates


class Runner(Protocol):
    """Computes plans; the only part that touches tensors."""

    overlaps: bool
    """`launch` returns before the device is done, so that the next plan is worth making before this one has landed."""

    def launch(self, plan: StepPlan, sink: KVSink) -> Callable[[], StepOutput]:
        """Starts a step. The call that comes back waits for its end; steps land in the order of their launches."""
        ...


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched and has not landed."""

    plan: StepPlan
    landing: Callable[[], StepOutput]
    launched_s: float
    is_open: bool
    """The next step may be planned before this one lands: no logits of that depend on which tokens this one chooses."""


class Engine:
    """The engine core: requests in, `RequestUpdate`s out, one `step` at a time."""

    def __init__(
        self,
        config: EngineConfig,
        spec: KVSpec,
        num_blocks: int,
        runner: Runner,
        eos_token_ids: Items[int],
        clock: Callable[[], float],
    ) -> None:
        pool_tokens = num_blocks * spec.block_size
        self.max_model_len = min(config.max_model_len or pool_tokens, pool_tokens)
        self.pool = BlockPool(num_blocks)
        self.steps = 0
        self.step_s = 0.0
        self._block_size = spec.block_size
        self._runner = runner
        self._clock = clock
        self._sender: SendingEnd = NoSender()
        self._flights: deque[_Flight] = deque()
        self._landed_s = clock()
        self._scheduler = Scheduler(
            self.pool, spec.block_size, config.max_step_tokens, config.max_running, config.batch_invariant
        )
        self._rules = StopRules(eos_token_ids, self.max_model_len)
        self._active: dict[str, ActiveRequest] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._updates = Updates()
        self._sequence_ids = count(1)

    def attach_sender(self, sender: SendingEnd) -> None:
        """Names the sender of hand-offs; it needs the engine first, hence this second half of construction."""
        self._sender = sender

    # ---- intake ------------------------------------------------------------------------------------------------------

    def accepts(self, request: Request) -> bool:
        """Whether the request can run here; if not, its end is reported, unless its id is in use."""
        if request.id in self._active:
            return False
        if problem := self._problem(request):
            self.refuse(request.id, problem)
        return not problem

    def refuse(self, request_id: str, message: str) -> None:
        """Reports that a request cannot run here."""
        self._updates.end(request_id, RequestEnd(error=ErrorCode.INVALID, message=message, facts=RequestFacts()))

    def submit(self, request: Request, sink_id: int = 0, received_s: float | None = None) -> None:
        """Queues a request; with a sink id it is handed over after its first token. It arrives now, if not then."""
        if not self.accepts(request):
            return
        arrived_s = self._clock() if received_s is None else received_s
        active = self._open(ActiveRequest(request, arrived_s, sink_id, num_stages_due=1 if sink_id else 2))
        sequence = self._new_sequence(active)
        sequence.sink_id = sink_id
        self._scheduler.add(sequence, active.arrived_s)

    def adopt(
        self, request: Request, block_ids: tuple[int, ...], first: tuple[FirstToken, ...], facts: RequestFacts
    ) -> None:
        """Goes on after the first tokens of a prompt whose KV is complete in these blocks (`DecodeHost`)."""
        unfinished = [token for token in first if not token.finished]
        if not unfinished or request.id in self._active:
            self.pool.release(block_ids[::-1])
            if not unfinished:
                self._updates.end(request.id, RequestEnd(facts=facts))
            return
        active = self._open(ActiveRequest(request, self._clock(), facts=facts))
        sequences = [self._new_sequence(active, token.choice) for token in unfinished]
        for sequence, token in zip(sequences, unfinished, strict=True):
            sequence.append(token.token_id)
        self._scheduler.adopt(sequences[0], block_ids, active.arrived_s)
        for sequence in sequences[1:]:
            self._scheduler.fork(sequences[0], sequence)

    # ---- ends --------------------------------------------------------------------------------------------------------

    def cancel(self, request_id: str) -> bool:
        """Ends a request in whatever phase it is; False if it is unknown."""
        active = self._active.get(request_id)
        if active is None:
            return False
        self._stop(active, ErrorCode.CANCELLED, "cancelled")
        return True

    def hand_off_closed(self, outcome: HandOffOutcome) -> None:
        """No one reads the blocks any more: release them and report the end (`PrefillHost`)."""
        active = self._active.get(outcome.request_id)
        if active is None or not active.sink_id:
            return
        active.add_outcome(outcome)
        if outcome.error and active.verdict is None:
            active.verdict = (ErrorCode.TRANSFER, outcome.error)
        self._close(active)

    def report(self, update: RequestUpdate) -> None:
        """Adds a transfer end's news to the next report (`DecodeHost`)."""
        self._updates.add(update)

    def may_promise(self, num_blocks: int) -> bool:
        """Whether a reservation may have this capacity now (`DecodeHost`)."""
        return self._scheduler.may_promise(num_blocks)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One stroke: plan, launch, land, report. False if there was nothing to do."""
        began_s = self._clock()
        self._end_overdue(began_s)
        must_know = not all(flight.is_open for flight in self._flights)
        if must_know:
            self._land()
        plan = self._scheduler.plan(self.steps + 1, began_s)
        if plan.scheduled:
            self._launch(plan, began_s)
        elif not self._flights:
            return must_know
        num_aloft = 1 if plan.scheduled and self._runner.overlaps else 0
        while len(self._flights) > num_aloft:
            self._land()
        return True

    @property
    def has_work(self) -> bool:
        """Whether a sequence runs or waits, or a step has not landed; a step may still find nothing to compute."""
        return self._scheduler.num_running + self._scheduler.num_waiting + len(self._flights) > 0

    def take_updates(self) -> tuple[RequestUpdate, ...]:
        """News of requests since the last call."""
        return self._updates.take()

    def take_block_events(self) -> BlockEvents | None:
        """Changes of the prefix cache since the last call."""
        return self.pool.take_events()

    def load(self) -> EngineLoad:
        """How busy the engine is, transfer ends left out."""
        return EngineLoad(
            waiting=self._scheduler.num_waiting,
            running=self._scheduler.num_running,
            queued_tokens=self._scheduler.num_queued_tokens,
            blocks_total=self.pool.num_blocks,
            blocks_free=self.pool.num_free,
            blocks_cached=self.pool.num_cached,
            blocks_leased=self.pool.num_referenced,
            blocks_promised=self.pool.num_promised,
            step_s=self.step_s,
            steps=self.steps,
            preemptions=self._scheduler.preemptions,
            prefix_hit_tokens=self._scheduler.prefix_hit_tokens,
            prefix_query_tokens=self._scheduler.prefix_query_tokens,
            longest_wait_s=self._scheduler.longest_wait_s,
        )

    # ---- after a step ------------------------------------------------------------------------------------------------

    def _launch(self, plan: StepPlan, now_s: float) -> None:
        sink = self._sender.step_sink(self._scheduler.chunks_of_hand_off(plan))
        landing = self._runner.launch(plan, sink)
        self._scheduler.launched(plan)
        self.steps += 1
        self._flights.append(_Flight(plan, landing, now_s, is_open=not self._penalizes(plan)))

    def _penalizes(self, plan: StepPlan) -> bool:
        sampled = (self._scheduler.find(entry.sequence_id) for entry in plan.scheduled if entry.choices)
        return any(sequence is not None and sequence.request.sampling.penalizes for sequence in sampled)

    def _land(self) -> None:
        flight = self._flights.popleft()
        output = flight.landing()
        self._scheduler.landed(flight.plan)
        for sampled in output.sampled:
            # A broken choice ends its whole request, and with it sequences that were sampled in this very step.
            sequence = self._scheduler.find(sampled.sequence_id)
            if sequence is None:
                continue
            active = self._active[sequence.request.id]
            if sampled.finite:
                self._extend(active, sequence, sampled.tokens)
            else:
                self._break(active)
        self._measure_step(flight)

    def _extend(self, active: ActiveRequest, sequence: Sequence, tokens: Items[TokenOut]) -> None:
        """Adds sampled tokens. At the end of a prompt there is one for each choice, and the others begin here."""
        if active.num_stages_due:
            self._updates.stages(active.request.id, active.token_made(self._clock()))
        others = range(1, len(tokens))
        branches = [sequence, *(self._new_sequence(active, choice) for choice in others)]
        finishes = [self._append(branch, token) for branch, token in zip(branches, tokens, strict=True)]
        if active.sink_id:
            self._hand_over(active, branches, finishes)
            return
        for branch, finish in zip(branches[1:], finishes[1:], strict=True):
            if finish is None:
                self._scheduler.fork(sequence, branch)
            else:
                branch.retire()
        if finishes[0] is not None:
            self._scheduler.retire(sequence)
        if not active.live:
            self._finish(active)

    def _append(self, sequence: Sequence, token: TokenOut) -> FinishReason | None:
        offset = sequence.num_generated
        sequence.append(token.id)
        finish = self._rules.finish(sequence)
        delta = ChoiceDelta(choice=sequence.choice, offset=offset, tokens=(token,), finish=finish)
        self._updates.delta(sequence.request.id, delta)
        return finish

    def _hand_over(
        self, active: ActiveRequest, branches: Items[Sequence], finishes: Items[FinishReason | None]
    ) -> None:
        """The prompt is computed and every choice has its first token: decode goes on from here."""
        first = tuple(
            FirstToken(branch.choice, branch.token_ids[-1], finish is not None)
            for branch, finish in zip(branches, finishes, strict=True)
        )
        self._scheduler.hand_over(branches[0])
        for branch in branches[1:]:
            branch.retire()
        self._sender.prompt_computed(active.sink_id, first)

    def _break(self, active: ActiveRequest) -> None:
        for sequence in active.live:
            self._scheduler.retract(sequence)
        self._stop(active, ErrorCode.NUMERIC, "the model gave non-finite logits")

    def _measure_step(self, flight: _Flight) -> None:
        """A step that was launched behind another one began when that had landed."""
        now_s = self._clock()
        took_s = now_s - max(flight.launched_s, self._landed_s)
        self._landed_s = now_s
        self.step_s = took_s if flight.plan.step == 1 else 0.9 * self.step_s + 0.1 * took_s

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _problem(self, request: Request) -> str:
        if not request.token_ids:
            return "prompt: it is empty"
        if request.num_prompt_tokens >= self.max_model_len:
            return f"prompt: {request.num_prompt_tokens} tokens leave no room to generate within {self.max_model_len}"
        if request.n < 1:
            return f"n: {request.n} is not positive"
        if request.sampling.max_tokens < 1:
            return f"max_tokens: {request.sampling.max_tokens} is not positive"
        return ""

    def _open(self, active: ActiveRequest) -> ActiveRequest:
        self._active[active.request.id] = active
        if (deadline_s := active.deadline_s) is not None:
            heapq.heappush(self._deadlines, (deadline_s, active.request.id))
        return active

    def _new_sequence(self, active: ActiveRequest, choice: int = 0) -> Sequence:
        number = next(self._sequence_ids)
        sequence = Sequence(number, active.request, self._block_size, choice, self.max_model_len)
        active.sequences.append(sequence)
        return sequence

    def _end_overdue(self, now_s: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            active = self._active.get(request_id)
            # An entry may be left over from an earlier request of that name.
            if active is not None and active.deadline_s == deadline_s:
                self._stop(active, ErrorCode.DEADLINE, "the deadline has passed")

    def _stop(self, active: ActiveRequest, code: ErrorCode, message: str) -> None:
        """Ends a request early; if a transfer reads its blocks, as soon as that has let go of them."""
        if active.verdict is not None:
            return
        active.verdict = (code, message)
        if not active.sink_id:
            self._close(active)
            return
        for sequence in active.live:
            self._scheduler.hand_over(sequence)
        if not self._sender.cancel(active.request.id) and active.request.id in self._active:
            self._close(active)

    def _close(self, active: ActiveRequest) -> None:
        for sequence in active.live:
            self._scheduler.retire(sequence)
        self._finish(active)

    def _finish(self, active: ActiveRequest) -> None:
        code, message = active.verdict or (None, "")
        facts = active.measured(self._clock())
        self._updates.end(active.request.id, RequestEnd(error=code, message=message, facts=facts))
        del self._active[active.request.id]
