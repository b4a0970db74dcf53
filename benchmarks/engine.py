"""The engine alone against the table of performance targets: no router, no sockets, random weights, random prompts.

    python -m benchmarks.engine --device cuda                     # every case, the shape of Llama-3.1-8B
    python -m benchmarks.engine --device cuda 'decode/*' --repeat 1
    python -m benchmarks.engine --tiny                            # any machine, in seconds: does it still run?

A case's name says what it does: `decode/bf16/b64/c1024` is the time of a decode step at batch 64 behind prompts of 1024
tokens, (time for 129 tokens - time for 1) / 128; `prefill/bf16/1x8192` the time to the first token of one prompt;
`throughput/bf16/512x512+256` output tokens per second of 512 requests at once; `start/cold` and `start/warm` the time
from a process's start to its first token, with an empty kernel cache and with the one that this left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from twostroke_engine.config import EngineConfig
from twostroke_engine.engine import Engine
from twostroke_engine.request import Request, SamplingParams
from twostroke_engine.runner.model_runner import build_runner

from benchmarks.record import ROOT, Measurement, append

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TINY = LLAMA_8B | {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
CASES = (
    *(f"decode/bf16/b{batch}/c1024" for batch in (1, 8, 32, 64, 128, 256)),
    "decode/bf16/b16/c8192",
    "prefill/bf16/1x8192",
    "prefill/bf16/8x1024",
    "prefill/bf16/1x1024",
    "prefill/bf16/1x128",
    "throughput/bf16/512x512+256",
    "start/cold",
    "start/warm",
)
TINY_CASES = ("decode/bf16/b2/c40", "prefill/bf16/2x24", "throughput/bf16/4x20+5", "start/cold", "start/warm")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DECODE_TOKENS = 128
"""Steps that a decode case spreads its time over."""
RESULTS = ROOT / "benchmarks" / "results" / "engine.jsonl"


@dataclass(frozen=True)
class Work:
    """Requests of one size, all at once."""

    num_requests: int
    prompt_len: int
    max_tokens: int


class EngineBench:
    """An engine in this process, and a source of prompts that it has not seen."""

    def __init__(self, config: EngineConfig) -> None:
        model = build_runner(config)
        self._engine = Engine(config, model.spec, model.num_blocks, model.runner, (), time.monotonic)
        self._vocab_size = model.vocab_size
        self._random = random.Random(0)
        self._num_requests = 0

    def seconds(self, work: Work) -> float:
        """From the first submission to the last token."""
        requests = [self._request(work) for _ in range(work.num_requests)]
        began_s = time.perf_counter()
        for request in requests:
            self._engine.submit(request)
        num_ended = 0
        while num_ended < len(requests):
            self._engine.step()
            ends = [update.end for update in self._engine.take_updates() if update.end is not None]
            failed = [end.message for end in ends if end.error is not None]
            if failed:
                raise RuntimeError(failed[0])
            num_ended += len(ends)
            self._engine.take_block_events()
        return time.perf_counter() - began_s

    def best_seconds(self, work: Work, repeat: int) -> float:
        """The least of several; prompts are new each time, so nothing is a cache hit."""
        return min(self.seconds(work) for _ in range(repeat))

    def _request(self, work: Work) -> Request:
        self._num_requests += 1
        tokens = tuple(self._random.randrange(self._vocab_size) for _ in range(work.prompt_len))
        sampling = SamplingParams(temperature=0.0, max_tokens=work.max_tokens, ignore_eos=True)
        return Request(id=f"bench-{self._num_requests}", token_ids=tokens, sampling=sampling)


def measure(case: str, bench: EngineBench, repeat: int) -> Measurement:
    """Runs a case that its name describes, short cases once before they count.

    Raises:
        ValueError: it describes none.
    """
    if match := re.fullmatch(r"decode/\w+/b(\d+)/c(\d+)", case):
        batch, context = map(int, match.groups())
        bench.seconds(Work(batch, context, 2))
        whole = bench.best_seconds(Work(batch, context, 1 + DECODE_TOKENS), repeat)
        first = bench.best_seconds(Work(batch, context, 1), repeat)
        return Measurement(case, round(1000 * (whole - first) / DECODE_TOKENS, 4), "ms/step")
    if match := re.fullmatch(r"prefill/\w+/(\d+)x(\d+)", case):
        batch, length = map(int, match.groups())
        bench.seconds(Work(batch, length, 1))
        return Measurement(case, round(1000 * bench.best_seconds(Work(batch, length, 1), repeat), 3), "ms")
    if match := re.fullmatch(r"throughput/\w+/(\d+)x(\d+)\+(\d+)", case):
        work = Work(*map(int, match.groups()))
        tokens = work.num_requests * work.max_tokens
        return Measurement(case, round(tokens / bench.best_seconds(work, repeat), 1), "output tokens/s")
    raise ValueError(f"no such case: {case}")


def start_seconds(argv: Sequence[str], kernel_cache: Path) -> float:
    """From the start of a process that loads everything to its first token."""
    command = [sys.executable, "-m", "benchmarks.engine", *argv, "--first-token"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(kernel_cache)}
    began_s = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began_s


def start_measurements(cases: Sequence[str], argv: Sequence[str]) -> Iterator[Measurement]:
    """`start/warm` needs what `start/cold` compiles, so the cold start always runs."""
    if not cases:
        return
    with tempfile.TemporaryDirectory() as folder:
        for case in ("start/cold", "start/warm"):
            took_s = start_seconds(argv, Path(folder))
            if case in cases:
                yield Measurement(case, round(took_s, 2), "s")


def engine_config(arguments: argparse.Namespace, folder: Path, dtype: str) -> EngineConfig:
    """A worker's defaults for the device, but no more positions than the cases need."""
    on_gpu = arguments.device.startswith("cuda")
    return EngineConfig(
        model_dir=str(folder),
        device=arguments.device,
        dtype=DTYPES[dtype],
        load_format="random",
        block_size=64 if on_gpu else 16,
        max_model_len=128 if arguments.tiny else 16384,
        max_step_tokens=8192 if on_gpu else 512,
        max_running=256 if on_gpu else 64,
        gpu_memory_fraction=arguments.gpu_memory_fraction,
    )


