"""`load_format="random"`: any config.json runs without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.model.config import ModelError
from twostroke_engine.runner.model_runner import LoadedModel, build_runner
from twostroke_engine.weights.loader import Pull, Source
from twostroke_engine.weights.random_weights import RandomWeights

from tests.support.model_oracle import random_tokens
from tests.support.plan_driver import PlanDriver

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def load_shape(folder: Path, family: str, **settings: Any) -> LoadedModel:
    (folder / "config.json").write_text(json.dumps({**SHAPE, "architectures": [family]}))
    config = {"dtype": "bfloat16", "num_blocks": 16, "load_format": "random", **settings}
    return build_runner(EngineConfig(model_dir=str(folder), **config))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_alone_generates_finite_tokens_and_the_same_again(family: str, tmp_path: Path) -> None:
    outputs = []
    for _ in range(2):
        model = load_shape(tmp_path, family)
        driver = PlanDriver(model)
        sequence = driver.add(random_tokens(40))
        sampled = [driver.prefill(sequence), *driver.decode(sequence, 20)]
        assert all(entry.finite for entry in sampled)
        outputs.append(sequence.tokens)
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0][40:])) > 5, "logits that never change are not sane"


def test_fingerprint_says_random(tmp_path: Path) -> None:
    llama, again = (load_shape(tmp_path, "LlamaForCausalLM").model_fingerprint for _ in range(2))
    assert llama.startswith("random-")
    assert llama == again
    assert load_shape(tmp_path, "Qwen2ForCausalLM").model_fingerprint != llama


def test_without_the_flag_weights_are_missed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load_shape(tmp_path, "LlamaForCausalLM", load_format="safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_value_is_drawn(dtype: torch.dtype) -> None:
    shapes = {"q_proj.weight": (96, 400), "q_proj.bias": (96,), "input_layernorm.weight": (400,)}
    pulls = [
        Pull(torch.full(shape, float("nan"), dtype=dtype), (Source(name, shape, (), ()),))
        for name, shape in shapes.items()
    ]
    RandomWeights(torch.device("cpu")).fill(pulls, ())
    weight, bias, norm = (pull.target.double() for pull in pulls)
    assert weight.std() == pytest.approx(400**-0.5, rel=0.05)
    assert bias.abs().max() < 0.1
    assert norm.mean() == pytest.approx(1.0, abs=0.01)
    for tensor in (weight, bias, norm):
        assert tensor.isfinite().all()
        assert (tensor == 0).double().mean() < 1e-3
        assert tensor.unique().numel() > 20
