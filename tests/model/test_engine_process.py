"""The engine's process, spoken to as its service does: frames over a socket pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from twostroke_engine.config import EngineConfig
from twostroke_engine.framing import LENGTH
from twostroke_engine.messages import (
    Cancel,
    EngineFailed,
    EngineReady,
    RequestUpdate,
    Stop,
    Submit,
)
from twostroke_engine.request import ErrorCode, Request, SamplingParams

from tests.support.engine_process import Child
from tests.support.tiny_model import make_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.stop()


def config(folder: Path, **overrides: object) -> EngineConfig:
    return EngineConfig(**{"model_dir": str(folder), "dtype": "float32", "num_blocks": 32, **overrides})  # type: ignore[arg-type]


def request(request_id: str, max_tokens: int) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(id=request_id, token_ids=tuple(range(5, 45)), sampling=sampling)


def tokens_of(updates: list[RequestUpdate]) -> list[int]:
    return [token.id for update in updates for delta in update.deltas for token in delta.tokens]


def test_a_request_from_the_first_frame_to_the_exit(child: Child, model: Path) -> None:
    child.send(config(model, max_step_tokens=16))
    ready = child.receive()
    assert isinstance(ready, EngineReady)
    assert (ready.num_blocks, ready.kv_spec.block_size, ready.max_model_len) == (32, 16, 512)
    child.send(Submit(request=request("cold", 6)))
    cold = child.until_end("cold")
    assert cold[-1].end is not None
    assert cold[-1].end.error is None
    child.send(Submit(request=request("hit", 6)))
    hit = child.until_end("hit")
    assert hit[-1].end is not None
    assert hit[-1].end.facts.cached_tokens == 32
    assert tokens_of(hit) == tokens_of(cold)
    assert len(tokens_of(cold)) == 6
    child.send(Submit(request=request("long", 400)))
    child.send(Cancel(request_id="long"))
    end = child.until_end("long")[-1].end
    assert end is not None
    assert end.error is ErrorCode.CANCELLED
    child.send(Stop())
    assert child.exit_code() == 0


def test_the_end_of_the_stream_ends_a_process_that_computes(child: Child, model: Path) -> None:
    child.send(config(model, sends_kv=True, receives_kv=True))
    assert isinstance(child.receive(), EngineReady)
    child.send(Submit(request=request("a", 400)))
    child.receive()
    child.socket.close()
    assert child.exit_code() == 0


def test_the_end_of_the_stream_ends_a_process_that_waits_for_nothing(child: Child) -> None:
    child.socket.close()
    assert child.exit_code() == 0


@pytest.mark.parametrize("overrides", [{"model_dir": "/nowhere/at/all"}, {"block_size": 10}, {"dtype": "int3"}])
def test_a_wrong_configuration_is_one_clear_line(child: Child, model: Path, overrides: dict[str, object]) -> None:
    child.send(config(model, **overrides))
    failed = child.receive()
    assert isinstance(failed, EngineFailed)
    assert str(next(iter(overrides.values()))) in failed.message
    assert "\n" not in failed.message
    assert child.exit_code() == 1
    assert child.process.stderr is not None
    assert b"Traceback" not in child.process.stderr.read()


def test_what_is_no_message_ends_the_process(child: Child, model: Path) -> None:
    child.send(config(model))
    child.receive()
    child.socket.sendall(LENGTH.pack(3) + b"\xff\xff\xff")
    assert child.exit_code() == 1
