"""Checkpoints: one file or many, whatever does not fit is named, and a model's fingerprint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from twostroke_engine.model.config import ModelError
from twostroke_engine.weights.checkpoint import INDEX_FILE, Checkpoint

from tests.support.model_oracle import load, logprobs_along, random_tokens
from tests.support.tiny_model import make_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Weights = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "model", "llama")


def change(folder: Path, edit: Callable[[Weights], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as error:
        load(folder)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_sharded_checkpoint_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    sharded = make_tiny(tmp_path / "sharded", "llama", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    tokens = random_tokens(20)
    one, many = (logprobs_along(load(each), tokens, num_prompt=20, chunks=()) for each in (folder, sharded))
    assert torch.equal(one, many)


def test_stored_bf16_runs_in_fp32(tmp_path: Path) -> None:
    """Conversion is exact, so rounding the weights first gives the same model."""
    stored = make_tiny(tmp_path / "bf16", "llama", dtype=torch.bfloat16)
    rounded = make_tiny(tmp_path / "fp32", "llama")
    change(rounded, lambda weights: weights.update({k: v.bfloat16().float() for k, v in weights.items()}))
    tokens = random_tokens(20)
    half, full = (logprobs_along(load(each), tokens, num_prompt=20, chunks=()) for each in (stored, rounded))
    assert torch.equal(half, full)


def test_missing_name(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    refused(change(folder, lambda weights: weights.pop(name)), "lacks", name)


def test_unused_name(folder: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    refused(change(folder, lambda weights: weights.update({name: torch.zeros(1)})), "does not use", name)


def test_many_names_are_counted(folder: Path) -> None:
    def keep_one_layer(weights: Weights) -> None:
        for name in [name for name in weights if "layers.1." in name]:
            del weights[name]

    refused(change(folder, keep_one_layer), "lacks", "and 4 more")


def test_wrong_shape(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    changed = change(folder, lambda weights: weights.update({name: torch.zeros(64, 111)}))
    refused(changed, name, "[64, 111]", "[64, 112]")


def test_wrong_dtype(folder: Path) -> None:
    name = "model.norm.weight"
    refused(change(folder, lambda weights: weights.update({name: torch.ones(64, dtype=torch.int32)})), name, "int32")


def test_what_old_checkpoints_store_is_ignored(tmp_path: Path) -> None:
    """Rotary frequencies, and a copy of a tied head."""
    tied = make_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "lm_head.weight": torch.full((300, 64), float("nan")),
    }
    tokens = random_tokens(5)
    before = logprobs_along(load(tied), tokens, num_prompt=5, chunks=())
    change(tied, lambda weights: weights.update(extra))
    assert torch.equal(logprobs_along(load(tied), tokens, num_prompt=5, chunks=()), before)


def test_missing_and_damaged_files(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"\xff" * 64):
        file.write_bytes(damaged)
        refused(folder, "model.safetensors")
    file.unlink()
    refused(folder, "holds no *.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001.safetensors"}}))
    refused(folder, "model-00001.safetensors")
    (folder / INDEX_FILE).write_text('{"weight_map": 3}')
    refused(folder, INDEX_FILE, "weight_map")


def test_one_name_in_two_files(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, folder / "other.safetensors")
    refused(folder, "model.norm.weight", "other.safetensors")


def test_only_the_slice_is_read(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    expected = load_file(folder / "model.safetensors")[name][3:5, 10:50]
    assert torch.equal(checkpoint[name].read((slice(3, 5), slice(10, 50))), expected)


def test_fingerprint_names_model_and_number_format(folder: Path, tmp_path: Path) -> None:
    def fingerprint(each: Path, **config: object) -> str:
        return load(each, **config).model_fingerprint

    mine = fingerprint(folder)
    assert fingerprint(make_tiny(tmp_path / "again", "llama")) == mine
    assert fingerprint(folder, dtype="bfloat16") != mine
    assert fingerprint(folder, batch_invariant=True) != mine
    assert fingerprint(make_tiny(tmp_path / "tuned", "llama", seed=1)) != mine
    assert fingerprint(make_tiny(tmp_path / "rope", "llama", rms_norm_eps=1e-5)) != mine
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9", "use_cache": False}))
    assert fingerprint(folder) == mine
