"""How an engine is set up. Frozen, validated once; passed to the engine's process as its first message. Torch-free."""

from __future__ import annotations

from typing import Literal

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine must know before it starts."""

    model_dir: str
    """A HuggingFace folder: config.json, *.safetensors, generation_config.json (optional)."""
    device: str = "cpu"
    dtype: str = "bfloat16"
    """`bfloat16` or `float32` (also `float16` on GPUs)."""
    block_size: int = 16
    """Tokens in a KV block, a multiple of 16."""
    load_format: Literal["safetensors", "random"] = "safetensors"
    """`random`: config.json alone is read, and weights are drawn from a fixed seed on the device."""
    num_blocks: int | None = None
    """KV blocks; None: what `kv_cache_bytes` holds."""
    kv_cache_bytes: int | None = None
    """None: 1 GiB on a CPU; on a GPU what a profile run leaves of `gpu_memory_fraction`."""
    gpu_memory_fraction: float = 0.9
    """Share of a GPU's memory for weights, activations and KV together; captured graphs take some more."""
    max_model_len: int | None = None
    """Most tokens of a request; None: the model's own limit. Never more than the pool holds."""
    max_step_tokens: int = 512
    """Token budget of a step: decode tokens first, then prompt chunks."""
    max_running: int = 64
    """Most sequences in a batch."""
    batch_invariant: bool = False
    """A request's tokens do not depend on what else is in a batch, nor on how its prompt was cut; slower."""
    num_threads: int = 1
    """Torch threads on a CPU."""
    worker_id: str = "engine"
    worker_epoch: int = 0
    """Differs for each process."""
    transfer_host: str = "127.0.0.1"
    """Address at which channels listen, reachable by the peers."""
    channels: tuple[str, ...] = ()
    """KV channels to use, best first; empty: all that the device and the system can do."""
    transfer_timeout_s: float = 10.0
    """A channel operation that takes longer aborts the pair."""
    transfer_layers: int = 1
    """Layers sent in one segment."""
    transfer_dtype: Literal["auto", "fp8", "int8"] = "auto"
    """Number format of KV on the wire; `auto` loses nothing that the receiver's own format could hold."""
    sends_kv: bool = False
    """Has a `KVSender` (prefill workers)."""
    receives_kv: bool = False
    """Has a `KVReceiver` (decode workers)."""
