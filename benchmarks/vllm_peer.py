"""vLLM on the same work, in a process of its own: it would keep most of the card's memory for as long as it lives.

    python -m benchmarks.vllm_peer --model DIR CASE ...     # JSON lines on stdout: first its start, then the cases

`benchmarks.engine` starts it. The process reads a config.json and draws its weights (`load_format="dummy"`), prompts
are token ids, and nothing of it asks for a network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT
from benchmarks.workload import DTYPES, Figure, Prompts, Work, measure, plain_name

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
FIRST_TOKEN = "first token"
KILL_AFTER_S = 30.0
"""It has said everything by then."""


class PeerFailed(RuntimeError):
    """vLLM's process ended before its last case; what it said is on stderr."""


@dataclass(frozen=True)
class PeerOptions:
    """How vLLM is set up: as our engine is."""

    folder: Path
    dtype: str
    max_model_len: int
    max_step_tokens: int
    max_running: int
    gpu_memory_fraction: float
    repeat: int
    path: Path | None = None
    """Folder to import vLLM from; None: it is installed."""

    def command(self, cases: Sequence[str]) -> list[str]:
        """Of the process that measures `cases`."""
        argv = ["--model", str(self.folder), "--dtype", self.dtype, "--repeat", str(self.repeat)]
        argv += ["--max-model-len", str(self.max_model_len), "--max-step-tokens", str(self.max_step_tokens)]
        argv += ["--max-running", str(self.max_running), "--gpu-memory-fraction", str(self.gpu_memory_fraction)]
        return [sys.executable, "-m", "benchmarks.vllm_peer", *argv, *cases]

    def environment(self) -> dict[str, str]:
        """Its packages first for this process alone: ours must not meet them."""
        return peer_environment(os.environ, self.path)


def peer_environment(environment: Mapping[str, str], path: Path | None) -> dict[str, str]:
    """What any vLLM process needs: no network, and of added packages only its own."""
    return {**environment, **OFFLINE, **({"PYTHONPATH": str(path)} if path else {})}


def peer_figures(options: PeerOptions, cases: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    """The peer's figure of each case as it comes, after `start/cold`: from the start of its process to a first token.

    Raises:
        PeerFailed: there is no more to come.
    """
    began_s = time.perf_counter()
    process = subprocess.Popen(
        options.command(cases), cwd=ROOT, env=options.environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        num_told = 0
        for line in process.stdout:
            told = _told(line)
            if told is None:
                continue
            if told["case"] == FIRST_TOKEN:
                yield "start/cold", Figure(round(time.perf_counter() - began_s, 2), "s")
                continue
            num_told += 1
            yield told["case"], Figure(told["value"], told["unit"])
            if num_told == len(cases):
                break
        if num_told < len(cases):
            raise PeerFailed(f"vLLM ended after {num_told} of {len(cases)} cases, status {process.wait()}")
    finally:
        _end(process)


def _told(line: str) -> dict[str, Any] | None:
    """A line of ours among what vLLM and its libraries print."""
    with suppress(ValueError):
        content = json.loads(line)
        if isinstance(content, dict) and "case" in content:
            return content
    return None


def _end(process: subprocess.Popen[str]) -> None:
    """Waits until it is gone, so that its memory is free; a shutdown that hangs is cut short."""
    try:
        process.wait(KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class VllmBench:
    """An engine of vLLM in this process."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        vllm = import_module("vllm")
        self._make_sampling = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=arguments.model,
            skip_tokenizer_init=True,
            load_format="dummy",
            generation_config="vllm",
            dtype=DTYPES[arguments.dtype],
            max_model_len=arguments.max_model_len,
            max_num_batched_tokens=arguments.max_step_tokens,
            max_num_seqs=arguments.max_running,
            gpu_memory_utilization=arguments.gpu_memory_fraction,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self._prompts = Prompts(json.loads((Path(arguments.model) / "config.json").read_text())["vocab_size"])

    def seconds(self, work: Work) -> float:
        """See `Bench.seconds`; text is not asked for."""
        prompts = [{"prompt_token_ids": self._prompts.draw(work.prompt_len)} for _ in range(work.num_requests)]
        sampling = self._make_sampling(temperature=0.0, max_tokens=work.max_tokens, ignore_eos=True, detokenize=False)
        began_s = time.perf_counter()
        outputs = self._engine.generate(prompts, sampling, use_tqdm=False)
        took_s = time.perf_counter() - began_s
        lengths = {len(output.outputs[0].token_ids) for output in outputs}
        if lengths != {work.max_tokens}:
            raise RuntimeError(f"vLLM answered with {sorted(lengths)} tokens instead of {work.max_tokens}")
        return took_s


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_peer", description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with a config.json")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--max-step-tokens", type=int, default=8192)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--gpu-memory-fraction", type=float, default=0.9)
    parser.add_argument("--repeat", type=int, default=3, help="the median of so many")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the cases, one JSON line each."""
    arguments = parse(argv)
    bench = VllmBench(arguments)
    bench.seconds(Work(1, 16, 1))
    print(json.dumps({"case": FIRST_TOKEN}), flush=True)
    for case in arguments.cases:
        figure = measure(case, bench, arguments.repeat)
        print(json.dumps({"case": plain_name(case), "value": figure.value, "unit": figure.unit}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
