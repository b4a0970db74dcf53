"""Placement by property: what must hold of any placement in any view."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twostroke_router.placement import (
    Candidate,
    Placement,
    Policy,
    RequestShape,
    View,
    place,
    prefill_cost,
    round_robin,
)

SETTINGS = settings(max_examples=200, deadline=None)


def candidate(worker_id: str, role: Literal["prefill", "decode"] = "decode", **more: Any) -> Candidate:
    given = {"model_fingerprint": "m", "kv_fingerprint": "k", "block_size": 16, "max_model_len": 1024}
    return Candidate(worker_id=worker_id, role=role, **{**given, "channels": ("tcp",), "blocks_available": 64, **more})


ROLES: st.SearchStrategy[Literal["prefill", "decode"]] = st.sampled_from(["prefill", "decode"])


@st.composite
def views(draw: st.DrawFn) -> View:
    workers = [
        candidate(
            f"w{place}",
            draw(ROLES),
            kv_fingerprint=draw(st.sampled_from(["k", "k", "other"])),
            channels=draw(st.sampled_from([("shm:a", "tcp"), ("shm:b", "tcp"), ("tcp",), ("shm:a",), ("shm:b",)])),
            max_model_len=draw(st.sampled_from([128, 1024])),
            running=draw(st.integers(0, 8)),
            waiting=draw(st.integers(0, 4)),
            queued_tokens=draw(st.integers(0, 500)),
            own_tokens=draw(st.integers(0, 500)),
            blocks_available=draw(st.integers(0, 64)),
            hit_tokens=draw(st.sampled_from([0, 16, 64])),
        )
        for place in range(draw(st.integers(0, 7)))
    ]
    return View(tuple(workers), draw(st.integers(0, 50)))


SHAPES = st.builds(
    RequestShape,
    num_prompt_tokens=st.integers(65, 900),
    max_tokens=st.integers(1, 300),
    n=st.integers(1, 4),
    avoid=st.frozensets(st.sampled_from(["w0", "w1", "w2"])),
)
POLICIES = pytest.mark.parametrize("policy", [place, round_robin])


@POLICIES
@SETTINGS
@given(SHAPES, views())
def test_a_placement_is_possible(policy: Policy, shape: RequestShape, view: View) -> None:
    placement = policy(shape, view)
    workers = {worker.worker_id: worker for worker in view.candidates}
    tokens = shape.num_prompt_tokens + shape.max_tokens
    decodes = [w for w in view.candidates if w.role == "decode" and tokens <= w.max_model_len]
    prefills = [w for w in view.candidates if w.role == "prefill" and shape.num_prompt_tokens < w.max_model_len]
    if placement is None:
        assert not decodes
        assert shape.max_tokens > 1 or not prefills
        return
    prefill, decode = workers.get(placement.prefill or ""), workers.get(placement.decode or "")
    assert decode is not None or shape.max_tokens == 1
    if decode is not None:
        assert decode in decodes
    if prefill is not None:
        assert prefill in prefills
    if prefill and decode:
        assert prefill.kind == decode.kind
        assert set(prefill.channels) & set(decode.channels)
    if prefill is None and not shape.avoid:
        assert not any(p.hands_over_to(d) for p in prefills for d in decodes)


@SETTINGS
@given(SHAPES, views())
def test_placement_is_a_function_of_its_arguments(shape: RequestShape, view: View) -> None:
    assert place(shape, view) == place(shape, view)


@POLICIES
@SETTINGS
@given(SHAPES, views())
def test_a_worker_to_avoid_is_used_only_if_there_is_no_other(policy: Policy, shape: RequestShape, view: View) -> None:
    placement = policy(shape, view)
    if placement is None or placement.decode not in shape.avoid:
        return
    tokens = shape.num_prompt_tokens + shape.max_tokens
    others = [w for w in view.candidates if w.role == "decode" and w.worker_id not in shape.avoid]
    assert not any(tokens <= worker.max_model_len for worker in others)


@SETTINGS
@given(SHAPES.filter(lambda shape: shape.max_tokens == 1), views())
def test_one_token_goes_to_the_cheapest_prefill_worker_alone(shape: RequestShape, view: View) -> None:
    prefills = [w for w in view.candidates if w.role == "prefill" and shape.num_prompt_tokens < w.max_model_len]
    wanted = [w for w in prefills if w.worker_id not in shape.avoid] or prefills
    placement = place(shape, view)
    if wanted:
        assert placement is not None
        assert placement.decode is None
        costs = {worker.worker_id: prefill_cost(shape, worker) for worker in wanted}
        assert placement.prefill is not None
        assert costs[placement.prefill] == min(costs.values())


SHAPE = RequestShape(num_prompt_tokens=320, max_tokens=32)


def placed(shape: RequestShape, view: View, policy: Policy = place) -> Placement:
    placement = policy(shape, view)
    assert placement is not None
    return placement


def test_a_longer_prefix_wins_and_load_outweighs_it() -> None:
    decode = candidate("d")
    held, idle = candidate("held", "prefill", hit_tokens=256), candidate("idle", "prefill")
    assert placed(SHAPE, View((decode, held, idle))).prefill == "held"
    busy = replace(held, queued_tokens=400)
    assert placed(SHAPE, View((decode, busy, idle))).prefill == "idle"


def test_expected_hit_is_that_of_the_worker_which_computes_the_prompt() -> None:
    placement = placed(SHAPE, View((candidate("d", hit_tokens=16), candidate("p", "prefill", hit_tokens=64))))
    assert placement.expected_hit == 64
    assert placed(SHAPE, View((candidate("d", hit_tokens=16),))).expected_hit == 16


@pytest.mark.parametrize("more", [{"running": 5}, {"own_requests": 5}, {"blocks_available": 2}, {"own_blocks": 60}])
def test_a_busier_decode_worker_is_left_alone(more: dict[str, Any]) -> None:
    busy, idle = candidate("a-busy", **more), candidate("b-idle")
    for turn in range(2):
        assert placed(SHAPE, View((busy, idle), turn)).decode == "b-idle"


def test_without_prefill_workers_decode_runs_the_whole() -> None:
    placement = placed(SHAPE, View((candidate("d"),)))
    assert (placement.prefill, placement.decode) == (None, "d")


def test_another_kind_of_kv_is_never_paired() -> None:
    prefill, decode = candidate("p", "prefill", kv_fingerprint="bf16"), candidate("d", kv_fingerprint="fp32")
    assert placed(SHAPE, View((prefill, decode))).prefill is None


@POLICIES
def test_block_sizes_may_differ_but_not_tokenizers(policy: Policy) -> None:
    prefill, decode = candidate("p", "prefill", block_size=64), candidate("d", block_size=16)
    assert placed(SHAPE, View((prefill, decode)), policy).prefill == "p"
    other = candidate("p", "prefill", tokenizer_hash="other")
    assert placed(SHAPE, View((other, decode)), policy).prefill is None


@POLICIES
def test_equal_workers_take_turns(policy: Policy) -> None:
    workers = tuple(candidate(f"d{place}") for place in range(3))
    counts = Counter(placed(SHAPE, View(workers, turn), policy).decode for turn in range(30))
    assert set(counts.values()) == {10}
