"""Control messages of a KV transfer, the engine's twins of transfer.proto's (same names, same fields). Torch-free.

Services carry them between workers; `KVSender` and `KVReceiver` make and read them. `peer` names the pair's control
stream as the local service knows it.
"""

from __future__ import annotations

import msgspec


class KVDestination(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prefill worker puts a prompt's KV: a lease granted by a decode worker."""

    worker_id: str
    endpoint: str
    """HOST:PORT of the decode worker's Transfer service."""
    lease_id: str
    epoch: int
    kv_fingerprint: str
    ttl_s: float
    """Timed by decode alone, from the grant."""


class PairHello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """Identity and abilities of a sender; the first message of a pair's stream."""

    version: int
    worker_id: str
    worker_epoch: int
    kv_fingerprint: str
    model_fingerprint: str
    pair_id: str
    channels: tuple[str, ...]
    """Abilities, best first; see `transfer/channel.py`."""
    tokenizer_hash: str
    block_size: int
    kv_dtype: str
    transfer_dtype: str
    wire_dtypes: tuple[str, ...]
    """These and the fingerprints: see `KVSide`."""


class OpenTransfer(msgspec.Struct, frozen=True, kw_only=True, tag="open"):
    """Asks for the blocks of a lease."""

    lease_id: str
    epoch: int
    request_id: str
    num_tokens: int


class SegmentReady(msgspec.Struct, frozen=True, kw_only=True, tag="segment"):
    """Announces one channel message: layers x blocks of one lease, `[block, layer, k|v, token, head, dim]`, where a
    block is the wire's (`PairWelcome`), counted from the prompt's first token."""

    lease_id: str
    epoch: int
    number: int
    first_layer: int
    num_layers: int
    first_block: int
    num_blocks: int
    num_bytes: int
    digests: tuple[int, ...]
    """One per block, unsigned 64-bit, over the block's bytes of these layers as they travel."""


class FirstToken(msgspec.Struct, frozen=True, array_like=True):
    """A choice's first token; `finished` choices need no decode."""

    choice: int
    token_id: int
    finished: bool = False


class CommitTransfer(msgspec.Struct, frozen=True, kw_only=True, tag="commit"):
    """Every segment was sent; here are the first tokens."""

    lease_id: str
    epoch: int
    num_segments: int
    first: tuple[FirstToken, ...]


class AbortTransfer(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """The sender will not touch the lease's blocks any more."""

    lease_id: str
    epoch: int
    reason: str = ""


class PairWelcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """Accepts a pair, or says in `refused` why not."""

    refused: str = ""
    worker_id: str = ""
    worker_epoch: int = 0
    channel: str = ""
    """`scheme://...`, for this pair; the scheme is the one that was agreed on."""
    block_size: int = 0
    """Tokens in a block on the wire."""
    wire_dtype: str = ""
    """Number format on the wire."""
    pair_id: str = ""
    """Of the greeting that it answers, however late."""


class TransferOpened(msgspec.Struct, frozen=True, kw_only=True, tag="opened"):
    """The lease's blocks are bound; the first `num_held_blocks` on the wire need not be sent."""

    lease_id: str
    epoch: int
    num_held_blocks: int


class SegmentResult(msgspec.Struct, frozen=True, kw_only=True, tag="result"):
    """What became of a segment; not accepted means: send it again."""

    lease_id: str
    epoch: int
    number: int
    accepted: bool


class TransferClosed(msgspec.Struct, frozen=True, kw_only=True, tag="closed"):
    """The receiver closed the lease: READY if `error` is empty."""

    lease_id: str
    epoch: int
    error: str = ""


SenderMessage = PairHello | OpenTransfer | SegmentReady | CommitTransfer | AbortTransfer
ReceiverMessage = PairWelcome | TransferOpened | SegmentResult | TransferClosed
