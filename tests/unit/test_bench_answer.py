"""How `twostroke bench` reads answers: streams in any pieces, whole bodies, refusals, and what goes wrong."""

from __future__ import annotations

import json

import pytest
from twostroke_cli.bench.answer import AnswerReader

USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}


def chunk(text: str | None, **more: object) -> bytes:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None, **more}
    return b"data: " + json.dumps({"id": "x", "choices": [choice], "usage": None}).encode() + b"\n\n"


def read(*pieces: bytes, status: int = 200, is_streamed: bool = True) -> AnswerReader:
    reader = AnswerReader(is_streamed)
    reader.on_status(status)
    for piece in pieces:
        reader.on_data(piece)
    reader.finish()
    return reader


STREAM = (
    chunk("")
    + chunk("Par")
    + chunk("is", finish_reason="stop")
    + b"data: "
    + json.dumps({"choices": [], "usage": USAGE}).encode()
    + b"\n\ndata: [DONE]\n\n"
)


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_a_stream_is_read_however_it_is_cut(size: int) -> None:
    reader = read(*(STREAM[start : start + size] for start in range(0, len(STREAM), size)))
    assert reader.error == ""
    assert len(reader.times_s) == 2, "the empty first piece is no text"
    assert (reader.usage.completion_tokens, reader.usage.prompt_tokens, reader.cached_tokens) == (2, 9, 4)
    assert reader.finish_reason == "stop"


def test_lines_may_end_in_any_way_and_comments_are_no_events() -> None:
    crlf = b": ping\r\n\r\n" + STREAM.replace(b"\n", b"\r\n").replace(b"data: ", b"data:")
    assert len(read(crlf).times_s) == 2


@pytest.mark.parametrize(
    "delta", [{"content": "a"}, {"reasoning_content": "a"}, {"reasoning": "a"}, {"tool_calls": [{"index": 0}]}]
)
def test_reasoning_and_tool_calls_are_text(delta: dict[str, object]) -> None:
    event = b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\ndata: [DONE]\n\n"
    assert len(read(event).times_s) == 1


def test_completions_have_their_text_elsewhere() -> None:
    assert len(read(b'data: {"choices": [{"text": " a"}]}\n\ndata: [DONE]\n\n').times_s) == 1


def test_a_whole_answer_has_usage_and_no_times() -> None:
    body = {"choices": [{"message": {"content": "Paris"}, "finish_reason": "stop"}], "usage": USAGE}
    reader = read(json.dumps(body).encode(), is_streamed=False)
    assert (reader.error, reader.times_s, reader.usage.completion_tokens) == ("", [], 2)


@pytest.mark.parametrize(
    ("status", "kind"), [(429, "refused"), (503, "refused"), (400, "HTTP 400"), (500, "HTTP 500"), (302, "HTTP 302")]
)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_refusal_is_told_from_a_fault(status: int, kind: str, is_streamed: bool) -> None:
    reader = read(b'{"error": {"message": ', b'"no room"}}', status=status, is_streamed=is_streamed)
    assert (reader.error, reader.message) == (kind, "no room")
    assert read(b"<html>", status=status).message == "<html>"
    assert read(b'{"error": "plain"}', status=status).message == "plain"


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ((chunk("a"),), "broken off"),
        ((), "broken off"),
        ((chunk("a"), b'data: {"error": {"message": "engine died"}}\n\n'), "error event"),
        ((b"data: {nonsense\n\n",), "bad answer"),
    ],
)
def test_a_stream_that_goes_wrong_says_how(pieces: tuple[bytes, ...], kind: str) -> None:
    reader = read(*pieces)
    assert reader.error == kind
    assert reader.message


def test_the_first_fault_is_the_one_that_is_kept() -> None:
    reader = read(b'data: {"error": {"message": "engine died"}}\n\n')
    assert (reader.error, reader.message) == ("error event", "engine died")
    assert len(read(b'{"error": "' + b"x" * 5000 + b'"}', status=500).message) == 200
