"""The soak for seconds on a CPU, and what it would notice."""

from __future__ import annotations

import json
from array import array

import pytest
import torch
from twostroke_engine.messages import ChoiceDelta, RequestEnd, RequestUpdate
from twostroke_engine.request import ErrorCode, FinishReason, RequestFacts, TokenOut

from tests.soak.engine_soak import main
from tests.soak.heard import Heard, SoakFailure, differing
from tests.soak.memory import MemoryRecord
from tests.soak.workload import Asked, Sizes, Workload
from tests.support.engine_bench import make_request

pytestmark = pytest.mark.slow

SIZES = Sizes(vocab_size=320, longest_prompt=150, longest_output=60)
CPU = torch.device("cpu")
END = RequestEnd(facts=RequestFacts())


@pytest.mark.parametrize("flags", [[], ["--batch-invariant"]], ids=["plain", "batch-invariant"])
def test_a_short_soak_passes(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "2.5", "--seed", "7", *flags]) == 0, capsys.readouterr().out
    first, said, line = capsys.readouterr().out.splitlines()
    assert first == "seed 7"
    assert "passed" in said
    record = json.loads(line)
    assert record["requests"] > 5
    assert record["cancelled"] > 0
    assert record["failures"] == []


def test_a_soak_says_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    """A pool that is never full is no soak."""
    assert main(["--seconds", "0.5", "--seed", "7", "--num-blocks", "4000"]) == 1
    assert "% full at most; nothing was preempted" in capsys.readouterr().out


def test_requests_are_functions_of_seed_and_number() -> None:
    one, same, other = Workload(3, SIZES), Workload(3, SIZES), Workload(4, SIZES)
    asked = [one.asked(number) for number in range(200)]
    assert asked == [same.asked(number) for number in range(200)]
    assert asked[:20] != [other.asked(number) for number in range(20)]
    assert {a.request.n for a in asked} == {1, 2, 3}
    assert any(a.cancel_after is not None for a in asked)
    assert all(1 <= a.request.num_prompt_tokens <= 150 and 1 <= a.request.sampling.max_tokens <= 60 for a in asked)
    assert {a.request.sampling.temperature == 0 for a in asked} == {True, False}


def heard(n: int = 1, cancelled: bool = False, **sampling: object) -> Heard:
    request = make_request("soak-0", 5, n=n, **{"max_tokens": 3, **sampling})
    return Heard(Asked(request, None), max_model_len=100, eos=frozenset({5}), was_cancelled=cancelled)


def update(
    *tokens: int, offset: int = 0, choice: int = 0, finish: FinishReason | None = None, end: RequestEnd | None = None
) -> RequestUpdate:
    out = tuple(TokenOut(token) for token in tokens)
    delta = ChoiceDelta(choice=choice, offset=offset, tokens=out, finish=finish)
    return RequestUpdate(request_id="soak-0", deltas=(delta,), end=end)


def test_a_whole_stream_is_accepted() -> None:
    stream = heard()
    stream.hear(update(8, 9))
    stream.hear(update(10, offset=2, finish=FinishReason.LENGTH, end=END))
    assert stream.ended
    assert stream.tokens == {0: array("i", [8, 9, 10])}
    stopped = heard(stop_token_ids=(9,))
    stopped.hear(update(8, 9, finish=FinishReason.STOP, end=END))
    assert stopped.num_tokens == 2


@pytest.mark.parametrize(
    ("news", "what"),
    [
        ([update(8, offset=1)], "token 1 after 0"),
        ([update(8, 9, finish=FinishReason.LENGTH, end=END)], "2 tokens at the end by length, not 3"),
        ([update(8, 9, finish=FinishReason.STOP, end=END)], "at token 9"),
        ([update(8, 9, end=END)], "choices"),
        ([update(8, 9, 9, 9, end=END)], "more tokens"),
        ([update(8, finish=FinishReason.STOP), update(9, offset=1)], "after a choice's finish"),
        ([update(8, 9, 9, finish=FinishReason.LENGTH, end=END), update(end=END)], "news after the end"),
        ([update(end=RequestEnd(error=ErrorCode.NUMERIC, facts=RequestFacts()))], "ended with"),
    ],
)
def test_what_must_not_be_said_is_noticed(news: list[RequestUpdate], what: str) -> None:
    stream = heard()
    for entry in news[:-1]:
        stream.hear(entry)
    with pytest.raises(SoakFailure, match=what):
        stream.hear(news[-1])


def test_likely_tokens_are_checked() -> None:
    stream = heard(logprobs=2)
    good = TokenOut(8, -0.5, ((8, -0.5), (9, -1.0)))
    stream.hear(RequestUpdate(request_id="soak-0", deltas=(ChoiceDelta(choice=0, offset=0, tokens=(good,)),)))
    for bad in (TokenOut(8, -0.5), TokenOut(8, -0.5, ((9, -1.0), (8, -0.5))), TokenOut(8, float("nan"), good.top)):
        with pytest.raises(SoakFailure, match=r"likely|logprobs"):
            stream.hear(RequestUpdate(request_id="soak-0", deltas=(ChoiceDelta(choice=0, offset=1, tokens=(bad,)),)))


def test_differences_between_runs() -> None:
    one = {0: {0: array("i", [1, 2, 3])}, 1: {0: array("i", [4, 5])}}
    other = {0: {0: array("i", [1, 2, 9])}, 1: {0: array("i", [4])}}
    assert differing(one, one, set()) == []
    assert differing(one, other, {1}) == ["soak-0 choice 0 from token 2"]
    assert differing(one, other, set()) == ["soak-0 choice 0 from token 2", "soak-1 choice 0 from token 1"]


def test_memory_that_grows_is_noticed() -> None:
    flat, rising = MemoryRecord(CPU), MemoryRecord(CPU)
    flat.sample()
    assert flat.summary()["resident"][0] > 10
    flat.samples["resident"] = [100.0, *[900.0] * 60]
    rising.samples["resident"] = [500.0 + 5 * step for step in range(60)]
    assert flat.growths() == []
    assert "resident memory grew" in rising.growths()[0]
    rising.samples["resident"] = rising.samples["resident"][:40]
    assert rising.growths() == []
