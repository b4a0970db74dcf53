"""Takes an answer of an OpenAI server in, whole or streamed, and notes when its text came."""

from __future__ import annotations

import time
from typing import Any

import msgspec

REFUSALS = (429, 503, 529)
"""Statuses by which a server says that it has no room now."""
MESSAGE_LEN = 200


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        part = self.delta or self.message
        if part is None:
            return bool(self.text)
        return bool(part.content or part.reasoning_content or part.reasoning or part.tool_calls)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    """What is read of a chunk of a stream, or of a whole answer."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class AnswerReader:
    """One answer; times are of this machine's monotonic clock."""

    def __init__(self, is_streamed: bool) -> None:
        self.status = 0
        self.times_s: list[float] = []
        """When each piece with text came."""
        self.finish_reason = ""
        self.usage = _Usage()
        self.error = ""
        self.message = ""
        self._is_streamed = is_streamed
        self._is_done = False
        self._pending = b""

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that the server did not compute anew, where it says so."""
        details = self.usage.prompt_tokens_details
        return details.cached_tokens if details else None

    def on_status(self, status: int) -> None:
        """The head has come."""
        self.status = status
        self._is_streamed = self._is_streamed and status == 200

    def on_data(self, data: bytes) -> None:
        """A piece of the body has come."""
        self._pending += data
        if not self._is_streamed:
            return
        now_s = time.monotonic()
        *lines, self._pending = self._pending.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(line[5:].strip(), now_s)

    def finish(self) -> None:
        """The body has ended: what is wrong with the answer, if anything, is in `error` from now on."""
        if self.status in REFUSALS:
            self._fail("refused", self._said())
        elif self.status != 200:
            self._fail(f"HTTP {self.status}", self._said())
        elif not self._is_streamed:
            self._on_event(self._pending.strip(), time.monotonic())
            self.times_s.clear()  # the moment at which a whole answer came is not that of its first token
        elif not self._is_done:
            self._fail("broken off", "the stream ended without [DONE]")

    def _on_event(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self._is_done = True
            return
        try:
            event = _decode(data)
        except msgspec.DecodeError as error:
            self._fail("bad answer", str(error))
            return
        if event.error:
            self._fail("error event", _message_in(event.error))
        self.usage = event.usage or self.usage
        for choice in event.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
        if any(choice.has_text for choice in event.choices):
            self.times_s.append(now_s)

    def _fail(self, kind: str, message: str) -> None:
        if not self.error:
            self.error, self.message = kind, message[:MESSAGE_LEN]

    def _said(self) -> str:
        try:
            return _message_in(_decode(self._pending).error)
        except msgspec.DecodeError:
            return self._pending.decode(errors="replace")


def _message_in(error: object) -> str:
    """The words of an OpenAI error object, or of whatever is there instead."""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error or "")
