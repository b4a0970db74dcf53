"""Tuned configs: what a card's file says is used, and nothing else changes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from twostroke_kernels.gpu import small_linear, tuned
from twostroke_kernels.gpu.gemv import GemvConfig
from twostroke_kernels.gpu.skinny import SkinnyConfig
from twostroke_kernels.gpu.small_linear import config_for, config_of, linear_config
from twostroke_kernels.gpu.tuned import Choice, Product, card_name, choices_of, tuned_choice

from benchmarks import tune
from benchmarks.workload import LLAMA_8B
from tests.support.triton_device import DEVICE

ENTRY = {"operation": "linear", "rows": 4, "width_out": 96, "width_in": 64, "dtype": "bfloat16"}
SKINNY = {"outputs": 32, "inputs": 64, "num_warps": 4, "num_stages": 2, "weight_left": True, "tma": False}


def write(folder: Path, *entries: dict[str, object]) -> str:
    """A file for a card of its own: what was read of a file is remembered."""
    card = folder.name
    (folder / f"{card}.json").write_text(json.dumps({"card": card, "choices": entries}))
    return card


def test_rows_go_up_to_the_next_measured_number(tmp_path: Path) -> None:
    card = write(tmp_path, {**ENTRY, "config": SKINNY}, {**ENTRY, "rows": 8, "config": None})

    def found(rows: int) -> Choice | None:
        return tuned_choice(card, Product("linear", rows, 96, 64, "bfloat16"), tmp_path)

    assert found(3) == found(4) == Choice(SKINNY)
    assert found(5) == found(8) == Choice(None)
    assert found(2) is None
    assert found(9) is None


def test_a_key_is_the_whole_shape(tmp_path: Path) -> None:
    card = write(tmp_path, {**ENTRY, "config": SKINNY})
    for other in (
        Product("gated_linear", 4, 96, 64, "bfloat16"),
        Product("linear", 4, 97, 64, "bfloat16"),
        Product("linear", 4, 96, 65, "bfloat16"),
        Product("linear", 4, 96, 64, "float16"),
    ):
        assert tuned_choice(card, other, tmp_path) is None


def test_a_card_without_a_file_has_the_defaults(tmp_path: Path) -> None:
    assert choices_of("NVIDIA_Nothing_9000", tmp_path) == {}
    assert choices_of("", tmp_path) == {}
    assert card_name(torch.device("cpu")) == ""
    x, weight = torch.zeros(16, 4096, dtype=torch.bfloat16), torch.empty(28672, 4096, dtype=torch.bfloat16)
    assert config_for(x, weight) == linear_config(16, 28672, 4096, torch.bfloat16)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"choices": [{"rows": 1}]}')
    with pytest.raises(ValueError, match=r"broken\.json is not a file of tuned configs"):
        choices_of("broken", tmp_path)


def test_config_for_takes_the_files_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = write(
        tmp_path,
        {**ENTRY, "config": SKINNY},
        {**ENTRY, "rows": 16, "config": None},
        {**ENTRY, "rows": 1, "operation": "gated_linear", "config": {"outputs": 2, "inputs": 64, "num_warps": 8}},
    )
    monkeypatch.setattr(small_linear, "card_name", lambda device: card)
    monkeypatch.setattr(tuned.tuned_choice, "__defaults__", (tmp_path,))
    small_linear._config_on.cache_clear()
    weight = torch.empty(96, 64, dtype=torch.bfloat16)
    try:
        assert config_for(torch.empty(3, 64, dtype=torch.bfloat16), weight) == SkinnyConfig(**SKINNY)
        assert config_for(torch.empty(16, 64, dtype=torch.bfloat16), weight) is None
        assert config_for(torch.empty(1, 64, dtype=torch.bfloat16), weight, gated=True) == GemvConfig(2, 64, 8)
        assert config_for(torch.empty(1, 64, dtype=torch.bfloat16), weight) == linear_config(1, 96, 64, torch.bfloat16)
    finally:
        small_linear._config_on.cache_clear()


def test_files_that_ship_can_be_read() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        choices = choices_of(path.stem)
        assert choices
        for product, choice in choices.items():
            assert product.operation in ("linear", "gated_linear")
            if choice.config is not None:
                assert isinstance(config_of(choice.config), GemvConfig if product.num_rows == 1 else SkinnyConfig)


def test_new_entries_replace_old_ones_of_their_key(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    other = {**ENTRY, "rows": 16, "config": None}
    path.write_text(json.dumps({"choices": [{**ENTRY, "config": None}, other]}))
    content = tune.merged(path, [{**ENTRY, "config": SKINNY}], "card")
    assert content["choices"] == [{**ENTRY, "config": SKINNY}, other]
    assert content["card"] == "card"
    assert tune.merged(tmp_path / "none.json", [other], "card")["choices"] == [other]


def test_roles_and_candidates_cover_the_model() -> None:
    roles = {role.name: role for role in tune.roles_of(LLAMA_8B)}
    assert (roles["qkv"].width_out, roles["down"].width_in, roles["head"].width_out) == (6144, 14336, 128256)
    assert roles["gate_up"].operation == "gated_linear"
    for rows in tune.ROWS:
        for role in roles.values():
            found = list(tune.candidates(rows, role))
            assert len(set(found)) == len(found) > 1
            assert [config_of(json.loads(json.dumps(asdict(config)))) for config in found] == found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "head"])
def test_a_candidate_is_checked_and_repeated(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "REPEATS", 2)
    monkeypatch.setattr(tune, "MIN_WEIGHT_BYTES", 1)
    model = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    role = next(role for role in tune.roles_of({**model, "head_dim": 32, "vocab_size": 96}) if role.name == name)
    work = tune.Operands(role, rows, DEVICE, torch.float16)
    config = GemvConfig(1, 64) if rows == 1 else config_of(SKINNY)
    work.check(config)
    assert work.repeats(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--out", str(tmp_path / "x.json")]) == 1
    assert "there is none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
