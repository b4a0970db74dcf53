"""Block hashes: equal on router and workers, whatever the block size. Torch-free.

A hash names a prefix, not a block's own tokens: it is BLAKE2b-128 over the parent's hash and 16 tokens, keyed by the
cache salt. Chaining over units of 16 tokens makes block sizes 16 and 64 agree: a block of 64 is named by its last unit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b

HASH_UNIT_TOKENS = 16
HASH_BYTES = 16

BlockHash = bytes
"""16 bytes that name a prefix of tokens."""

_UNIT = struct.Struct(f"<{HASH_UNIT_TOKENS}I")


def root_hash(cache_salt: bytes = b"", adapter: str = "") -> BlockHash:
    """The parent of a first unit: what must differ for two requests never to share KV."""
    key = blake2b(cache_salt, digest_size=32).digest()
    return blake2b(b"root\0" + adapter.encode(), key=key, digest_size=HASH_BYTES).digest()


def extend_hash(parent: BlockHash, unit: Sequence[int]) -> BlockHash:
    """The hash of `parent`'s prefix followed by one unit of 16 token ids."""
    return blake2b(parent + _UNIT.pack(*unit), digest_size=HASH_BYTES).digest()


def chain(parent: BlockHash, token_ids: Sequence[int], block_size: int) -> Iterator[BlockHash]:
    """Hashes of the full blocks of `token_ids`, continuing after `parent`.

    Args:
        parent: `root_hash(...)`, or the hash of the block before the first token.
        token_ids: tokens; a last, partial block has no hash.
        block_size: tokens in a block, a multiple of 16.

    Raises:
        ValueError: `block_size` is not a positive multiple of 16.
    """
    if block_size <= 0 or block_size % HASH_UNIT_TOKENS:
        raise ValueError(f"block_size must be a positive multiple of {HASH_UNIT_TOKENS}, not {block_size}")
    for start in range(0, len(token_ids) - len(token_ids) % block_size, block_size):
        for unit in range(start, start + block_size, HASH_UNIT_TOKENS):
            parent = extend_hash(parent, token_ids[unit : unit + HASH_UNIT_TOKENS])
        yield parent


def block_hashes(
    token_ids: Sequence[int], block_size: int, cache_salt: bytes = b"", adapter: str = ""
) -> list[BlockHash]:
    """Hashes of the full blocks of a prompt, first block first."""
    return list(chain(root_hash(cache_salt, adapter), token_ids, block_size))
