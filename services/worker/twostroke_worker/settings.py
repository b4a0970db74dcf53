"""What a worker can be told: the same for both roles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from twostroke_chassis.rpc import reachable_endpoint
from twostroke_chassis.settings import HostPort, ServiceSettings, split_host_port
from twostroke_engine.config import EngineConfig

_BLOCK_SIZES = {"cpu": 16, "cuda": 64}
_STEP_TOKENS = {"cpu": 512, "cuda": 8192}
_RUNNING = {"cpu": 64, "cuda": 256}
_CHANNELS = ("cuda_ipc", "shm", "nixl", "collective", "tcp")


def _check_channels(value: str) -> str:
    names = value.split(",") if value else []
    if unknown := [name for name in names if name not in _CHANNELS]:
        raise ValueError(f"expected some of {','.join(_CHANNELS)}, got {unknown[0]!r}")
    return value


ChannelNames = Annotated[str, AfterValidator(_check_channels)]
"""Names of KV channels, separated by commas."""


class WorkerSettings(ServiceSettings):
    """Flags of `python -m twostroke_prefill` and `python -m twostroke_decode`."""

    model_dir: Path = Field(description="HuggingFace folder: config.json, *.safetensors")
    model_name: str = Field("", description="name that clients ask for (default: the folder's name)")
    listen: HostPort = Field("127.0.0.1:0", description="address of the gRPC server; port 0 takes a free one")
    metrics: HostPort | None = Field(
        None, description="where to serve /metrics over HTTP; port 0 takes a free one (default: nowhere)"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the model runs")
    dtype: Literal["bfloat16", "float32", "float16"] = Field("bfloat16", description="number format of the model")
    load_format: Literal["safetensors", "random"] = Field(
        "safetensors", description="random: draw weights from a fixed seed; config.json is all that is read"
    )
    block_size: int | None = Field(
        None, ge=16, multiple_of=16, description="tokens in a KV block (default: 16 on a CPU, 64 on a GPU)"
    )
    num_blocks: int | None = Field(None, ge=1, description="KV blocks (default: as many as --kv-cache-bytes holds)")
    kv_cache_bytes: int | None = Field(
        None,
        ge=1,
        description="bytes of KV cache, unless --num-blocks is given (default: 1 GiB on a CPU, --gpu-memory-fraction "
        "on a GPU)",
    )
    gpu_memory_fraction: float = Field(
        0.9, gt=0, le=1, description="share of the GPU's memory for weights, activations and KV cache together"
    )
    max_model_len: int | None = Field(None, ge=1, description="most tokens of a request (default: the model's limit)")
    max_step_tokens: int | None = Field(
        None, ge=1, description="token budget of an engine step (default: 512 on a CPU, 8192 on a GPU)"
    )
    max_running: int | None = Field(
        None, ge=1, description="most sequences in a batch (default: 64 on a CPU, 256 on a GPU)"
    )
    batch_invariant: bool = Field(
        False, description="a request's tokens do not depend on other requests, nor on how its prompt was cut; slower"
    )
    threads: int = Field(1, ge=1, description="CPU threads of the engine")
    transfer_layers: int = Field(1, ge=1, description="layers sent in one segment of a KV transfer")
    transfer_dtype: Literal["auto", "fp8", "int8"] = Field(
        "auto",
        description="number format of KV on the wire; fp8 and int8 halve its bytes and round it; auto keeps what both "
        "sides can store; the prefill worker's wish counts first",
    )
    channels: ChannelNames = Field(
        "",
        description="KV channels to use, best first, separated by commas: cuda_ipc, shm, nixl, collective, tcp "
        "(default: all that are worth it on the device and the system); the decode worker's order counts",
    )
    transfer_timeout_s: float = Field(
        10, gt=0, allow_inf_nan=False, description="a KV channel operation that takes longer ends the pair"
    )
    grace: float = Field(30, ge=0, allow_inf_nan=False, description="seconds for running requests to end after SIGTERM")
    resume_grace: float = Field(
        10, ge=0, allow_inf_nan=False, description="seconds that a disconnected router's requests are kept"
    )

    @property
    def advertised_host(self) -> str:
        """The host under which peers reach this worker."""
        return split_host_port(reachable_endpoint(self.listen))[0]

    @property
    def served_name(self) -> str:
        """The model's name in the cluster."""
        return self.model_name or self.model_dir.resolve().name

    def engine_config(self, epoch: int, *, sends_kv: bool, receives_kv: bool) -> EngineConfig:
        """The engine's share of the settings."""
        return EngineConfig(
            model_dir=str(self.model_dir),
            device=self.device,
            dtype=self.dtype,
            load_format=self.load_format,
            block_size=self.block_size or _BLOCK_SIZES[self.device],
            num_blocks=self.num_blocks,
            kv_cache_bytes=self.kv_cache_bytes,
            gpu_memory_fraction=self.gpu_memory_fraction,
            max_model_len=self.max_model_len,
            max_step_tokens=self.max_step_tokens or _STEP_TOKENS[self.device],
            max_running=self.max_running or _RUNNING[self.device],
            batch_invariant=self.batch_invariant,
            num_threads=self.threads,
            worker_id=self.id,
            worker_epoch=epoch,
            transfer_host=self.advertised_host,
            channels=tuple(filter(None, self.channels.split(","))),
            transfer_timeout_s=self.transfer_timeout_s,
            transfer_layers=self.transfer_layers,
            transfer_dtype=self.transfer_dtype,
            sends_kv=sends_kv,
            receives_kv=receives_kv,
        )
