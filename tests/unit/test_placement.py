"""Placement by property: what must hold of any placement in any fleet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twostroke_chassis.prefix_table import Keys, PrefixTable
from twostroke_router.fleet import Fleet, Numbers, Profile
from twostroke_router.placement import POLICIES, Placement, RequestShape, added_seconds
from twostroke_router.pools import View

SETTINGS = settings(max_examples=150, deadline=None)
BLOCK_SIZE = 16
PROMPT = np.arange(1, 100, dtype=np.uint64)
"""Keys of a long prompt's blocks."""


@dataclass(frozen=True)
class Member:
    """A worker and what it holds of the prompt."""

    profile: Profile
    numbers: Numbers = field(default_factory=lambda: Numbers(free_tokens=2000))
    hit_tokens: int = 0


def member(worker_id: str, role: Literal["prefill", "decode"] = "decode", **more: Any) -> Member:
    numbers = {key: more.pop(key) for key in list(more) if key in Numbers.__dataclass_fields__}
    hit_tokens = more.pop("hit_tokens", 0)
    given = {"block_size": BLOCK_SIZE, "max_model_len": 1024, "channels": ("tcp",), "likeness": ("m",), **more}
    return Member(
        Profile(worker_id=worker_id, role=role, **given), Numbers(**{"free_tokens": 2000, **numbers}), hit_tokens
    )


