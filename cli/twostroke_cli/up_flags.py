"""The flags of `twostroke up`, and which of them go to which processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twostroke_cli import options as opt
from twostroke_cli.options import DEFAULT_GRPC, DEFAULT_HTTP, DEFAULT_MODEL


@dataclass(frozen=True)
class UpFlags:
    """What the command line says. None, False and empty texts: left to the services."""

    model: opt.Model = DEFAULT_MODEL
    prefill: opt.Prefill = 1
    decode: opt.Decode = 1
    http: opt.Http = DEFAULT_HTTP
    grpc: opt.Grpc = DEFAULT_GRPC
    run_dir: opt.RunDirectory = Path(".run")
    etcd: opt.Etcd = ""
    redis: opt.Redis = ""
    cluster: opt.Cluster = "default"
    wait: opt.Wait = 60.0
    grace: opt.Grace = 30.0
    no_restart: opt.NoRestart = False
    device: opt.Device = "cpu"
    dtype: opt.Dtype = "bfloat16"
    threads: opt.Threads = 0
    load_format: opt.LoadFormat = "safetensors"
    block_size: opt.BlockSize = None
    num_blocks: opt.NumBlocks = None
    kv_cache_bytes: opt.KVCacheBytes = None
    gpu_memory_fraction: opt.GpuMemoryFraction = None
    max_model_len: opt.MaxModelLen = None
    max_step_tokens: opt.MaxStepTokens = None
    max_running: opt.MaxRunning = None
    batch_invariant: opt.BatchInvariant = False
    channels: opt.Channels = ""
    transfer_layers: opt.TransferLayers = None
    transfer_dtype: opt.TransferDtype = None
    transfer_timeout_s: opt.TransferTimeout = None
    placement: opt.Placement = ""
    api_keys_file: opt.ApiKeys = None
    max_body_bytes: opt.MaxBody = None
    log_level: opt.LogLevel = "info"
    log_format: opt.LogFormat = "text"
    otlp_endpoint: opt.OtlpEndpoint = None
    otlp_protocol: opt.OtlpProtocol = None
    trace_sample: opt.TraceSample = None


SERVICE_FLAGS = ("cluster", "log_level", "log_format", "otlp_endpoint", "otlp_protocol", "trace_sample")
"""To the router and to every worker."""
ROUTER_FLAGS = ("placement", "api_keys_file", "max_body_bytes")
WORKER_FLAGS = (
    "device",
    "dtype",
    "load_format",
    "block_size",
    "num_blocks",
    "kv_cache_bytes",
    "gpu_memory_fraction",
    "max_model_len",
    "max_step_tokens",
    "max_running",
    "batch_invariant",
    "channels",
    "transfer_layers",
    "transfer_dtype",
    "transfer_timeout_s",
)


def passed_on(flags: UpFlags, names: Sequence[str]) -> tuple[str, ...]:
    """Some of the flags as a service's command line takes them."""
    return as_words(**{name: getattr(flags, name) for name in names})


def as_words(**values: object) -> tuple[str, ...]:
    """Settings as a service's command line takes them; None, False and empty texts are left to the service."""
    return tuple(
        word
        for name, value in values.items()
        if value is not None and value is not False and value != ""
        for word in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
    )
