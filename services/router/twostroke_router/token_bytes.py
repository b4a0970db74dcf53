"""The bytes behind a token, as logprobs report them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable bytes stand for themselves, the others follow from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if not decoder:
        return set()
    inner = [_decoder_kinds(part) for part in decoder.get("decoders", ())]
    return {str(decoder.get("type"))}.union(*inner)


def _byte_level(piece: str, alphabet: dict[str, int]) -> bytes:
    return b"".join(bytes([alphabet[char]]) if char in alphabet else char.encode() for char in piece)


def _plain(piece: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes.fromhex(byte.group(1)) if byte else piece.replace("\u2581", " ").encode()


def token_bytes_of(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """The function from a token id to its bytes; ids beyond the vocabulary have none."""
    is_byte_level = "ByteLevel" in _decoder_kinds(json.loads(tokenizer.to_str()).get("decoder"))
    added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    alphabet = _byte_level_alphabet()

    def to_bytes(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id].encode()
        piece = tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        return _byte_level(piece, alphabet) if is_byte_level else _plain(piece)

    return to_bytes
