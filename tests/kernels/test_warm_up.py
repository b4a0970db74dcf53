"""What runs before the first request: it leaves no trace, and on a GPU nothing is left to compile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.model.config import read_model_config
from twostroke_engine.model.families import FAMILIES
from twostroke_engine.request import Request, SamplingParams
from twostroke_engine.runner.model_runner import build_runner
from twostroke_engine.runner.warm_up import warm_blocks, warm_sampling, warm_up
from twostroke_kernels.torch_backend import TorchBackend
from twostroke_kernels.triton_backend import TritonBackend

from benchmarks.workload import LLAMA_8B, TINY, Prompts
from tests.support.graph_engine import run_requests
from tests.support.triton_device import DEVICE, gpu

SMALL = LLAMA_8B | {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def random_pool(num_blocks: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (num_blocks, 2, 2, 16, TINY["num_key_value_heads"], TINY["head_dim"])
    return torch.randn(shape, dtype=dtype).to(DEVICE)


def test_only_the_second_block_changes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    model, pool = read_model_config(tmp_path, FAMILIES), random_pool(4, torch.float16)
    before = pool.clone()
    warm_up(TritonBackend(DEVICE), pool, model, max_rows=3, max_model_len=40)
    assert torch.equal(pool[[0, 2, 3]], before[[0, 2, 3]])
    assert torch.equal(pool[1], before[0])


def test_any_backend_can_be_warmed() -> None:
    backend, pool = TorchBackend(torch.device("cpu")), random_pool(3, torch.float32).cpu()
    before = pool.clone()
    warm_sampling(backend, 50)
    warm_blocks(backend, pool)
    warm_blocks(backend, pool[:1])
    assert torch.equal(pool[[0, 2]], before[[0, 2]])


def kinds() -> list[SamplingParams]:
    """Ways of choosing that differ in what runs on the device."""
    common: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}
    return [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0, logprobs=0, **common),
        SamplingParams(temperature=0, logprobs=5, **common),
        SamplingParams(temperature=0, repetition_penalty=1.3, **common),
        SamplingParams(temperature=1, seed=1, **common),
        SamplingParams(temperature=1, top_k=20, top_p=0.8, seed=2, **common),
        SamplingParams(temperature=1, min_p=0.1, logprobs=3, frequency_penalty=0.5, seed=3, **common),
    ]


@gpu
def test_nothing_is_compiled_while_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    config = EngineConfig(
        model_dir=str(tmp_path),
        device="cuda",
        load_format="random",
        block_size=64,
        num_blocks=512,
        max_model_len=8192,
        max_step_tokens=4096,
        max_running=64,
    )
    model, prompts = build_runner(config), Prompts(SMALL["vocab_size"])
    compiled: list[str] = []

    def note(**facts: Any) -> None:
        compiled.append(facts["fn"].name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    lengths = (1, 5, 63, 64, 65, 130, 700, 1500, 3000, 6000)
    for round_number in range(3):
        requests = [
            Request(
                id=f"{round_number}-{number}-{length}",
                token_ids=tuple(prompts.draw(length)),
                sampling=sampling,
                n=2 if length == 65 else 1,
            )
            for number, sampling in enumerate(kinds())
            for length in lengths[round_number :: 3 if number else 1]
        ]
        run_requests(config, model, model.runner, requests)
    assert compiled == []
