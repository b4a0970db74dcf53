"""`WireFormat`: how KV travels between two caches that need not store it alike. Chosen at the handshake. Torch-free.

What travels is items of one block size, layer by layer in a cache's own order; the sender makes them of its blocks and
the receiver makes its blocks of them. Each side converts between its own number format and the wire's.
"""

from __future__ import annotations

from math import gcd

import msgspec

from twostroke_engine.kv.hashing import HASH_UNIT_TOKENS
from twostroke_engine.kv.spec import DTYPE_BYTES, KVSpec
from twostroke_engine.model.config import ModelError

AUTO = "auto"
"""As a wish: nothing is lost but what the receiver's own format cannot hold."""
LOSSY_DTYPES = {"fp8": "float8_e4m3fn", "int8": "int8"}
"""Wire formats that the user must ask for: one byte for a number, and a float32 scale for each head of a token."""
WIRE_DTYPES = (*DTYPE_BYTES, *LOSSY_DTYPES.values())
"""What this version can make and read."""

_SCALE_BYTES = 4
_WORD_BYTES = 4


class CannotPair(Exception):
    """Two workers cannot hand KV over; the message says why."""


class WireFormat(msgspec.Struct, frozen=True):
    """What both sides of a pair have settled on."""

    block_size: int
    """Tokens in an item."""
    dtype: str
    """Name of a torch dtype, one of `WIRE_DTYPES`."""

    def num_blocks(self, num_tokens: int) -> int:
        """Items that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one head of one token."""
        if self.dtype in DTYPE_BYTES:
            return head_dim * DTYPE_BYTES[self.dtype]
        return head_dim + _SCALE_BYTES

    def layer_block_bytes(self, num_heads: int, head_dim: int) -> int:
        """Bytes of one layer of one item."""
        return 2 * self.block_size * num_heads * self.row_bytes(head_dim)


class KVSide(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker is and can do, as far as the other must know; told in `PairHello`, field by field."""

    kv_fingerprint: str
    model_fingerprint: str
    tokenizer_hash: str
    """Of tokenizer.json; empty if the worker has none."""
    block_size: int
    kv_dtype: str
    transfer_dtype: str
    """The user's wish: `auto` or a key of `LOSSY_DTYPES`."""
    wire_dtypes: tuple[str, ...]
    """Formats that it can make and read."""


def choose_wire(sender: KVSide, receiver: KVSide, head_dim: int) -> WireFormat:
    """Settles how KV travels from one to the other.

    The block size is the largest that divides both. The number format is what the sender's user asked for, else what
    the receiver's did, else the narrower of what both store, and the sender's of two as narrow.

    Raises:
        CannotPair: there is no way.
    """
    for ours, theirs, reason in (
        (sender.kv_fingerprint, receiver.kv_fingerprint, "the KV caches have different shapes"),
        (sender.model_fingerprint, receiver.model_fingerprint, "the models differ"),
        (sender.tokenizer_hash, receiver.tokenizer_hash, "the tokenizers differ"),
    ):
        if ours != theirs:
            raise CannotPair(reason)
    for side in (sender, receiver):
        if side.block_size < 1 or side.block_size % HASH_UNIT_TOKENS:
            raise CannotPair(f"KV blocks of {side.block_size} tokens; there must be a multiple of {HASH_UNIT_TOKENS}")
    wire = WireFormat(gcd(sender.block_size, receiver.block_size), _wire_dtype(sender, receiver))
    if wire.row_bytes(head_dim) % _WORD_BYTES:
        raise CannotPair(f"heads of {head_dim} numbers cannot travel as {wire.dtype}")
    return wire


def check_wire(wire: WireFormat, own: KVSide) -> None:
    """The sender's look at what the receiver chose.

    Raises:
        CannotPair: it cannot be made of this side's blocks.
    """
    if wire.block_size < 1 or own.block_size % wire.block_size:
        raise CannotPair(f"items of {wire.block_size} tokens do not fill blocks of {own.block_size}")
    if wire.dtype not in own.wire_dtypes:
        raise CannotPair(f"this worker cannot send {wire.dtype!r}")


def check_wish(transfer_dtype: str, spec: KVSpec) -> None:
    """A look at a user's wish before any peer comes.

    Raises:
        ModelError: this model's KV cannot travel so.
    """
    head_dim = spec.groups[0].head_dim
    if transfer_dtype != AUTO and head_dim % _WORD_BYTES:
        raise ModelError(
            f"transfer_dtype {transfer_dtype}: heads of {head_dim} numbers, not a multiple of {_WORD_BYTES}"
        )


def own_format(spec: KVSpec) -> WireFormat:
    """Blocks as they are stored."""
    return WireFormat(spec.block_size, spec.dtype)


def _wire_dtype(sender: KVSide, receiver: KVSide) -> str:
    wishes = [side.transfer_dtype for side in (sender, receiver) if side.transfer_dtype != AUTO]
    if wishes:
        wanted = LOSSY_DTYPES.get(wishes[0], wishes[0])
    else:
        stored = (sender.kv_dtype, receiver.kv_dtype)
        wanted = min(stored, key=lambda dtype: DTYPE_BYTES.get(dtype, 0))
    for name, side in (("sender", sender), ("receiver", receiver)):
        if wanted not in side.wire_dtypes:
            raise CannotPair(f"no common number format: the {name} cannot convert {wanted!r}")
    return wanted
