"""The shape of the KV cache, as both ends of a transfer must agree on it. Torch-free.

KV memory is block-major: `[block, layer, k|v, token, kv_head, head_dim]`. One block with all its layers is one
contiguous region, and one layer of a block one piece of it.
"""

from __future__ import annotations

from hashlib import blake2b

import msgspec

PROTOCOL_VERSION = 3
"""Of KV transfers between workers: messages, order on the wire, conversions and digests."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class LayerGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers whose KV has one shape."""

    kind: str = "full"
    """What attention reads: `full` is every earlier token."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    """Tokens a layer looks back, None for all."""


class KVSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Block size, number format and layers of a KV cache."""

    block_size: int
    """Tokens in a block."""
    dtype: str
    """Name of a torch dtype, a key of `DTYPE_BYTES`."""
    groups: tuple[LayerGroup, ...]

    @property
    def num_layers(self) -> int:
        """Layers of all groups."""
        return sum(group.num_layers for group in self.groups)

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one layer of one block (every group must have the same shape so far)."""
        first = self.groups[0]
        return 2 * self.block_size * first.num_kv_heads * first.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self.layer_block_bytes * self.num_layers

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def fingerprint(self) -> str:
        """Equal if and only if KV of one cache can be used in the other, converted on the way if need be.

        So it is of the layers alone: block sizes and number formats are settled at a pair's handshake. It differs
        between versions of the transfer protocol, so that workers of two are never chosen for each other.
        """
        return blake2b(msgspec.msgpack.encode((PROTOCOL_VERSION, self.groups)), digest_size=8).hexdigest()
