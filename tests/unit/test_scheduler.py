"""The scheduler's promises, one by one, on a pool without a runner."""

from __future__ import annotations

import pytest
from twostroke_engine.kv.block_pool import BlockPool
from twostroke_engine.kv.hashing import block_hashes
from twostroke_engine.request import FinishReason, SamplingParams
from twostroke_engine.schedule.plan import StepPlan
from twostroke_engine.schedule.policy import Headroom
from twostroke_engine.schedule.scheduler import Scheduler
from twostroke_engine.schedule.stopping import StopRules
from twostroke_engine.sequence import HashChain, Sequence, SequenceState

from tests.support.engine_bench import make_request

BLOCK = 16


class Desk:
    """A scheduler, its pool, and a runner that takes 7 for every next token."""

    def __init__(
        self, num_blocks: int = 16, max_step_tokens: int = 64, max_running: int = 8, batch_invariant: bool = False
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, BLOCK, max_step_tokens, max_running, batch_invariant)
        self.sequences: dict[str, Sequence] = {}
        self.step = 0

    def add(self, name: str, tokens: int | tuple[int, ...], priority: int = 0, sink_id: int = 0) -> Sequence:
        sequence = Sequence(len(self.sequences) + 1, make_request(name, tokens, priority=priority), BLOCK)
        sequence.sink_id = sink_id
        self.sequences[name] = sequence
        self.scheduler.add(sequence, float(self.step))
        return sequence

    def run(self) -> StepPlan:
        plan = self.launch()
        self.land(plan)
        return plan

    def launch(self) -> StepPlan:
        self.step += 1
        plan = self.scheduler.plan(self.step, float(self.step))
        self.scheduler.launched(plan)
        return plan

    def land(self, plan: StepPlan) -> None:
        self.scheduler.landed(plan)
        for entry in plan.scheduled:
            if entry.choices:
                self.named(entry.sequence_id)[1].append(7)
        self.pool.check()

    def named(self, sequence_id: int) -> tuple[str, Sequence]:
        return next((name, entry) for name, entry in self.sequences.items() if entry.sequence_id == sequence_id)

    def counts(self, plan: StepPlan) -> dict[str, int]:
        return {self.named(entry.sequence_id)[0]: entry.count for entry in plan.scheduled}


def test_decodes_come_first_then_running_chunks_then_the_queue() -> None:
    desk = Desk(max_step_tokens=20)
    desk.add("decode", 5)
    desk.run()
    desk.add("chunk", 30)
    assert desk.counts(desk.run()) == {"decode": 1, "chunk": 19}
    desk.add("next", 30)
    assert desk.counts(desk.run()) == {"decode": 1, "chunk": 11, "next": 8}


def test_a_plan_says_choices_only_where_the_tokens_end() -> None:
    desk = Desk(max_step_tokens=16)
    desk.add("a", 20)
    first, second = desk.run(), desk.run()
    assert (first.scheduled[0].choices, second.scheduled[0].choices) == ((), (0,))
    assert [len(first.new), len(second.new)] == [1, 0]


def test_a_big_head_is_not_passed_by_small_ones() -> None:
    desk = Desk(num_blocks=8)
    desk.add("runs", 40)
    desk.run()
    desk.add("big", 80)
    desk.add("small", 5)
    assert desk.counts(desk.run()) == {"runs": 1}
    desk.scheduler.retire(desk.sequences["runs"])
    assert desk.counts(desk.run()) == {"big": 64}


def test_priority_goes_before_arrival_and_arrival_before_nothing() -> None:
    desk = Desk(max_running=1)
    for name, priority in (("later", 1), ("second", 0), ("third", 0), ("first", -1)):
        desk.add(name, 5, priority)
    order = []
    while len(order) < 4:
        (name,) = desk.counts(desk.run())
        order.append(name)
        desk.scheduler.retire(desk.sequences[name])
    assert order == ["first", "second", "third", "later"]


