"""The event loop's own clock: what is handled was there when the loop looked, and turns are counted by length."""

from __future__ import annotations

import asyncio
import time

from twostroke_chassis.loop_clock import BUCKETS_S, ServiceLoop, Turns, news_s, turns_of_this_loop


def counts(turns: Turns) -> dict[str, float]:
    (family,) = turns.collect()
    return {sample.labels["le"]: sample.value for sample in family.samples if "le" in sample.labels}


def test_turns_are_counted_by_their_length() -> None:
    turns = Turns()
    for seconds in (0.0005, 0.001, 0.002, 3.0):
        turns.add(seconds)
    assert list(counts(turns).values()) == [2, *[3] * (len(BUCKETS_S) - 1), 4]


def test_what_waited_behind_a_long_turn_was_there_before_it() -> None:
    async def main() -> tuple[float, float, float]:
        loop, seen = asyncio.get_running_loop(), []
        loop.call_soon(time.sleep, 0.05)
        loop.call_soon(lambda: seen.append((news_s(), time.monotonic())))
        await asyncio.sleep(0.01)
        ((looked_s, handled_s),) = seen
        await asyncio.sleep(0)
        return looked_s, handled_s, counts(turns_of_this_loop())["+Inf"] - counts(turns_of_this_loop())["0.025"]

    with asyncio.Runner(loop_factory=ServiceLoop) as runner:
        looked_s, handled_s, num_long = runner.run(main())
    assert handled_s - looked_s >= 0.05
    assert num_long >= 1


def test_under_another_loop_news_is_now() -> None:
    async def main() -> tuple[float, float, float]:
        return time.monotonic(), news_s(), time.monotonic()

    before_s, between_s, after_s = asyncio.run(main())
    assert before_s <= between_s <= after_s
    assert sum(counts(turns_of_this_loop()).values()) == 0
