"""Every family equals transformers: fp32 tightly, bf16 as closely as transformers' own bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.model_oracle import load, logprobs_along, random_tokens, reference_logits, transformers_model
from tests.support.plan_driver import PlanDriver
from tests.support.tiny_model import make_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from twostroke_engine.runner.model_runner import LoadedModel

FP32_TOLERANCE = 1e-4
BF16_FACTOR, BF16_FLOOR = 2.0, 0.05
"""bf16 logits may be off by twice transformers' own bf16 error (RMS over the vocabulary), plus a floor."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_linear_rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_odd_sizes": (
        "llama",
        {
            "hidden_size": 42,
            "intermediate_size": 50,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 10,
            "vocab_size": 301,
            "num_hidden_layers": 3,
        },
    ),
    "llama_one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_equals_transformers(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    folder = make_tiny(tmp_path, family, **overrides)
    model = load(folder)
    tokens = random_tokens(53, model.vocab_size)
    expected = reference_logits(transformers_model(folder), tokens)[46:].log_softmax(-1)
    got = logprobs_along(model, tokens, num_prompt=47, chunks=(21,))
    assert torch.allclose(got, expected, atol=FP32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_bf16_is_as_close_as_transformers(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    folder = make_tiny(tmp_path, family, dtype=torch.bfloat16, **overrides)
    tokens = random_tokens(53)
    exact = reference_logits(transformers_model(folder), tokens)[46:].log_softmax(-1)
    theirs = reference_logits(transformers_model(folder, torch.bfloat16), tokens)[46:].log_softmax(-1)
    ours = logprobs_along(load(folder, dtype="bfloat16"), tokens, num_prompt=47, chunks=(21,))
    bound = BF16_FACTOR * (theirs - exact).square().mean().sqrt() + BF16_FLOOR
    assert (ours - exact).square().mean().sqrt() <= bound
    assert not torch.equal(ours, exact)


def test_old_config_spelling_means_the_same(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling`, as files older than transformers 5 have them."""
    import json

    folder = make_tiny(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    tokens = random_tokens(40)
    new = logprobs_along(load(folder), tokens, num_prompt=40, chunks=())
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logprobs_along(load(folder), tokens, num_prompt=40, chunks=()), new)


@pytest.mark.parametrize("num_prompt", [1, 2, 15, 16, 17, 31, 32, 33, 64])
def test_greedy_tokens_across_block_boundaries(num_prompt: int, loaded: LoadedModel, reference: Any) -> None:
    prompt = random_tokens(num_prompt, seed=num_prompt)
    expected = list(prompt)
    for _ in range(20):
        expected.append(int(reference_logits(reference, expected)[-1].argmax()))
    driver = PlanDriver(loaded, seed=num_prompt)
    sequence = driver.add(prompt)
    driver.prefill(sequence)
    driver.decode(sequence, 19)
    assert sequence.tokens == expected