def view_of(members: Iterable[Member], num_prompt_tokens: int, turn: int = 0) -> View:
    table = PrefixTable()
    fleet = Fleet(table)
    for slot, each in enumerate(members):
        fleet.join(each.profile, slot)
        fleet.update(each.profile.worker_id, each.numbers)
        table.add(slot, PROMPT[: each.hit_tokens // BLOCK_SIZE])
    for _ in range(turn):
        fleet.placed()

    def keys_of(block_size: int) -> Keys:
        return PROMPT[: num_prompt_tokens // BLOCK_SIZE][block_size // BLOCK_SIZE - 1 :: block_size // BLOCK_SIZE]

    return fleet.view(keys_of, num_prompt_tokens)


def placed(members: Iterable[Member], shape: RequestShape, policy: str = "cost", turn: int = 0) -> Placement:
    placement = POLICIES[policy](shape, view_of(members, shape.num_prompt_tokens, turn))
    assert placement is not None
    return placement


@st.composite
def fleets(draw: st.DrawFn) -> list[Member]:
    return [
        member(
            f"w{place}",
            draw(st.sampled_from(["prefill", "decode"])),
            likeness=draw(st.sampled_from([("m",), ("m",), ("other",)])),
            channels=draw(st.sampled_from([("shm:a", "tcp"), ("shm:b", "tcp"), ("tcp",), ("shm:a",), ("shm:b",)])),
            block_size=draw(st.sampled_from([16, 64])),
            max_model_len=draw(st.sampled_from([128, 1024])),
            sequences=draw(st.integers(0, 12)),
            queued_tokens=draw(st.integers(0, 500)),
            free_tokens=draw(st.integers(0, 1000)),
            hit_tokens=draw(st.sampled_from([0, 16, 64])),
        )
        for place in range(draw(st.integers(0, 7)))
    ]


SHAPES = st.builds(
    RequestShape,
    num_prompt_tokens=st.integers(65, 900),
    max_tokens=st.integers(1, 300),
    n=st.integers(1, 4),
    avoid=st.frozensets(st.sampled_from(["w0", "w1", "w2"])),
    session=st.sampled_from(["", "mine"]),
)
EVERY_POLICY = pytest.mark.parametrize("policy", list(POLICIES))


def fits(each: Member, shape: RequestShape) -> bool:
    tokens = 1 if each.profile.role == "prefill" else shape.max_tokens
    return shape.num_prompt_tokens + tokens <= each.profile.max_model_len


def hands_over(giver: Member, taker: Member) -> bool:
    a, b = giver.profile, taker.profile
    return a.likeness == b.likeness and not set(a.channels).isdisjoint(b.channels)


@EVERY_POLICY
@SETTINGS
@given(SHAPES, fleets(), st.integers(0, 50))
def test_a_placement_is_possible(policy: str, shape: RequestShape, members: list[Member], turn: int) -> None:
    placement = POLICIES[policy](shape, view_of(members, shape.num_prompt_tokens, turn))
    workers = {each.profile.worker_id: each for each in members}
    decodes = [each for each in members if each.profile.role == "decode" and fits(each, shape)]
    prefills = [each for each in members if each.profile.role == "prefill" and fits(each, shape)]
    if placement is None:
        assert not decodes
        assert shape.max_tokens > 1 or not prefills
        return
    prefill, decode = workers.get(placement.prefill or ""), workers.get(placement.decode or "")
    assert decode in decodes or (decode is None and shape.max_tokens == 1)
    assert prefill is None or prefill in prefills
    assert not (prefill and decode) or hands_over(prefill, decode)
    if prefill is None and not shape.avoid and policy != "conditional":
        assert not any(hands_over(giver, taker) for giver in prefills for taker in decodes)
    computes = prefill or decode
    assert computes is not None
    assert placement.expected_hit <= min(computes.hit_tokens, shape.num_prompt_tokens - 1)
    assert placement.reason


@EVERY_POLICY
@SETTINGS
@given(SHAPES, fleets(), st.integers(0, 9))
def test_placement_is_a_function(policy: str, shape: RequestShape, members: list[Member], turn: int) -> None:
    views = [view_of(members, shape.num_prompt_tokens, turn) for _ in range(2)]
    assert POLICIES[policy](shape, views[0]) == POLICIES[policy](shape, views[1])


@EVERY_POLICY
@SETTINGS
@given(SHAPES, fleets())
def test_a_worker_to_avoid_is_used_only_if_there_is_no_other(
    policy: str, shape: RequestShape, members: list[Member]
) -> None:
    placement = POLICIES[policy](shape, view_of(members, shape.num_prompt_tokens))
    if placement is None or placement.decode not in shape.avoid:
        return
    others = [each for each in members if each.profile.role == "decode" and each.profile.worker_id not in shape.avoid]
    able = [each for each in others if fits(each, shape)]
    if placement.prefill is None:
        assert not able
    else:  # others there may be, but none that this prompt's KV can go to
        giver = next(each for each in members if each.profile.worker_id == placement.prefill)
        assert not any(hands_over(giver, each) for each in able)


@SETTINGS
@given(SHAPES, fleets(), st.integers(0, 9))
def test_cost_takes_the_pair_that_adds_least(shape: RequestShape, members: list[Member], turn: int) -> None:
    shape = replace(shape, avoid=frozenset())
    view = view_of(members, shape.num_prompt_tokens, turn)
    scores = added_seconds(shape, view)
    prefill_s = dict(zip(view.prefill.ids, scores.prefill.tolist(), strict=True))
    decode_s = dict(zip(view.decode.ids, scores.decode.tolist(), strict=True))
    pairs = [
        prefill_s[giver.profile.worker_id] + decode_s[taker.profile.worker_id]
        for giver in members
        for taker in members
        if giver.profile.role == "prefill" and taker.profile.role == "decode"
        if fits(giver, shape) and fits(taker, shape) and hands_over(giver, taker)
    ]
    placement = POLICIES["cost"](shape, view)
    if pairs and shape.max_tokens > 1:
        assert placement is not None
        assert placement.prefill is not None
        assert placement.decode is not None
        assert prefill_s[placement.prefill] + decode_s[placement.decode] == pytest.approx(min(pairs))


SHAPE = RequestShape(num_prompt_tokens=320, max_tokens=32)


def test_a_longer_prefix_wins_and_load_outweighs_it() -> None:
    decode = member("d")
    held, idle = member("held", "prefill", hit_tokens=256), member("idle", "prefill")
    assert placed([decode, held, idle], SHAPE).prefill == "held"
    busy = member("held", "prefill", hit_tokens=256, queued_tokens=400)
    assert placed([decode, busy, idle], SHAPE).prefill == "idle"


def test_block_sizes_agree_on_what_is_held() -> None:
    small, large = member("small", "prefill", hit_tokens=128), member("large", "prefill", block_size=64, hit_tokens=320)
    placement = placed([member("d"), small, large], SHAPE)
    assert (placement.prefill, placement.expected_hit) == ("large", 319), "the last token is computed in any case"


def test_expected_hit_is_that_of_the_worker_which_computes_the_prompt() -> None:
    decode = member("d", hit_tokens=16)
    assert placed([decode, member("p", "prefill", hit_tokens=64)], SHAPE).expected_hit == 64
    assert placed([decode], SHAPE).expected_hit == 16


@pytest.mark.parametrize("more", [{"sequences": 5}, {"queued_tokens": 100}, {"free_tokens": 100}])
def test_a_busier_decode_worker_is_left_alone(more: dict[str, Any]) -> None:
    for turn in range(2):
        assert placed([member("a-busy", **more), member("b-idle")], SHAPE, turn=turn).decode == "b-idle"


def test_without_prefill_workers_decode_runs_the_whole() -> None:
    placement = placed([member("d")], SHAPE)
    assert (placement.prefill, placement.decode) == (None, "d")


def test_one_token_needs_no_decode_worker() -> None:
    placement = placed([member("p", "prefill"), member("d")], replace(SHAPE, max_tokens=1))
    assert (placement.prefill, placement.decode) == ("p", None)


def test_conditional_parts_them_only_where_that_is_sooner() -> None:
    prefill, idle, busy = member("p", "prefill"), member("d"), member("d", sequences=40)
    assert placed([prefill, idle], SHAPE, "conditional").prefill is None
    assert placed([prefill, busy], SHAPE, "conditional").prefill == "p"
    cached = member("d", sequences=40, hit_tokens=304)
    queue = member("p", "prefill", queued_tokens=5000)
    assert placed([queue, cached], SHAPE, "conditional").prefill is None


def test_a_session_stays_where_it_is_while_others_come_and_go() -> None:
    shape = replace(SHAPE, session="one of many")
    workers = [member(f"d{place}", sequences=place) for place in range(6)]
    home = placed(workers, shape, "session").decode
    assert home is not None
    for gone in workers:
        if gone.profile.worker_id != home:
            left = [each for each in workers if each is not gone]
            assert placed(left, shape, "session", turn=3).decode == home


def test_power_of_two_spreads_and_prefers_the_idle() -> None:
    workers = [member(f"d{place}", sequences=10 * (place > 0)) for place in range(8)]
    counts = Counter(placed(workers, SHAPE, "power-of-two", turn).decode for turn in range(200))
    assert len(counts) == 8
    assert counts.most_common(1)[0][0] == "d0"


@EVERY_POLICY
def test_tokenizers_must_agree(policy: str) -> None:
    prefill, decode = member("p", "prefill", likeness=("other",)), member("d")
    assert placed([prefill, decode], SHAPE, policy).prefill is None


@pytest.mark.parametrize("policy", ["cost", "least-loaded", "prefix-only", "round-robin", "session"])
def test_equal_workers_take_turns(policy: str) -> None:
    workers = [member(f"d{place}") for place in range(3)]
    counts = Counter(placed(workers, SHAPE, policy, turn).decode for turn in range(30))
    assert set(counts.values()) == {10}


def test_a_worker_that_left_is_not_chosen() -> None:
    fleet = Fleet(PrefixTable())
    for slot, each in enumerate([member("d0"), member("d1")]):
        fleet.join(each.profile, slot)
    fleet.leave("d0")
    fleet.update("d0", Numbers())
    placement = POLICIES["cost"](SHAPE, fleet.view(lambda block_size: PROMPT[:20], 320))
    assert placement is not None
    assert placement.decode == "d1"
