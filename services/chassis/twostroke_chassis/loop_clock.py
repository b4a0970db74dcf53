"""An event loop that knows when it last looked for news, and for how long it had not.

Whatever a callback handles was there when the loop looked, so what went by since then is a delay of this process, not
of a network. What came while the loop was at work has waited for the end of that turn as well: how long is not known,
but not longer than the turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from time import monotonic

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_AT_ONCE_S = 0.0001
"""A look that takes no longer found something there."""
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Turns(Collector):
    """Turns of an event loop, counted by their length: while one lasts, everything else waits."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._total_s = 0.0

    def add(self, seconds: float) -> None:
        """Counts one."""
        self._counts[0 if seconds <= BUCKETS_S[0] else bisect_left(BUCKETS_S, seconds)] += 1
        self._total_s += seconds

    def collect(self) -> Iterator[Metric]:
        """The counts as a histogram."""
        family = HistogramMetricFamily("twostroke_event_loop_busy_seconds", "Turns of the event loop, by their length.")
        bounds = [*(str(bound) for bound in BUCKETS_S), "+Inf"]
        family.add_metric([], list(zip(bounds, accumulate(self._counts), strict=True)), self._total_s)
        yield family


class LoopClock(selectors.DefaultSelector):
    """The loop's selector: every turn of the loop passes here once."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_s = monotonic()
        """When the loop last got to know what is ready."""
        self.unseen_s = 0.0
        """How long, at most, that had been ready already; 0 if the loop slept until it was."""
        self.turns = Turns()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As the base's, with the time taken before and after."""
        asked_s = monotonic()
        turn_s = asked_s - self.looked_s
        self.turns.add(turn_s)
        ready = super().select(timeout)
        self.looked_s = now_s = monotonic()
        self.unseen_s = turn_s if now_s - asked_s < _AT_ONCE_S else 0.0
        return ready


class ServiceLoop(asyncio.SelectorEventLoop):
    """The event loop of a service."""

    def __init__(self) -> None:
        self.clock = LoopClock()
        super().__init__(self.clock)


def news_s() -> float:
    """When what is handled now was there at the latest, on the monotonic clock; under another loop, now."""
    loop = asyncio.get_running_loop()
    return loop.clock.looked_s if isinstance(loop, ServiceLoop) else monotonic()


def unseen_s() -> float:
    """How long before `news_s` it may have come, at most; under another loop, no time."""
    loop = asyncio.get_running_loop()
    return loop.clock.unseen_s if isinstance(loop, ServiceLoop) else 0.0


def turns_of_this_loop() -> Turns:
    """Those of the loop that runs here; without one that counts, none."""
    with contextlib.suppress(RuntimeError):
        loop = asyncio.get_running_loop()
        if isinstance(loop, ServiceLoop):
            return loop.clock.turns
    return Turns()