def test_the_least_important_and_latest_is_preempted_and_comes_back_first() -> None:
    desk = Desk(num_blocks=5)
    important, first, last = desk.add("important", 16, -1), desk.add("first", 15), desk.add("last", 15)
    desk.run()
    desk.add("waits", 5, priority=-2)
    plan = desk.run()
    assert desk.counts(plan) == {"important": 1, "first": 1, "last": 1}
    plan = desk.run()
    assert last.state is SequenceState.WAITING
    assert (last.num_computed, last.block_ids, last.preemptions, desk.scheduler.preemptions) == (0, [], 1, 1)
    assert desk.counts(plan) == {"important": 1, "first": 1}
    assert plan.finished == (last.sequence_id,)
    desk.scheduler.retire(important)
    plan = desk.run()
    assert desk.counts(plan) == {"first": 1, "last": 1}, "its full block is still in the cache"
    assert [new.sequence_id for new in plan.new] == [last.sequence_id]
    assert plan.new[0].token_ids == tuple(last.token_ids[:17])
    assert first.is_running


def test_a_plan_can_be_made_before_the_one_before_it_has_landed() -> None:
    desk = Desk(max_step_tokens=24)
    desk.add("a", 20)
    desk.add("b", 30)
    first = desk.launch()
    second = desk.launch()
    assert desk.counts(first) == {"a": 20, "b": 4}
    assert desk.counts(second) == {"a": 1, "b": 23}
    assert [(entry.start, entry.choices) for entry in second.scheduled] == [(20, (0,)), (4, ())]
    desk.land(first)
    third = desk.launch()
    assert [(desk.named(entry.sequence_id)[0], entry.start) for entry in third.scheduled] == [("a", 21), ("b", 27)]


def test_what_ends_with_the_awaited_token_is_not_planned_again() -> None:
    desk = Desk()
    last = Sequence(1, make_request("last", 20, max_tokens=1), BLOCK)
    forks = Sequence(2, make_request("forks", 20, n=2), BLOCK)
    limited = Sequence(3, make_request("limited", 20), BLOCK, max_model_len=21)
    for name, sequence in (("last", last), ("forks", forks), ("limited", limited)):
        desk.sequences[name] = sequence
        desk.scheduler.add(sequence, 0.0)
    handed = desk.add("handed", 20, sink_id=5)
    assert desk.counts(desk.launch()) == {"last": 20, "forks": 20, "limited": 20, "handed": 4}
    assert desk.counts(desk.launch()) == {"handed": 16}
    assert handed.holds_for_token
    assert desk.launch().scheduled == ()


def test_one_preempted_while_its_token_is_awaited_comes_back_when_it_knows_it() -> None:
    desk = Desk(num_blocks=3)
    first, last = desk.add("first", 15), desk.add("last", 15)
    both = desk.launch()
    both_again = desk.launch()
    assert desk.counts(both_again) == {"first": 1, "last": 1}
    desk.land(both)
    aloft = desk.launch()
    assert desk.counts(aloft) == {"first": 1}
    assert (last.num_computed, last.num_awaited, last.preemptions) == (0, 1, 1)
    desk.scheduler.retire(first)
    assert desk.launch().scheduled == (), "a token is missing"
    desk.land(both_again)
    plan = desk.launch()
    assert plan.new[0].token_ids == tuple(last.token_ids)
    assert len(last.token_ids) == 17


def test_batch_invariant_plans_keep_prompts_and_generated_tokens_apart() -> None:
    desk = Desk(max_step_tokens=30, batch_invariant=True)
    sequence = Sequence(1, make_request("a", 40), BLOCK)
    desk.sequences["a"] = sequence
    for token in (7, 8, 9):
        sequence.append(token)
    desk.scheduler.add(sequence, 0.0)
    entries = [desk.run().scheduled[0] for _ in range(5)]
    assert [(entry.start, entry.count) for entry in entries] == [(0, 30), (30, 10), (40, 1), (41, 1), (42, 1)]
    assert [entry.choices for entry in entries] == [(), (), (), (), (0,)]
    for _ in range(10):
        desk.run()
    assert sequence.num_computed > 48
    assert sequence.num_published == 2, "blocks of the prompt alone"


def test_hand_offs_are_no_victims() -> None:
    desk = Desk(num_blocks=5, max_step_tokens=17)
    local = desk.add("local", 14)
    desk.run()
    pushed = desk.add("pushed", 42, priority=9, sink_id=1)
    assert desk.counts(desk.run()) == {"local": 1, "pushed": 16}
    assert desk.pool.promise(1)
    desk.run()
    assert desk.counts(desk.run()) == {"pushed": 10}, "the less important one kept its blocks"
    assert local.preemptions == 1
    desk.scheduler.hand_over(pushed)
    assert desk.pool.num_referenced == 3
    desk.scheduler.retire(pushed)
    assert "local" in desk.counts(desk.run())


