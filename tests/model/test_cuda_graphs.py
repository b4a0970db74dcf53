"""On the card: replayed decode steps give the tokens of eager ones, and a profile run sizes the pool."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.request import Request
from twostroke_engine.runner.cuda_graphs import GraphForward
from twostroke_engine.runner.model_runner import LoadedModel, ModelRunner, build_runner

from tests.support.engine_bench import make_request
from tests.support.graph_engine import run_requests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device"),
]

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
MAX_RUNNING = 20


def config(folder: Path, **settings: object) -> EngineConfig:
    """float32, so that a difference in how sums are cut does not choose another token."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    told = {"block_size": 64, "num_blocks": 200, "max_step_tokens": 512, "max_running": MAX_RUNNING, "dtype": "float32"}
    return EngineConfig(model_dir=str(folder), device="cuda", load_format="random", **{**told, **settings})  # type: ignore[arg-type]


def graphs(model: LoadedModel) -> GraphForward:
    forward = model.runner.forward
    assert isinstance(forward, GraphForward), "this card's backend is not captured"
    return forward


def eager_twin(model: LoadedModel) -> ModelRunner:
    """The same weights and the same pool, without graphs."""
    runner = model.runner
    return ModelRunner(graphs(model).eager, runner.backend, runner.kv_pool, runner.model)


def requests(count: int, max_tokens: int = 24) -> list[Request]:
    """Contexts from one token to several blocks; every third request forks; every second is drawn."""
    return [
        make_request(
            f"r{number}",
            tuple((7 * number + 13 * position) % 990 for position in range(1 + 37 * number % 300)),
            n=3 if number % 3 == 2 else 1,
            temperature=float(number % 2),
            top_p=0.95,
            seed=number,
            max_tokens=max_tokens,
        )
        for number in range(count)
    ]


def test_replays_give_eager_tokens_in_batches_of_every_size(tmp_path: Path) -> None:
    told = config(tmp_path)
    model = build_runner(told)
    for count in range(1, MAX_RUNNING + 4):
        before = graphs(model).num_replays
        replayed, _ = run_requests(told, model, model.runner, requests(count))
        assert graphs(model).num_replays > before
        eager, _ = run_requests(told, model, eager_twin(model), requests(count))
        assert replayed == eager, count


def test_preempted_sequences_replay_as_before(tmp_path: Path) -> None:
    told = config(tmp_path, num_blocks=24, max_model_len=1000)
    model = build_runner(told)
    work = requests(12, max_tokens=200)
    replayed, num_preempted = run_requests(told, model, model.runner, work)
    assert num_preempted > 0
    eager, _ = run_requests(told, model, eager_twin(model), work)
    assert replayed == eager


def test_neither_padding_nor_a_neighbours_nan_reaches_a_sequence(tmp_path: Path) -> None:
    """The scratch block and every free block start as NaN."""
    told = config(tmp_path)
    model = build_runner(told)
    expected, _ = run_requests(told, model, model.runner, requests(5))
    kv_layer = graphs(model)._buffers.inputs(1).kv_layers[0]
    assert kv_layer.shape[0] == model.num_blocks + 1
    model.runner.kv_pool.fill_(float("nan"))
    replayed, _ = run_requests(told, model, model.runner, requests(5))
    assert replayed == expected


def test_bf16_logits_of_a_replay_are_near_eager_ones(tmp_path: Path) -> None:
    told = config(tmp_path, dtype="bfloat16")
    model = build_runner(told)
    eager = eager_twin(model)
    logits: dict[str, torch.Tensor] = {}
    for name, runner in (("replayed", model.runner), ("eager", eager)):
        model.runner.kv_pool.zero_()
        spied = dataclasses.replace(model, runner=runner)
        seen: list[torch.Tensor] = []
        plain = runner.forward.logits

        def spy(*args: object, plain: object = plain, seen: list[torch.Tensor] = seen) -> torch.Tensor | None:
            result = plain(*args)  # type: ignore[operator]
            if result is not None:
                seen.append(result.clone())
            return result  # type: ignore[no-any-return]

        class Spy:
            lookahead = 0
            logits = staticmethod(spy)
            ahead = staticmethod(runner.forward.ahead)

        run_requests(told, spied, ModelRunner(Spy(), runner.backend, runner.kv_pool, runner.model), requests(1, 2))
        logits[name] = seen[-1]
    assert logits["replayed"].shape == logits["eager"].shape == (1, 1000)
    assert torch.allclose(logits["replayed"], logits["eager"], atol=0.05, rtol=0.02)


def test_profile_fills_the_fraction_and_leaves_the_rest(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    model = build_runner(config(tmp_path, num_blocks=None, gpu_memory_fraction=0.5))
    now, _ = torch.cuda.mem_get_info()
    assert 0.4 * total < free - now < 0.52 * total
    assert model.runner.kv_pool.shape[0] == model.num_blocks
    tokens, _ = run_requests(config(tmp_path), model, model.runner, requests(9))
    assert len(tokens) == 9 + 2 * 3
