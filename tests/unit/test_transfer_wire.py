"""What two workers settle on before KV goes from one to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from twostroke_engine.kv.spec import KVSpec, LayerGroup
from twostroke_engine.model.config import ModelError
from twostroke_engine.transfer.wire import (
    WIRE_DTYPES,
    CannotPair,
    KVSide,
    WireFormat,
    check_wire,
    check_wish,
    choose_wire,
)
from twostroke_engine.weights.fingerprint import tokenizer_hash

SIDE = KVSide(
    kv_fingerprint="k",
    model_fingerprint="m",
    tokenizer_hash="t",
    block_size=16,
    kv_dtype="bfloat16",
    transfer_dtype="auto",
    wire_dtypes=WIRE_DTYPES,
)


def settled(sender: dict[str, Any], receiver: dict[str, Any], head_dim: int = 128) -> tuple[int, str]:
    wire = choose_wire(replace(SIDE, **sender), replace(SIDE, **receiver), head_dim)
    check_wire(wire, replace(SIDE, **sender))
    check_wire(wire, replace(SIDE, **receiver))
    return wire.block_size, wire.dtype


@pytest.mark.parametrize(
    ("sender", "receiver", "size"), [(16, 16, 16), (16, 64, 16), (64, 16, 16), (64, 64, 64), (96, 64, 32)]
)
def test_the_block_size_is_the_largest_that_divides_both(sender: int, receiver: int, size: int) -> None:
    assert settled({"block_size": sender}, {"block_size": receiver}) == (size, "bfloat16")


@pytest.mark.parametrize(
    ("sender", "receiver", "dtype"),
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),  # the receiver would round it there anyway
        ("bfloat16", "float32", "bfloat16"),  # exact
        ("float32", "float16", "float16"),
        ("bfloat16", "float16", "bfloat16"),
        ("float16", "bfloat16", "float16"),
    ],
)
def test_unless_asked_nothing_is_lost_that_the_receiver_could_store(sender: str, receiver: str, dtype: str) -> None:
    assert settled({"kv_dtype": sender}, {"kv_dtype": receiver}) == (16, dtype)


@pytest.mark.parametrize(
    ("sender", "receiver", "dtype"),
    [
        ("fp8", "auto", "float8_e4m3fn"),
        ("int8", "auto", "int8"),
        ("auto", "int8", "int8"),
        ("fp8", "int8", "float8_e4m3fn"),
    ],
)
def test_a_wish_is_granted_and_the_senders_first(sender: str, receiver: str, dtype: str) -> None:
    assert settled({"transfer_dtype": sender}, {"transfer_dtype": receiver}) == (16, dtype)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"kv_fingerprint": "other"}, "different shapes"),
        ({"model_fingerprint": "other"}, "models differ"),
        ({"tokenizer_hash": ""}, "tokenizers differ"),
        ({"block_size": -16}, "-16 tokens"),
        ({"block_size": 8}, "8 tokens"),
        ({"transfer_dtype": "int8", "wire_dtypes": ("bfloat16",)}, "cannot convert 'int8'"),
        ({"wire_dtypes": ()}, "cannot convert 'bfloat16'"),
        ({"kv_dtype": "float4"}, "cannot convert 'float4'"),
    ],
)
def test_an_impossible_pair_is_refused_whichever_side_is_the_other(other: dict[str, Any], reason: str) -> None:
    for sender, receiver in ((other, {}), ({}, other)):
        with pytest.raises(CannotPair, match=reason):
            settled(sender, receiver)


def test_a_head_must_be_whole_words() -> None:
    with pytest.raises(CannotPair, match="heads of 6 numbers"):
        settled({"transfer_dtype": "int8"}, {}, head_dim=6)
    spec = KVSpec(block_size=16, dtype="float32", groups=(LayerGroup(num_layers=1, num_kv_heads=1, head_dim=6),))
    check_wish("auto", spec)
    with pytest.raises(ModelError, match="heads of 6 numbers"):
        check_wish("int8", spec)


@pytest.mark.parametrize("wire", [WireFormat(64, "bfloat16"), WireFormat(0, "bfloat16"), WireFormat(16, "int3")])
def test_a_sender_takes_no_choice_that_it_cannot_make(wire: WireFormat) -> None:
    with pytest.raises(CannotPair):
        check_wire(wire, SIDE)


def test_one_byte_formats_halve_what_travels() -> None:
    assert WireFormat(16, "bfloat16").layer_block_bytes(8, 128) == 2 * 16 * 8 * 256
    assert WireFormat(16, "int8").layer_block_bytes(8, 128) == 2 * 16 * 8 * (128 + 4)


def test_a_tokenizer_hash_is_of_the_file(tmp_path: Path) -> None:
    assert tokenizer_hash(tmp_path) == ""
    (tmp_path / "tokenizer.json").write_text("{}")
    one = tokenizer_hash(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert len(one) == 32
    assert tokenizer_hash(tmp_path) not in ("", one)


def test_a_fingerprint_is_of_what_cannot_be_converted() -> None:
    group = LayerGroup(num_layers=2, num_kv_heads=2, head_dim=64)
    spec = KVSpec(block_size=16, dtype="bfloat16", groups=(group,))
    same = KVSpec(block_size=64, dtype="float32", groups=(group,))
    assert spec.fingerprint() == same.fingerprint()
    for change in ({"num_layers": 3}, {"num_kv_heads": 1}, {"head_dim": 128}, {"window": 4096}):
        assert replace(spec, groups=(replace(group, **change),)).fingerprint() != spec.fingerprint()
