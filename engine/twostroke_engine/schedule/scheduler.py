"""`Scheduler`: which tokens the next step computes, and whose blocks hold their KV.

A step's plan, in this order and within one token budget:

    1. waiting sequences that hold their KV already take free places in the batch
    2. running sequences with one token to compute (decode), growing by a block where they need one
    3. running sequences with more to compute (prompt chunks, recomputation)
    4. the waiting queue's head, as long as there are places, budget and blocks; the head is never skipped

A sequence gets the blocks of all its known tokens when it starts, so only decode grows. When growth finds no block, the
least important sequence that holds any is preempted: its blocks go back to the cache and it waits to be recomputed.
Sequences being handed over never grow and are never preempted.

A plan may be made while the plan before it is still computed: `launched` moves the counts on, `landed` says that the
results are known. What cannot go on before it knows its token is left out of the plan (`Sequence.holds_for_token`).

In batch-invariant mode a token is always computed by the same kind of step: prompt tokens in chunks, generated ones one
a step, also when they are computed again; and only blocks of prompts are cached.

Pure Python: no torch, no clock (time is an argument), no randomness.
"""

from __future__ import annotations

from itertools import chain

from twostroke_engine.kv.block_pool import BlockPool, OutOfBlocks
from twostroke_engine.schedule.draft import PlanDraft
from twostroke_engine.schedule.order import WaitingQueue, rank
from twostroke_engine.schedule.plan import BlockCopy, StepPlan
from twostroke_engine.schedule.policy import Headroom
from twostroke_engine.sequence import Sequence
from twostroke_engine.transfer.end import ChunkOfHandOff


