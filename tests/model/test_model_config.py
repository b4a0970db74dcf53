"""config.json: what is understood, and what is refused with one line that names the field."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from twostroke_engine.config import EngineConfig
from twostroke_engine.model.config import ModelError, Rope, read_model_config
from twostroke_engine.model.families import FAMILIES
from twostroke_engine.runner.model_runner import build_runner

from tests.support.model_oracle import load

if TYPE_CHECKING:
    from pathlib import Path

MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def write(folder: Path, generation: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A folder with a minimal config.json; a field of value ... is left out."""
    merged = {name: value for name, value in {**MINIMAL, **fields}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(merged))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_defaults(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path), FAMILIES)
    assert (config.num_kv_heads, config.head_dim, config.rope) == (4, 16, Rope(theta=10_000.0))
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert config.eos_token_ids == ()


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(theta=5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(theta=5e5)),
        ({"rope_theta": 7, "rope_scaling": None}, Rope(theta=7.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(kind="linear", factor=2.0)),
    ],
)
def test_rope_in_both_spellings(fields: dict[str, Any], rope: Rope, tmp_path: Path) -> None:
    assert read_model_config(write(tmp_path, **fields), FAMILIES).rope == rope


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 3], None, (2, 3)),
        (2, {"eos_token_id": [5, 6]}, (5, 6)),
        (2, {"temperature": 0.6}, (2,)),
    ],
)
def test_end_tokens(config: Any, generation: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    folder = write(tmp_path, generation, eos_token_id=config)
    assert read_model_config(folder, FAMILIES).eos_token_ids == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": ...}, ["architectures"]),
        ({"hidden_size": ...}, ["hidden_size"]),
        ({"hidden_size": "64"}, ["hidden_size", "int"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "num_key_value_heads"]),
        ({"hidden_size": 66}, ["hidden_size", "num_attention_heads"]),
        ({"head_dim": 15}, ["head_dim"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"sliding_window": 128}, ["sliding_window"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling.rope_type", "yarn", "llama3"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters.factor"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["rope_parameters.low_freq_factor"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"eos_token_id": -1}, ["eos_token_id"]),
    ],
)
def test_refused_fields(fields: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        read_model_config(write(tmp_path, **fields), FAMILIES)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_window_beyond_the_context_or_switched_off_is_none(tmp_path: Path) -> None:
    read_model_config(write(tmp_path, sliding_window=512), FAMILIES)
    read_model_config(write(tmp_path, sliding_window=128, use_sliding_window=False), FAMILIES)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read_model_config(tmp_path / "nowhere", FAMILIES)
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_model_config(tmp_path, FAMILIES)
    for content in (b'{"architectures": [', b"[1]", b"\xff\xfe", b""):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelError, match=r"config\.json"):
            read_model_config(tmp_path, FAMILIES)
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        read_model_config(tmp_path, FAMILIES)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"device": "meta"}, "device 'meta'.*cpu, cuda"),
        ({"device": "cuda:64"}, "device 'cuda:64'"),
        ({"block_size": 24}, "block_size"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": None, "kv_cache_bytes": 100}, "kv_cache_bytes"),
        ({"max_model_len": -1}, "max_model_len"),
        ({"num_blocks": 1 << 45}, "cannot allocate"),
    ],
)
def test_refused_settings(settings: dict[str, Any], words: str, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=words):
        load(tiny_llama, **settings)


@pytest.mark.parametrize(
    ("settings", "num_blocks", "max_model_len"),
    [
        ({"num_blocks": 96}, 96, 96 * 16),
        ({"num_blocks": 200}, 200, 2048),
        ({"num_blocks": 200, "max_model_len": 100}, 200, 100),
        ({"num_blocks": 200, "max_model_len": 9999}, 200, 2048),
        ({"kv_cache_bytes": 3 * 8192 + 5}, 3, 48),
        ({"kv_cache_bytes": 3 * 8192 + 5, "dtype": "bfloat16"}, 6, 96),
    ],
)
def test_sizes_of_the_pool(settings: dict[str, Any], num_blocks: int, max_model_len: int, tiny_llama: Path) -> None:
    """A block is 2 layers x (k, v) x 16 tokens x 2 heads x 16 elements: 8192 bytes in fp32."""
    model = build_runner(EngineConfig(model_dir=str(tiny_llama), **{"dtype": "float32", **settings}))
    assert (model.num_blocks, model.max_model_len) == (num_blocks, max_model_len)
    assert tuple(model.runner.kv_pool.shape) == (num_blocks, 2, 2, 16, 2, 16)
    assert not model.runner.kv_pool.any()
    assert (model.vocab_size, model.eos_token_ids) == (300, (2,))
