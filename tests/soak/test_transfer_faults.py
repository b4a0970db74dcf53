"""Some faults of every class over each channel, and what the soak would notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twostroke_engine.messages import ChoiceDelta, LeaseGrant, RequestEnd, RequestUpdate
from twostroke_engine.request import ErrorCode, RequestFacts, TokenOut

from tests.soak.transfer_faults_run import NUM_LAYERS, SHARED_MEMORY, FaultSoak
from tests.support.fault_cluster import Engines, EngineUnit
from tests.support.fault_judge import Judge
from tests.support.fault_plan import CLASSES, Planned, faults_of, id_of
from tests.support.fault_traffic import Attempt, Job
from tests.support.tiny_model import make_tiny_llama
from tests.support.transfer_ends import make_request

FAULTS = 40
GOOD = RequestEnd(facts=RequestFacts())
BAD = RequestEnd(error=ErrorCode.TRANSFER, facts=RequestFacts())


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    made = Engines(tmp_path_factory.mktemp("engines"))
    yield made
    made.stop()


@pytest.mark.slow
@pytest.mark.parametrize("channel", ["shm", "tcp", "collective", SHARED_MEMORY])
def test_faults_of_every_class_spoil_nothing(channel: str, engines: Engines, tmp_path: Path) -> None:
    """Ten thousand: `python -m tests.soak.transfer_faults`."""
    model_dir = make_tiny_llama(tmp_path / "model", num_hidden_layers=NUM_LAYERS)
    soak = FaultSoak(channel, 11, engines, model_dir, num_prompts=20, most_reuse_s=1.0)
    try:
        soak.run(FAULTS)
    finally:
        engines.end_all()
    tally = soak.judge.tally
    assert tally.violations == []
    assert tally.injected >= FAULTS
    assert all(tally.classes[name].injected for name in CLASSES)
    assert tally.continued > 0, "a writer was stopped, and went on over memory that was not its own any more"
    assert tally.hashes_compared > 20
    assert soak.judge.engine_counts["digest_failures"] > 0
    assert soak.judge.engine_counts["kv_stale"] > 0


def test_an_id_tells_the_faults() -> None:
    faults = (Planned("flip", 3), Planned("kill-mid", 0))
    assert faults_of(id_of(17, 2, faults)) == faults
    assert faults_of(id_of(17, 2, ())) == ()


def attempt(*tokens: int, end: RequestEnd = GOOD, faults: tuple[Planned, ...] = ()) -> Attempt:
    unit: Any = EngineUnit.__new__(EngineUnit)
    made = Attempt(Job(1, make_request("p", range(20)), b""), faults, unit)
    made.lease = LeaseGrant(lease_id="lease", epoch=1, ttl_s=1.0)
    first, *rest = (TokenOut(token) for token in tokens)
    made.hear("prefill", RequestUpdate(request_id=made.id, deltas=(_delta(0, first),), end=GOOD))
    made.hear("decode", RequestUpdate(request_id=made.id, deltas=(_delta(1, *rest),), end=end))
    return made


def _delta(offset: int, *tokens: TokenOut) -> ChoiceDelta:
    return ChoiceDelta(choice=0, offset=offset, tokens=tokens)


@pytest.fixture
def judge() -> Judge:
    made = Judge()
    made.expected["p"] = {0: {0: 7, 1: 8, 2: 9}}
    return made


def test_right_tokens_are_right(judge: Judge) -> None:
    judge.judge(attempt(7, 8, 9))
    judge.judge(attempt(7, 8, end=BAD))
    assert judge.tally.violations == []
    assert judge.tally.collateral == 1


@pytest.mark.parametrize(("tokens", "end"), [((7, 8, 5), GOOD), ((7, 8), GOOD), ((7, 5), BAD)])
def test_a_wrong_token_is_noticed_also_of_a_try_that_failed(
    judge: Judge, tokens: tuple[int, ...], end: RequestEnd
) -> None:
    judge.judge(attempt(*tokens, end=end))
    assert "wrong or missing tokens" in judge.tally.violations[0]


@pytest.mark.parametrize("accepted", [{4}, set()])
def test_wrong_bytes_that_no_one_noticed_are_noticed(judge: Judge, accepted: set[int]) -> None:
    made = attempt(7, 8, 9)
    made.met, made.accepted = [("flip", 4)], accepted
    judge.judge(made)
    assert judge.tally.violations


def test_what_became_of_a_fault_is_counted(judge: Judge) -> None:
    resent, again, absorbed = attempt(7, 8, 9), attempt(7, end=BAD), attempt(7, 8, 9)
    resent.met, resent.rejected = [("flip", 4)], {4}
    again.met, absorbed.met = [("flip", 5)], [("dup", -1)]
    for made in (resent, again, absorbed):
        judge.judge(made)
    assert judge.tally.violations == []
    flips, twice = judge.tally.classes["bit flip"], judge.tally.classes["duplicate"]
    assert (flips.injected, flips.resent, flips.re_prefilled, twice.absorbed) == (2, 1, 1, 1)


def test_other_kv_than_was_computed_is_noticed(judge: Judge) -> None:
    judge.compare("1.1/", "computed", "aa")
    judge.compare("1.1/", "adopted", "aa")
    assert judge.tally.violations == []
    judge.compare("1.1/", "kept", "ab")
    assert len(judge.tally.violations) == 2