class Scheduler:
    """Continuous batching with chunked prefill, prefix reuse and preemption by recomputation."""

    def __init__(
        self, pool: BlockPool, block_size: int, max_step_tokens: int, max_running: int, batch_invariant: bool = False
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_step_tokens = max_step_tokens
        self._batch_invariant = batch_invariant
        # With a token for each, no running sequence ever waits for the budget.
        self._max_running = min(max_running, max_step_tokens)
        self._headroom = Headroom(pool)
        self._sequences: dict[int, Sequence] = {}
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []
        self._known: set[int] = set()
        self._forgotten: list[int] = []
        self._num_arrivals = 0
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0
        self.longest_wait_s = 0.0

    # ---- intake and exit ---------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence, now_s: float) -> None:
        """Queues a sequence whose KV is all to be computed."""
        self._register(sequence, now_s)
        self._waiting.add(sequence)

    def adopt(self, sequence: Sequence, block_ids: tuple[int, ...], now_s: float) -> None:
        """Queues a sequence whose prompt's KV is complete in these blocks; their references pass to it."""
        self._register(sequence, now_s)
        sequence.take_prompt(block_ids)
        self._publish(sequence)
        self._waiting.add(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Queues another choice of the parent, whose prompt is computed and which has written nothing after it.

        Full blocks are shared, a partial last block is copied by the next plan. Without a block for the copy the child
        waits to be recomputed, which the shared blocks then make cheap.
        """
        child.arrival, child.arrived_s = parent.arrival, parent.arrived_s
        child.started_s = parent.started_s
        self._sequences[child.sequence_id] = child
        if not parent.block_ids:  # it was preempted before its token landed
            self._waiting.add(child)
            return
        try:
            own_block = self._pool.allocate(1 if parent.num_computed % self._block_size else 0)
        except OutOfBlocks:
            self._waiting.add(child)
            return
        child.share_prompt(parent, own_block)
        self._pool.acquire(child.block_ids[: len(child.block_ids) - len(own_block)])
        if child.copy_source is not None:
            self._pool.acquire([child.copy_source])
        self._waiting.add(child)

    def hand_over(self, sequence: Sequence) -> None:
        """Takes a sequence out of the batch or the queue; its blocks stay referenced until it is retired."""
        self._leave(sequence)
        sequence.hand_over()

    def retire(self, sequence: Sequence) -> None:
        """Ends a sequence, wherever it stands, and releases its blocks."""
        self._leave(sequence)
        self._release(sequence)
        sequence.retire()
        del self._sequences[sequence.sequence_id]

    def retract(self, sequence: Sequence) -> None:
        """Makes sure that nothing the sequence's blocks hold is ever hit again."""
        self._pool.retract(sequence.block_ids)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def plan(self, step: int, now_s: float) -> StepPlan:
        """What to compute next; a plan with nothing scheduled need not be executed."""
        draft = PlanDraft(step, self._max_step_tokens, self._known, self._batch_invariant)
        self._headroom.begin_plan()
        self._seat_holders(now_s)
        batch = sorted((entry for entry in self._running if not entry.holds_for_token), key=rank)
        for sequence in (entry for entry in batch if entry.num_remaining == 1):
            self._add_grown(draft, sequence)
        for sequence in (entry for entry in batch if entry.num_remaining > 1 and entry.is_running):
            draft.add(sequence)
        self._admit(draft, now_s)
        if draft.is_empty:
            return StepPlan(step=step)
        finished, self._forgotten = self._forgotten, []
        return draft.finish(finished, self._take_copies())

    def launched(self, plan: StepPlan) -> None:
        """The plan is being executed: counts move on, and the next plan can be made."""
        for entry in plan.scheduled:
            self._sequences[entry.sequence_id].launch(entry.count, samples=bool(entry.choices))

    def landed(self, plan: StepPlan) -> None:
        """The plan was executed: full blocks can be hit."""
        for entry in plan.scheduled:
            sequence = self._sequences.get(entry.sequence_id)
            if sequence is not None:
                self._publish(sequence)

    def chunks_of_hand_off(self, plan: StepPlan) -> list[ChunkOfHandOff]:
        """The prompt chunks of a plan whose KV is to be pushed."""
        chunks = []
        for entry in plan.scheduled:
            if not entry.sink_id:
                continue
            sequence = self._sequences[entry.sequence_id]
            end = entry.start + entry.count
            is_first = entry.start == sequence.num_hit_tokens
            chunks.append(
                ChunkOfHandOff(
                    sink_id=entry.sink_id,
                    block_ids=tuple(sequence.block_ids[: sequence.num_blocks(end)]),
                    first_block=0 if is_first else entry.start // self._block_size,
                    num_ready_blocks=sequence.num_blocks(end) if entry.choices else end // self._block_size,
                    num_hit_blocks=sequence.num_hit_tokens // self._block_size,
                )
            )
        return chunks

    # ---- questions ---------------------------------------------------------------------------------------------------

    def find(self, sequence_id: int) -> Sequence | None:
        """A sequence that has not ended."""
        return self._sequences.get(sequence_id)

    def may_promise(self, num_blocks: int) -> bool:
        """Whether a reservation may have this capacity now; see `policy`."""
        return self._headroom.may_promise(num_blocks, self._waiting, self._num_arrivals, alone=not self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without a place in the batch."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens to compute before every sequence is at its newest token."""
        everyone = chain(self._running, self._waiting)
        return sum(sequence.num_remaining for sequence in everyone if sequence.num_remaining > 1)

    # ---- parts of a plan ---------------------------------------------------------------------------------------------

    def _seat_holders(self, now_s: float) -> None:
        while len(self._running) < self._max_running and (head := self._waiting.head) and head.block_ids:
            self._seat(head, now_s)

    def _add_grown(self, draft: PlanDraft, sequence: Sequence) -> None:
        """Schedules one token, with a block for it; victims are at most as important, so none is scheduled yet."""
        missing = sequence.num_blocks(sequence.num_tokens) - len(sequence.block_ids)
        while sequence.is_running and missing > self._pool.num_available:
            self._preempt(self._victim())
        if sequence.is_running:
            grown = self._pool.allocate(missing) if missing else ()
            sequence.block_ids.extend(grown)
            draft.add(sequence, grown)

    def _admit(self, draft: PlanDraft, now_s: float) -> None:
        while draft.num_tokens_left and len(self._running) < self._max_running and (head := self._waiting.head):
            # One that was preempted after its step was launched must know its token first.
            if head.num_awaited or not self._furnish(head):
                return
            self._seat(head, now_s)
            draft.add(head)

    def _furnish(self, sequence: Sequence) -> bool:
        """Gives a sequence cached blocks for what is cached and fresh ones for the rest; False if there are too few."""
        if sequence.block_ids:
            return self._complete(sequence)
        most_hits = self._num_cacheable(sequence, sequence.num_tokens - 1) // self._block_size
        hits = self._pool.match(sequence.hashes.upto(most_hits, sequence.token_ids))
        missing = sequence.num_blocks(sequence.num_tokens) - len(hits)
        cost = missing + self._pool.num_unreferenced(hits)
        if not self._headroom.admits(sequence, cost, alone=not self._running):
            return False
        self._pool.acquire(hits)
        sequence.take_hits(hits)
        sequence.block_ids.extend(self._pool.allocate(missing))
        return True

    def _complete(self, sequence: Sequence) -> bool:
        """Grows a sequence whose place came free while planning; preempts no one, for others are scheduled already."""
        missing = sequence.num_blocks(sequence.num_tokens) - len(sequence.block_ids)
        if missing > self._pool.num_available:
            return False
        sequence.block_ids.extend(self._pool.allocate(missing))
        return True

    def _seat(self, sequence: Sequence, now_s: float) -> None:
        """Moves a sequence that holds its blocks from the queue into the batch."""
        if sequence.started_s is None:
            self.longest_wait_s = max(self.longest_wait_s, now_s - sequence.arrived_s)
            self._count_lookup(sequence)
        self._waiting.remove(sequence)
        sequence.start(now_s)
        self._running.append(sequence)

    def _take_copies(self) -> list[BlockCopy]:
        """Copies to make before the step. Sources may be released at once: nothing is allocated before it ran."""
        copies = []
        for sequence in self._running:
            if sequence.copy_source is not None:
                target = sequence.block_ids[sequence.num_computed // self._block_size]
                copies.append(BlockCopy(sequence.copy_source, target))
                self._pool.release([sequence.copy_source])
                sequence.copy_source = None
        return copies

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def _victim(self) -> Sequence:
        everyone = chain(self._running, self._waiting)
        holders = [sequence for sequence in everyone if sequence.block_ids and not sequence.sink_id]
        return max(holders, key=rank)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._release(sequence)
        sequence.preempt()
        self.preemptions += 1
        self._waiting.add(sequence)

    def _num_cacheable(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of a sequence's first tokens may come out of the cache, or go there."""
        return min(num_tokens, sequence.num_prompt_tokens) if self._batch_invariant else num_tokens

    def _publish(self, sequence: Sequence) -> None:
        full = self._num_cacheable(sequence, sequence.num_known_computed) // self._block_size
        for block in range(sequence.num_published, full):
            self._pool.publish(sequence.block_ids[block], sequence.hashes.at(block, sequence.token_ids))
        sequence.num_published = max(sequence.num_published, full)

    def _release(self, sequence: Sequence) -> None:
        if sequence.copy_source is not None:
            self._pool.release([sequence.copy_source])
        self._pool.release(sequence.block_ids[::-1])

    def _leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of batch and queue, and lets the runner forget it."""
        if sequence.is_running:
            self._running.remove(sequence)
        if sequence.is_waiting:
            self._waiting.remove(sequence)
        if sequence.sequence_id in self._known:
            self._known.remove(sequence.sequence_id)
            self._forgotten.append(sequence.sequence_id)

    def _register(self, sequence: Sequence, now_s: float) -> None:
        sequence.arrival, sequence.arrived_s = self._num_arrivals, now_s
        self._num_arrivals += 1
        self._sequences[sequence.sequence_id] = sequence

    def _count_lookup(self, sequence: Sequence) -> None:
        if not sequence.num_generated:
            self.prefix_query_tokens += sequence.request.num_prompt_tokens
            self.prefix_hit_tokens += sequence.cached_tokens