def run(arguments: argparse.Namespace, folder: Path, cases: Sequence[str]) -> Iterator[Measurement]:
    """The start cases first: no other process then holds the device's memory."""
    argv = ["--device", arguments.device, "--gpu-memory-fraction", str(arguments.gpu_memory_fraction)]
    argv += ["--tiny"] if arguments.tiny else []
    yield from start_measurements([case for case in cases if case.startswith("start/")], argv)
    stepped = [case for case in cases if not case.startswith("start/")]
    for dtype in dict.fromkeys(case.split("/")[1] for case in stepped):
        bench = EngineBench(engine_config(arguments, folder, dtype))
        for case in (case for case in stepped if case.split("/")[1] == dtype):
            yield measure(case, bench, arguments.repeat)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", default=["*"], metavar="CASE", help="names or patterns (default: all)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and small cases")
    parser.add_argument("--repeat", type=int, default=2, help="the best of so many")
    parser.add_argument("--gpu-memory-fraction", type=float, default=0.9)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to")
    parser.add_argument("--first-token", action="store_true", help="load, generate one token, and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chosen cases, prints each and appends it to the results."""
    arguments = parse(argv)
    known = TINY_CASES if arguments.tiny else CASES
    chosen = [case for case in known if any(fnmatchcase(case, pattern) for pattern in arguments.cases)]
    if not chosen:
        print(f"no case matches {' '.join(arguments.cases)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(TINY if arguments.tiny else LLAMA_8B), encoding="utf-8")
        if arguments.first_token:
            EngineBench(engine_config(arguments, folder, "bf16")).seconds(Work(1, 16, 1))
            return 0
        for measurement in run(arguments, folder, chosen):
            print(f"{measurement.case:32} {measurement.value:10} {measurement.unit}", flush=True)
            append(measurement, arguments.results, arguments.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
