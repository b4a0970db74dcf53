"""Incremental detokenization against decoding everything at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from twostroke_router.detokenize import MAX_PENDING_TOKENS, Decode, Detokenizer

TEXTS = ["the quick brown fox 日本語テキスト", "naïve café, 50 €", "🙂🙃 emoji 👩‍👩‍👧 family", "a  b   c\n\n\td"]
SETTINGS = settings(max_examples=150, deadline=None)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2: a leading-space marker, and bytes as tokens."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "▁fox",
        "fox",
        "the",
        "s",
    ]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


def token(tokenizer: Tokenizer, piece: str) -> int:
    token_id = tokenizer.token_to_id(piece)
    assert token_id is not None
    return token_id


def decode_with(tokenizer: Tokenizer) -> Decode:
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def incremental(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(decode_with(tokenizer), prompt or [])
    pieces = [detokenizer.add(token_id) for token_id in ids]
    return [*pieces, detokenizer.flush()]


@SETTINGS
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=80))
def test_random_tokens_give_the_text_of_a_full_decode(ids: list[int]) -> None:
    assert "".join(incremental(BYTE_LEVEL, ids)) == decode_with(BYTE_LEVEL)(ids)


@SETTINGS
@given(st.text(max_size=60))
def test_any_text_comes_back_in_whole_characters(text: str) -> None:
    ids = BYTE_LEVEL.encode(text).ids
    pieces = incremental(BYTE_LEVEL, ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@SETTINGS
@given(st.text(alphabet="the fox🙂€é", max_size=40))
def test_byte_fallback_tokens_come_back_in_whole_characters(text: str) -> None:
    ids = [token(BYTE_FALLBACK, f"<0x{byte:02X}>") for byte in text.encode()]
    assert "".join(incremental(BYTE_FALLBACK, ids)) == decode_with(BYTE_FALLBACK)(ids)


def test_a_continuation_keeps_its_leading_space() -> None:
    the, fox = token(BYTE_FALLBACK, "▁the"), token(BYTE_FALLBACK, "▁fox")
    assert incremental(BYTE_FALLBACK, [fox], prompt=[the]) == [" fox", ""]
    assert incremental(BYTE_FALLBACK, [fox]) == ["fox", ""]


def test_special_tokens_are_left_out() -> None:
    end = token(BYTE_LEVEL, "</s>")
    ids = [*BYTE_LEVEL.encode("fox").ids, end, *BYTE_LEVEL.encode(" fox").ids, end]
    assert "".join(incremental(BYTE_LEVEL, ids)) == "fox fox"


def test_a_split_character_appears_with_its_last_byte() -> None:
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("𝄞")[0][0]
    first, *rest = [token(BYTE_LEVEL, letter) for letter in letters]
    assert len(rest) == 3, "a character of four bytes, each its own token"
    assert incremental(BYTE_LEVEL, [first, *rest]) == ["", "", "", "𝄞", ""]


@pytest.mark.parametrize("piece", ["<0xE2>", "</s>"])
def test_the_window_stays_short_whatever_comes(piece: str) -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_with(BYTE_FALLBACK)(ids)

    detokenizer = Detokenizer(decode)
    ids = [token(BYTE_FALLBACK, piece)] * 1000
    text = "".join(detokenizer.add(token_id) for token_id in ids) + detokenizer.flush()
    assert text == decode_with(BYTE_FALLBACK)(ids)
    assert longest <= 3 * MAX_PENDING_TOKENS
