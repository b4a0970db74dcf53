"""The two lanes from a router to a worker."""

from __future__ import annotations

import asyncio
from functools import partial

from twostroke_proto.v1 import worker_pb2
from twostroke_router.outgoing import Outgoing


def submit(request_id: str) -> worker_pb2.RouterMessage:
    return worker_pb2.RouterMessage(submit=worker_pb2.Submit(request=worker_pb2.EngineRequest(id=request_id)))


def filled(*request_ids: str) -> Outgoing:
    outgoing = Outgoing()
    for request_id in request_ids:
        outgoing.put(request_id, partial(submit, request_id))
    return outgoing


async def drained(outgoing: Outgoing) -> list[tuple[str, str | None]]:
    sent: list[tuple[str, str | None]] = []
    while len(outgoing):
        request_id, message = await outgoing.next()
        sent.append((request_id, message.WhichOneof("kind")))
    return sent


async def test_cancels_overtake_prompts() -> None:
    outgoing = filled("a", "b", "c")
    assert (await outgoing.next())[0] == "a"
    outgoing.cancel("a", "gone")
    assert await drained(outgoing) == [("a", "cancel"), ("b", "submit"), ("c", "submit")]


async def test_what_was_not_sent_is_taken_back() -> None:
    outgoing = filled("a", "b")
    outgoing.cancel("a", "gone")
    assert "a" not in outgoing
    assert await drained(outgoing) == [("b", "submit")]


async def test_a_message_is_made_when_it_is_sent() -> None:
    clock_s = iter([1, 2])
    outgoing = Outgoing()
    outgoing.put("a", lambda: submit(f"made at {next(clock_s)}"))
    assert next(clock_s) == 1
    assert (await outgoing.next())[1].submit.request.id == "made at 2"


async def test_a_new_stream_begins_without_old_cancels() -> None:
    outgoing = filled("a", "b")
    await outgoing.next()
    outgoing.cancel("a", "gone")
    outgoing.forget_cancels()
    assert await drained(outgoing) == [("b", "submit")]


async def test_next_waits_for_news() -> None:
    outgoing = Outgoing()
    waiting = asyncio.create_task(outgoing.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    outgoing.put("a", lambda: submit("a"))
    assert (await waiting)[0] == "a"