def test_a_prefix_is_hit_only_where_its_kv_was_computed_and_never_whole() -> None:
    desk = Desk(max_step_tokens=24)
    tokens = tuple(range(2, 34))
    desk.add("a", tokens)
    desk.run()
    same = desk.add("b", tokens)
    desk.run()
    assert same.cached_tokens == 16, "of the first chunk only the first block was full"
    desk.run()
    again = desk.add("c", tokens)
    desk.run()
    assert again.cached_tokens == 16, "at least one token is computed"
    assert (desk.scheduler.prefix_query_tokens, desk.scheduler.prefix_hit_tokens) == (96, 32)


def test_generated_tokens_are_cached_too() -> None:
    desk = Desk()
    sequence = desk.add("a", tuple(range(2, 12)))
    for _ in range(8):
        desk.run()
    assert sequence.num_computed == 17
    assert len(desk.pool.match(block_hashes(sequence.token_ids, BLOCK))) == 1
    desk.scheduler.retire(sequence)
    again = desk.add("b", (*range(2, 12), *[7] * 8))
    desk.run()
    assert again.cached_tokens == 16


def test_salts_and_adapters_share_nothing() -> None:
    plain = block_hashes(range(2, 34), BLOCK)
    assert not set(plain) & set(block_hashes(range(2, 34), BLOCK, cache_salt=b"x"))
    chain = HashChain(b"r" * 16, BLOCK)
    other = HashChain(b"s" * 16, BLOCK)
    tokens = list(range(64))
    assert not set(chain.upto(4, tokens)) & set(other.upto(4, tokens))


@pytest.mark.parametrize("steps", [(1, 2, 3, 4), (4,), (2, 4), (3, 1, 4)])
def test_a_hash_chain_grown_in_steps_is_the_chain_of_the_whole(steps: tuple[int, ...]) -> None:
    request = make_request("a", 70)
    sequence = Sequence(1, request, BLOCK)
    hashes = [list(sequence.hashes.upto(step, request.token_ids)) for step in steps]
    whole = block_hashes(request.token_ids, BLOCK)
    assert hashes == [whole[:step] for step in steps]
    fork = sequence.hashes.fork()
    assert [fork.at(block, request.token_ids) for block in range(4)] == whole


def test_forks_share_full_blocks_and_copy_the_partial_one_before_anyone_writes() -> None:
    desk = Desk()
    parent = desk.add("parent", 20)
    desk.run()
    child = Sequence(9, parent.request, BLOCK, choice=1)
    child.append(8)
    desk.sequences["child"] = child
    desk.scheduler.fork(parent, child)
    plan = desk.run()
    assert child.block_ids[0] == parent.block_ids[0]
    assert [(copy.source, copy.target) for copy in plan.copies] == [(parent.block_ids[1], child.block_ids[1])]
    assert desk.counts(plan) == {"parent": 1, "child": 1}
    assert not desk.run().copies
    desk.scheduler.retire(parent)
    desk.scheduler.retire(child)
    assert desk.pool.num_referenced == 0


def test_a_fork_without_a_block_waits_to_be_recomputed_by_hits() -> None:
    desk = Desk(num_blocks=3)
    parent = desk.add("parent", 20)
    desk.run()
    children = [Sequence(10 + choice, parent.request, BLOCK, choice) for choice in (1, 2)]
    for child in children:
        child.append(8)
        desk.sequences[f"child{child.choice}"] = child
        desk.scheduler.fork(parent, child)
    assert [bool(child.block_ids) for child in children] == [True, False]
    assert desk.counts(desk.run()) == {"parent": 1, "child1": 1}
    desk.scheduler.retire(children[0])
    desk.scheduler.retire(parent)
    assert desk.counts(desk.run()) == {"child2": 5}
    assert desk.scheduler.prefix_query_tokens == 20, "only first starts are counted"


def test_a_copy_source_outlives_its_owner() -> None:
    desk = Desk()
    parent = desk.add("parent", 20)
    desk.run()
    source = parent.block_ids[1]
    child = Sequence(9, parent.request, BLOCK, choice=1)
    child.append(8)
    desk.sequences["child"] = child
    desk.scheduler.fork(parent, child)
    desk.scheduler.retire(parent)
    desk.add("other", 5)
    plan = desk.run()
    assert plan.copies[0].source == source
    assert source not in desk.sequences["other"].block_ids


