"""What a router remembers of requests that have ended."""

from __future__ import annotations

from twostroke_router.explanation import Entry, Explanation
from twostroke_router.request_log import Ring, key_of


def entry(request_id: str, arrived_s: float, e2e_s: float = 0.0) -> Entry:
    explanation = Explanation(
        request_id=request_id,
        trace_id="0" * 32,
        endpoint="chat",
        arrived_unix_s=arrived_s,
        outcome="stop",
        router_id="r",
        e2e_s=e2e_s,
    )
    return Entry("alice", explanation)


def ids(ring: Ring, now_s: float) -> list[str]:
    return [each.explanation.request_id for each in ring.latest(now_s)]


def test_the_oldest_makes_room_and_an_id_that_comes_again_is_the_newest() -> None:
    ring = Ring(max_entries=3)
    for place, name in enumerate("abca"):
        ring.add(entry(name, float(place)))
    assert ids(ring, 4.0) == ["a", "c", "b"]
    ring.add(entry("d", 4.0))
    assert ids(ring, 4.0) == ["d", "a", "c"]
    assert ring.get(key_of("alice", "b"), 4.0) is None
    assert len(ring) == 3


def test_what_ended_long_ago_is_not_told() -> None:
    ring = Ring(life_s=10.0)
    ring.add(entry("short", 100.0))
    ring.add(entry("long", 100.0, e2e_s=8.0))
    assert ids(ring, 109.0) == ["long", "short"]
    assert ids(ring, 111.0) == ["long"]
    assert ring.get(key_of("alice", "short"), 111.0) is None
    assert ring.get(key_of("alice", "long"), 111.0) is not None
