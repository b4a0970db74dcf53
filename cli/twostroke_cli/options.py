"""The options of the `twostroke` command: type, name and help of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_HTTP = "127.0.0.1:8000"
DEFAULT_GRPC = "127.0.0.1:8001"

Http = Annotated[str, typer.Option(metavar="HOST:PORT", help="The router's HTTP address.")]
Model = Annotated[
    str,
    typer.Option(metavar="NAME|DIR|ORG/NAME[@REV]", help="A known name, a HuggingFace folder, or a model of the hub."),
]
Prefill = Annotated[int, typer.Option(min=0, metavar="N", help="Prefill workers; 0 is the colocated mode.")]
Decode = Annotated[int, typer.Option(min=1, metavar="M", help="Decode workers.")]
Grpc = Annotated[str, typer.Option(metavar="HOST:PORT", help="The router's gRPC address.")]
RunDirectory = Annotated[Path, typer.Option(metavar="DIR", help="Logs, cluster.json and server data of this run.")]
Etcd = Annotated[str, typer.Option(metavar="URL", help="An etcd that runs already; otherwise one is started.")]
Redis = Annotated[str, typer.Option(metavar="URL", help="A Redis that runs already; otherwise one is started.")]
Cluster = Annotated[str, typer.Option(metavar="NAME", help="Keeps clusters apart that share an etcd or a Redis.")]
Wait = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="How long each part waits for the others at the start.")
]
Grace = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="How long running requests may take to end after Ctrl-C.")
]
NoRestart = Annotated[bool, typer.Option("--no-restart", help="Leave a process that dies dead.")]
Device = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the model runs.")]
Dtype = Annotated[str, typer.Option(metavar="bfloat16|float32", help="Number format of the model.")]
Threads = Annotated[
    int, typer.Option(min=0, metavar="N", help="CPU threads of each worker; 0: its share of the cores.")
]
LoadFormat = Annotated[
    str, typer.Option(metavar="safetensors|random", help="random: draw weights; config.json and tokenizer suffice.")
]
BlockSize = Annotated[int | None, typer.Option(metavar="TOKENS", help="Tokens in a KV block, a multiple of 16.")]
NumBlocks = Annotated[int | None, typer.Option(metavar="N", help="KV blocks of each worker.")]
KVCacheBytes = Annotated[
    int | None, typer.Option("--kv-cache-bytes", metavar="BYTES", help="KV memory of each worker.")
]
GpuMemoryFraction = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Share of the GPU's memory that each worker fills, KV cache included."),
]
MaxModelLen = Annotated[int | None, typer.Option(metavar="TOKENS", help="Most tokens of a request.")]
MaxStepTokens = Annotated[int | None, typer.Option(metavar="TOKENS", help="Token budget of an engine step.")]
MaxRunning = Annotated[int | None, typer.Option(metavar="N", help="Most sequences in a batch.")]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant", help="A request's tokens do not depend on other requests, nor on how its prompt was cut."
    ),
]
Channels = Annotated[
    str,
    typer.Option(
        metavar="NAMES", help="KV channels, best first: shm,collective,tcp is the default on CPUs; also nixl, cuda_ipc."
    ),
]
TransferLayers = Annotated[int | None, typer.Option(metavar="N", help="Layers in one segment of a KV transfer.")]
TransferDtype = Annotated[
    str | None, typer.Option(metavar="auto|fp8|int8", help="Number format of KV on the wire; fp8 and int8 are lossy.")
]
TransferTimeout = Annotated[
    float | None,
    typer.Option(
        "--transfer-timeout-s", metavar="SECONDS", help="A KV channel operation that takes longer ends the pair."
    ),
]
Placement = Annotated[
    str, typer.Option(metavar="POLICY", help="How the router places requests: cost, conditional, round-robin, ...")
]
ApiKeys = Annotated[
    Path | None, typer.Option("--api-keys-file", metavar="FILE", help="One API key a line; clients then must send one.")
]
MaxBody = Annotated[int | None, typer.Option("--max-body-bytes", metavar="BYTES", help="Largest HTTP request body.")]
LogLevel = Annotated[str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")]
LogFormat = Annotated[str, typer.Option(metavar="text|json", help="Log lines of the services.")]
OtlpEndpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="An OTLP receiver for spans and metrics of every service.")
]
OtlpProtocol = Annotated[str | None, typer.Option(metavar="grpc|http/protobuf", help="What the receiver speaks.")]
TraceSample = Annotated[
    float | None, typer.Option(min=0, max=1, metavar="RATIO", help="Share of traces that are sent.")
]
System = Annotated[str, typer.Option(metavar="TEXT", help="A system message.")]
Temperature = Annotated[
    float | None, typer.Option(min=0, metavar="T", help="0 is greedy; the server's default otherwise.")
]
MaxTokens = Annotated[int | None, typer.Option(min=1, metavar="N", help="Most tokens of an answer.")]
