"""The batch-invariant mode: tokens and logprobs of a request do not depend, to the bit, on what runs beside it, on how
its prompt was cut, nor on whether it was interrupted. The issue's bar: 200 requests.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.request import Request
from twostroke_engine.runner.decode_rows import padded_sizes
from twostroke_engine.runner.forward import EagerForward
from twostroke_engine.runner.model_runner import LoadedModel, ModelRunner, build_runner

from tests.model.test_decode_rows import StaticForward
from tests.support.invariant_runs import Schedule, Streams, Work, draw_requests, run_alone, run_crowd

pytestmark = pytest.mark.slow

SMALL = Work(vocab_size=300, most_prompt_tokens=80, most_new_tokens=40)
CROWD = Schedule(seed=1, arrivals=8, max_step_tokens=512, max_running=64, num_blocks=400)
SMALL_CHUNKS = Schedule(seed=2, arrivals=3, max_step_tokens=13, max_running=6, num_blocks=400)
SMALL_POOL = Schedule(seed=3, arrivals=16, max_step_tokens=64, max_running=16, num_blocks=18, interruptions=0.1)


def told(folder: Path, **settings: object) -> EngineConfig:
    plain = {"dtype": "bfloat16", "num_blocks": 400, "block_size": 16, "batch_invariant": True}
    return EngineConfig(model_dir=str(folder), **{**plain, **settings})  # type: ignore[arg-type]


def differing(streams: Streams, expected: Streams) -> list[tuple[str, int]]:
    """Who got something else; everyone must have got something."""
    assert streams.keys() == expected.keys()
    return sorted(key for key, tokens in expected.items() if streams[key] != tokens)


def assert_same_in_all(
    config: EngineConfig,
    model: LoadedModel,
    requests: Sequence[Request],
    schedules: Sequence[Schedule],
    interrupted: Schedule,
) -> None:
    alone = run_alone(config, model, requests)
    for schedule in schedules:
        streams, _ = run_crowd(config, model, requests, schedule)
        assert not differing(streams, alone), schedule
    streams, num_preemptions = run_crowd(config, model, requests, interrupted)
    assert num_preemptions > len(requests) // 20
    assert not differing(streams, alone), interrupted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_requests_alone_and_in_crowds(dtype: str, tiny_llama: Path) -> None:
    config = told(tiny_llama, dtype=dtype)
    requests = draw_requests(SMALL, 40, seed=5)
    assert_same_in_all(config, build_runner(config), requests, (CROWD, SMALL_CHUNKS), SMALL_POOL)


@pytest.mark.slow
def test_two_hundred_requests(tiny_llama: Path) -> None:
    config = told(tiny_llama)
    requests = draw_requests(SMALL, 200, seed=6)
    others = tuple(
        Schedule(seed, arrivals=seed, max_step_tokens=tokens, max_running=32, num_blocks=400)
        for seed, tokens in ((7, 17), (9, 100))
    )
    assert_same_in_all(config, build_runner(config), requests, (CROWD, SMALL_CHUNKS, *others), SMALL_POOL)


def test_padded_steps_that_are_planned_ahead(tiny_llama: Path) -> None:
    """What a GPU's runner does, but for the graphs: static buffers, and tokens that only the device knows yet."""
    config = told(tiny_llama)
    model = build_runner(config)
    requests = draw_requests(SMALL, 40, seed=9)
    alone = run_alone(config, model, requests)
    runner = model.runner
    pool = torch.full((model.num_blocks + 1, *runner.kv_pool.shape[1:]), float("nan"), dtype=torch.bfloat16)
    eager = runner.forward
    assert isinstance(eager, EagerForward)
    forward = StaticForward(EagerForward(eager._decoder, pool), pool, padded_sizes(16), model.vocab_size)
    twin = ModelRunner(forward, runner.backend, pool[: model.num_blocks], runner.model, batch_invariant=True)
    for schedule in (CROWD, SMALL_POOL):
        streams, _ = run_crowd(config, dataclasses.replace(model, runner=twin), requests, schedule)
        assert not differing(streams, alone), schedule
    assert forward.num_fresh > 40
    assert forward.num_steps > 40


def test_without_the_mode_the_company_shows(tiny_llama: Path) -> None:
    """What the tests above compare does depend on the schedule where nothing is done about it."""
    config = told(tiny_llama, batch_invariant=False)
    model = build_runner(config)
    requests = draw_requests(SMALL, 40, seed=5)
    streams, _ = run_crowd(config, model, requests, CROWD)
    assert differing(streams, run_alone(config, model, requests))


def test_generated_tokens_replayed_as_a_prompt_would_show(tiny_llama: Path) -> None:
    """This backend with a scheduler and a runner that know nothing of the mode: interruptions make a difference."""
    config = told(tiny_llama, dtype="float32")
    model = build_runner(config)
    requests = draw_requests(SMALL, 40, seed=5)
    alone = run_alone(config, model, requests)
    runner = ModelRunner(model.runner.forward, model.runner.backend, model.runner.kv_pool, model.runner.model)
    unaware = dataclasses.replace(model, runner=runner)
    config = told(tiny_llama, dtype="float32", batch_invariant=False)
    streams, num_preemptions = run_crowd(config, unaware, requests, SMALL_POOL)
    assert num_preemptions > 0
    assert differing(streams, alone)


GPU_SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
GPU_WORK = Work(8192, most_prompt_tokens=300, most_new_tokens=60, long_prompts=(4090, 4097, 5000, 6001))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")
@pytest.mark.parametrize("head_dim", [128, 80])
def test_two_hundred_requests_on_the_card(head_dim: int, tmp_path: Path) -> None:
    """Graphs of every size, pieces, eager steps; heads of 80 take the plain prefill kernel."""
    (tmp_path / "config.json").write_text(json.dumps({**GPU_SHAPE, "head_dim": head_dim}))
    config = told(
        tmp_path, device="cuda", load_format="random", block_size=64, num_blocks=1000, max_step_tokens=8192,
        max_running=128,
    )  # fmt: skip
    requests = draw_requests(GPU_WORK, 200, seed=8)
    crowds = (
        Schedule(seed=1, arrivals=60, max_step_tokens=8192, max_running=128, num_blocks=1000),
        Schedule(seed=2, arrivals=9, max_step_tokens=300, max_running=128, num_blocks=1000),
        Schedule(seed=3, arrivals=3, max_step_tokens=1111, max_running=20, num_blocks=1000),
    )
    small_pool = Schedule(4, arrivals=60, max_step_tokens=500, max_running=128, num_blocks=110, interruptions=0.3)
    assert_same_in_all(config, build_runner(config), requests, crowds, small_pool)
