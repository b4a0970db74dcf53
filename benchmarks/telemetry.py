"""What telemetry costs: `python -m benchmarks.telemetry`.

Two clusters with a small model run side by side, one with OTLP export of every span and metric, one without. Rounds of
equal requests go to them in turns, so that whatever else the machine does hits both. A receiver in this process takes
what is sent without looking at it. Two ratios, on to off: requests per second (medians of rounds), and CPU seconds per
request of the cluster's own processes, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from twostroke_cli.bench import servers

from benchmarks import record
from benchmarks.model_folder import write_model_folder

RESULTS = Path(__file__).parent / "results" / "telemetry.jsonl"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
MODEL = "small"


@dataclass
class Side:
    """One of the two clusters, and what its rounds gave."""

    name: str
    url: str
    run_dir: Path
    per_second: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def processes(self) -> list[psutil.Process]:
        """Router, workers and engines."""
        listed = json.loads((self.run_dir / "cluster.json").read_text())["processes"]
        ours = [psutil.Process(each["pid"]) for each in listed if each["role"] in ("router", "prefill", "decode")]
        return [process for parent in ours for process in (parent, *parent.children(recursive=True))]


class _Receiver(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Answers every export with an empty message, which means that all of it was taken."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler:
        """The same for every method."""
        return grpc.unary_unary_rpc_method_handler(self._take)

    def _take(self, request: bytes, context: Any) -> bytes:
        self.num_bytes += len(request)
        return b""


@contextmanager
def receiving() -> Iterator[tuple[str, _Receiver]]:
    """A receiver's URL while the block runs."""
    server, receiver = grpc.server(ThreadPoolExecutor(2)), _Receiver()
    server.add_generic_rpc_handlers((receiver,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", receiver
    finally:
        server.stop(0)


@contextmanager
def cluster(name: str, model: Path, folder: Path, flags: list[str]) -> Iterator[Side]:
    """`twostroke up` with one prefill and one decode worker."""
    folder.mkdir()
    words = ["--model", str(model), "--load-format", "random", "--threads", "1", "--log-level", "warning", *flags]
    server = servers.our_server(shlex.join(words), folder)
    with servers.running(server, 120):
        yield Side(name, server.url, folder / "run")


async def drive(side: Side, num_requests: int, concurrency: int, max_tokens: int) -> None:
    """One round: requests in a closed loop."""
    body = {"model": MODEL, "prompt": [5] * 32, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    left = iter(range(num_requests))
    processes = side.processes()
    async with httpx.AsyncClient(trust_env=False, timeout=120) as http:

        async def client() -> None:
            for _ in left:
                (await http.post(f"{side.url}/completions", json=body)).raise_for_status()

        before_s, begun = _cpu_s(processes), time.monotonic()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        side.per_second.append(num_requests / (time.monotonic() - begun))
        side.cpu_s.append((_cpu_s(processes) - before_s) / num_requests)


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(float(times.user + times.system) for times in (process.cpu_times() for process in processes))


def measure(flags: argparse.Namespace) -> tuple[Side, Side, int]:
    """Both sides after all rounds, and how many bytes were exported."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = write_model_folder(folder / MODEL, CONFIG)
        url, receiver = stack.enter_context(receiving())
        off = stack.enter_context(cluster("off", model, folder / "off", []))
        on = stack.enter_context(cluster("on", model, folder / "on", ["--otlp-endpoint", url]))
        for number in range(flags.rounds + 1):
            for side in (on, off) if number % 2 else (off, on):
                asyncio.run(drive(side, flags.requests, flags.concurrency, flags.max_tokens))
        for side in (on, off):  # the first round warms up
            del side.per_second[0], side.cpu_s[0]
        return on, off, receiver.num_bytes


def main() -> int:
    """Prints and appends both ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--requests", type=int, default=40, help="in a round")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS)
    flags = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    on, off, num_bytes = measure(flags)
    print(f"{num_bytes} bytes exported")
    for what, unit, on_values, off_values in (
        ("throughput", "requests/s", on.per_second, off.per_second),
        ("cpu", "CPU s/request", on.cpu_s, off.cpu_s),
    ):
        with_it, without = statistics.median(on_values), statistics.median(off_values)
        print(f"{what:10} on {with_it:.5g}, off {without:.5g} {unit}: ratio {with_it / without:.3f}")
        record.append(
            record.Measurement(f"telemetry/{what}", round(with_it, 6), unit, "telemetry off", round(without, 6)),
            flags.results,
            "cpu",
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
