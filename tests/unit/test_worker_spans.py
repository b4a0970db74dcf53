"""A worker's spans of a request, from the messages that pass through its service."""

from __future__ import annotations

import pytest
from twostroke_chassis.spans import OpenSpan, SpanFacts
from twostroke_engine.messages import RequestEnd, Reserve, StageTimes, Submit
from twostroke_engine.request import ErrorCode, Request, RequestFacts, SamplingParams
from twostroke_engine.transfer.messages import KVDestination
from twostroke_worker.spans import RequestSpans

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REQUEST = Request(id="r", token_ids=(1, 2), sampling=SamplingParams(), traceparent=TRACEPARENT)
DESTINATION = KVDestination(worker_id="d0", endpoint="h:1", lease_id="l", epoch=1, kv_fingerprint="k", ttl_s=1.0)


class Recorded:
    """Stands for a tracer: what it was told."""

    def __init__(self) -> None:
        self.spans: dict[str, tuple[float, SpanFacts]] = {}

    def begin(self, name: str, traceparent: str, start_s: float, *, is_root: bool = False) -> OpenSpan:
        raise AssertionError("a worker begins no span: it adds those that are over")

    def add(self, name: str, traceparent: str, start_s: float, facts: SpanFacts) -> None:
        assert traceparent == TRACEPARENT
        assert name not in self.spans
        self.spans[name] = (start_s, facts)

    def moments(self, name: str) -> dict[str, float]:
        return {moment.name: moment.at_s for moment in self.spans[name][1].moments}


def run(
    message: Submit | Reserve, end: RequestEnd, stages: StageTimes | None = None, granted_s: float | None = None
) -> Recorded:
    """A request that came at 10 s and was over at 20 s."""
    recorded = Recorded()
    spans = RequestSpans(recorded, "w0")
    spans.begun(message, 10.0)
    if granted_s is not None:
        spans.granted("r", granted_s)
    if stages is not None:
        spans.stages("r", stages)
        spans.stages("r", StageTimes(made_s=99.0))  # of a second token: no moment of its own
    spans.ended("r", end, 20.0)
    spans.ended("r", end, 21.0)  # said twice: told once
    spans.ended("unknown", end, 21.0)
    return recorded


def test_a_prefill_worker_shows_the_prompt_and_the_transfer() -> None:
    facts = RequestFacts(cached_tokens=3, transfer_s=7.5, commit_wait_s=0.5, commit_ack_s=0.25, kv_bytes=64)
    stages = StageTimes(queue_s=1.0, compute_s=4.0, made_s=15.0)
    recorded = run(Submit(request=REQUEST, destination=DESTINATION), RequestEnd(facts=facts), stages)
    assert set(recorded.spans) == {"prefill", "transfer"}
    start_s, prefill = recorded.spans["prefill"]
    assert (start_s, prefill.end_s, prefill.attributes["twostroke.worker.id"]) == (10.0, 15.0, "w0")
    assert recorded.moments("prefill") == {
        "prefill_queued": 10.0,
        "prefill_started": 11.0,
        "prefill_finished": 15.0,
        "first_token": 15.0,
    }
    start_s, transfer = recorded.spans["transfer"]
    assert (start_s, transfer.end_s, transfer.attributes["twostroke.kv.bytes"]) == (12.5, 20.0, 64)
    assert recorded.moments("transfer") == {"transfer_opened": 12.5, "transfer_committed": 15.5, "finished": 20.0}


def test_a_decode_worker_shows_its_part_from_the_reservation_on() -> None:
    stages = StageTimes(queue_s=0.5, compute_s=1.0, ready_s=0.25, made_s=16.0)
    facts = RequestFacts(transfer_s=2.0, preemptions=1)
    recorded = run(Reserve(request=REQUEST, ttl_s=1.0), RequestEnd(facts=facts), stages, granted_s=11.0)
    ((start_s, decode),) = recorded.spans.values()
    assert (start_s, decode.end_s, decode.attributes["twostroke.preemptions"]) == (10.0, 20.0, 1)
    assert recorded.moments("decode") == {
        "reserved": 11.0,
        "transfer_opened": 12.5,
        "transfer_committed": 14.5,
        "decode_started": 15.0,
        "finished": 20.0,
    }


def test_a_colocated_request_has_both_parts_one_after_the_other() -> None:
    stages = StageTimes(queue_s=1.0, compute_s=4.0, made_s=15.0)
    recorded = run(Submit(request=REQUEST), RequestEnd(facts=RequestFacts()), stages)
    spans = {name: (start_s, facts.end_s) for name, (start_s, facts) in recorded.spans.items()}
    assert spans == {"prefill": (10.0, 15.0), "decode": (15.0, 20.0)}


@pytest.mark.parametrize(
    ("code", "event", "is_error"), [(ErrorCode.CANCELLED, "cancelled", False), (ErrorCode.NUMERIC, "failed", True)]
)
@pytest.mark.parametrize("kind", ["submit", "hand-over", "reserve"])
def test_one_that_ends_before_its_first_token_says_how(kind: str, code: ErrorCode, event: str, is_error: bool) -> None:
    message: Submit | Reserve = Reserve(request=REQUEST, ttl_s=1.0)
    if kind != "reserve":
        message = Submit(request=REQUEST, destination=DESTINATION if kind == "hand-over" else None)
    recorded = run(message, RequestEnd(error=code, message="why", facts=RequestFacts(queue_s=2.0)))
    ((name, (_, facts)),) = recorded.spans.items()
    assert name == ("decode" if kind == "reserve" else "prefill")
    assert recorded.moments(name)[event] == 20.0
    assert facts.error == ("why" if is_error else "")