def test_more_running_than_budget_never_happens() -> None:
    desk = Desk(max_step_tokens=2, max_running=8)
    for number in range(4):
        desk.add(f"s{number}", 1)
    for _ in range(5):
        desk.run()
    assert desk.scheduler.num_running == 2
    assert desk.counts(desk.run()) == {"s0": 1, "s1": 1}


def test_promises_keep_the_watermark_and_wait_for_interrupted_streams() -> None:
    desk = Desk(num_blocks=10)
    assert desk.scheduler.may_promise(10), "alone, there is no one's growth to spare"
    desk.add("a", 30)
    desk.run()
    assert not desk.scheduler.may_promise(8)
    assert desk.scheduler.may_promise(7)
    sequence = desk.sequences["a"]
    desk.scheduler._preempt(sequence)
    assert not desk.scheduler.may_promise(1)


def test_a_promise_waits_for_those_that_came_before_it() -> None:
    desk = Desk(num_blocks=10, max_running=1)
    desk.add("a", 5)
    desk.run()
    desk.add("before", 5)
    assert not desk.scheduler.may_promise(1)
    desk.add("after", 5)
    assert not desk.scheduler.may_promise(1)
    desk.scheduler.retire(desk.sequences["a"])
    assert desk.counts(desk.run()) == {"before": 5}
    assert desk.scheduler.may_promise(1), "what came after it does not hold it up"


def test_an_interrupted_stream_holds_promises_up_whenever_it_came() -> None:
    headroom = Headroom(BlockPool(10))
    stream = Sequence(1, make_request("a", 5), BLOCK)
    stream.arrival = 7
    assert not headroom.may_promise(99, [], next_arrival=3, alone=False)
    assert headroom.may_promise(1, [stream], next_arrival=8, alone=False)
    assert not headroom.may_promise(99, [], next_arrival=3, alone=False)
    stream.preempt()
    assert not headroom.may_promise(1, [stream], next_arrival=8, alone=False)


def test_a_prompt_that_waits_for_a_place_holds_promises_up() -> None:
    """Memory is not promised faster than the batch can use it."""
    desk = Desk(num_blocks=10, max_running=1)
    desk.add("a", 5)
    desk.run()
    assert not desk.scheduler.may_promise(99)
    adopted = Sequence(9, make_request("adopted", 20), BLOCK)
    adopted.append(7)
    desk.scheduler.adopt(adopted, desk.pool.allocate(2), 0.0)
    assert not desk.scheduler.may_promise(1)
    desk.scheduler.retire(desk.sequences["a"])
    desk.sequences["adopted"] = adopted
    assert desk.counts(desk.run()) == {"adopted": 1}
    assert desk.scheduler.may_promise(1)


def test_a_refused_promise_that_is_not_asked_again_is_forgotten() -> None:
    desk = Desk(num_blocks=6)
    desk.add("a", 30)
    desk.run()
    assert not desk.scheduler.may_promise(4)
    desk.add("b", 20)
    assert desk.counts(desk.run()) == {"a": 1}, "b came after the reservation and leaves it its room"
    assert desk.counts(desk.run()) == {"a": 1, "b": 20}


@pytest.mark.parametrize(
    ("sampling", "generated", "reason"),
    [
        ({"max_tokens": 9}, [3, 3], None),
        ({"max_tokens": 2}, [3, 3], FinishReason.LENGTH),
        ({"max_tokens": 9}, [3, 1], FinishReason.STOP),
        ({"max_tokens": 2}, [3, 1], FinishReason.STOP),
        ({"max_tokens": 9, "ignore_eos": True}, [3, 1], None),
        ({"max_tokens": 9, "ignore_eos": True, "stop_token_ids": (4,)}, [3, 4], FinishReason.STOP),
        ({"max_tokens": 9, "min_tokens": 2}, [3, 1], None),
        ({"max_tokens": 9, "min_tokens": 1}, [3, 1], FinishReason.STOP),
        ({"max_tokens": 99}, [3] * 20, FinishReason.LENGTH),
        ({"max_tokens": 99}, [3] * 19, None),
    ],
)
def test_stop_rules(sampling: dict[str, object], generated: list[int], reason: FinishReason | None) -> None:
    assert SamplingParams(**sampling)  # type: ignore[arg-type]
    sequence = Sequence(1, make_request("a", 10, **{"ignore_eos": False, **sampling}), BLOCK)
    for token in generated:
        sequence.append(token)
    assert StopRules((1,), max_model_len=30).finish(sequence) is reason
