"""A load in full: what is asked of whom, when, and until when. One JSON line tells it to a sender."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice, takewhile
from typing import Any, Literal

import msgspec

from twostroke_cli.bench.arrivals import Arrivals, Open, Replay
from twostroke_cli.bench.prompts import Prompts, PromptSpec, TracePrompts


class Form(msgspec.Struct, frozen=True):
    """What a request says besides its prompt."""

    model: str = ""
    endpoint: Literal["chat", "completions"] = "chat"
    is_streamed: bool = True
    more: dict[str, Any] = {}
    """Further fields of the body: temperature, ignore_eos, ..."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one server."""

    url: str
    """Up to and with `/v1`."""
    key_variable: str = ""
    """The environment variable that holds the API key. The key itself is in no file and on no command line."""
    form: Form
    prompts: PromptSpec
    arrivals: Arrivals
    num_requests: int | None = None
    """None: as many as begin within `duration_s`."""
    duration_s: float | None = None
    timeout_s: float = 600.0
    """Longest time without a byte of the answer."""
    deadline_s: float | None = None
    """A request that takes longer is given up."""
    seed: int = 0
    id_prefix: str = "bench"

    def plan(self, prompts: Prompts) -> Iterator[tuple[int, float]]:
        """Number and time of every request of an open loop, in order of time."""
        due = enumerate(self._due_s(prompts))
        if self.duration_s is not None:
            end_s = self.duration_s
            due = takewhile(lambda pair: pair[1] < end_s, due)  # type: ignore[assignment]
        return islice(due, self.num_requests)

    def numbers(self) -> Iterator[int]:
        """The numbers of a closed loop's requests."""
        return count() if self.num_requests is None else iter(range(self.num_requests))

    def _due_s(self, prompts: Prompts) -> Iterator[float]:
        if isinstance(self.arrivals, Replay):
            assert isinstance(prompts, TracePrompts), "only a trace can be replayed"
            return self.arrivals.due_s(prompts.times_s)
        assert isinstance(self.arrivals, Open)
        return self.arrivals.due_s(self.seed)


def body_of(form: Form, prompt: object, max_tokens: int) -> bytes:
    """The request's body. Text for a chat becomes one message of the user."""
    body: dict[str, Any] = {"model": form.model, "max_tokens": max_tokens, **form.more}
    if form.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    else:
        body["prompt"] = prompt
    if form.is_streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(body)
