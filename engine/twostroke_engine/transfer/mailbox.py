"""`Mailbox`: how threads of a transfer end talk. One thread owns the state, the others post calls to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import ParamSpec

P = ParamSpec("P")


class Mailbox:
    """Calls for one thread, run in the order in which they were posted."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def post(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Any thread: the owner is to make this call."""
        self._calls.put(partial(call, *args, **kwargs))

    def run_pending(self) -> None:
        """The owner: makes the calls that were posted so far."""
        for _ in range(self._calls.qsize()):
            self._calls.get()()

    def run_one(self, timeout_s: float) -> None:
        """The owner: makes the next call, or returns when none came in time."""
        try:
            call = self._calls.get(timeout=timeout_s)
        except Empty:
            return
        call()
