"""The engine alone against the table of performance targets: no router, no sockets, random weights, random prompts.

    python -m benchmarks.engine --device cuda                     # every case, the shape of Llama-3.1-8B
    python -m benchmarks.engine --device cuda --engine both       # vLLM first, then ours, and the ratios
    python -m benchmarks.engine --device cuda 'decode/*' --repeat 1
    python -m benchmarks.engine --tiny                            # any machine, in seconds: does it still run?

Cases are described in `benchmarks.workload`, beside these two: `start/cold` and `start/warm`, the time from a process's
start to its first token, with an empty kernel cache and with the one that this left.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.engine import Engine
from twostroke_engine.process import freeze_heap
from twostroke_engine.request import Request, SamplingParams
from twostroke_engine.runner.model_runner import build_runner

from benchmarks.ceilings import measured_ceilings
from benchmarks.record import ROOT, Measurement, append
from benchmarks.targets import Ceilings, ModelCost, limit_ms, standing
from benchmarks.vllm_peer import PeerFailed, PeerOptions, peer_figures
from benchmarks.workload import (
    CASES,
    DTYPES,
    LLAMA_8B,
    STARTS,
    TINY,
    TINY_CASES,
    Figure,
    Prompts,
    Work,
    chosen_cases,
    dtype_of,
    measure,
    plain_name,
)

RESULTS = ROOT / "benchmarks" / "results" / "engine.jsonl"
PEER = "vLLM"
PLAIN = "twostroke"
INVARIANT = "twostroke --batch-invariant"


class EngineBench:
    """Our engine in this process, and a source of prompts that it has not seen."""

    def __init__(self, config: EngineConfig) -> None:
        model = build_runner(config, compiles_ahead=True)
        self._engine = Engine(config, model.spec, model.num_blocks, model.runner, (), time.monotonic)
        self._prompts = Prompts(model.vocab_size)
        self._num_requests = 0
        freeze_heap()  # as an engine's process does

    def seconds(self, work: Work) -> float:
        """See `Bench.seconds`."""
        requests = [self._request(work) for _ in range(work.num_requests)]
        began_s = time.perf_counter()
        for request in requests:
            self._engine.submit(request)
        num_ended = 0
        while num_ended < len(requests):
            self._engine.step()
            ends = [update.end for update in self._engine.take_updates() if update.end is not None]
            for end in ends:
                if end.error is not None:
                    raise RuntimeError(end.message)
            num_ended += len(ends)
            self._engine.take_block_events()
        return time.perf_counter() - began_s

    def _request(self, work: Work) -> Request:
        self._num_requests += 1
        tokens = tuple(self._prompts.draw(work.prompt_len))
        sampling = SamplingParams(temperature=0.0, max_tokens=work.max_tokens, ignore_eos=True)
        return Request(id=f"bench-{self._num_requests}", token_ids=tokens, sampling=sampling)


def start_seconds(argv: Sequence[str], kernel_cache: Path) -> float:
    """From the start of a process that loads everything to its first token."""
    command = [sys.executable, "-m", "benchmarks.engine", *argv, "--first-token"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(kernel_cache)}
    began_s = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began_s


def start_figures(cases: Sequence[str], argv: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    """`start/warm` needs what `start/cold` compiles, so the cold start always runs."""
    if not cases:
        return
    with tempfile.TemporaryDirectory() as folder:
        for case in STARTS:
            took_s = start_seconds(argv, Path(folder))
            if case in cases:
                yield case, Figure(round(took_s, 2), "s")


def engine_config(
    arguments: argparse.Namespace, folder: Path, dtype: str, batch_invariant: bool = False
) -> EngineConfig:
    """A worker's defaults for the device, but no more positions than the cases need."""
    on_gpu = arguments.device.startswith("cuda")
    return EngineConfig(
        model_dir=str(folder),
        device=arguments.device,
        dtype=DTYPES[dtype],
        load_format="random",
        block_size=64 if on_gpu else 16,
        max_model_len=256 if arguments.tiny else 16384,
        max_step_tokens=8192 if on_gpu else 512,
        max_running=256 if on_gpu else 64,
        gpu_memory_fraction=arguments.gpu_memory_fraction,
        batch_invariant=batch_invariant,
    )


def our_figures(
    arguments: argparse.Namespace, folder: Path, cases: Sequence[str], batch_invariant: bool = False
) -> Iterator[tuple[str, Figure]]:
    """Our figure of each stepped case; an engine lives as long as cases of its number format last."""
    for dtype in dict.fromkeys(map(dtype_of, cases)):
        bench = EngineBench(engine_config(arguments, folder, dtype, batch_invariant))
        for case in (case for case in cases if dtype_of(case) == dtype):
            yield plain_name(case), measure(case, bench, arguments.repeat)
        del bench
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def vllm_figures(arguments: argparse.Namespace, folder: Path, cases: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    """vLLM's figure of each stepped case, and of its start; set up as our engine is."""
    for dtype in dict.fromkeys(map(dtype_of, cases)):
        config = engine_config(arguments, folder, dtype)
        options = PeerOptions(
            folder=folder,
            dtype=dtype,
            max_model_len=config.max_model_len or 0,
            max_step_tokens=config.max_step_tokens,
            max_running=config.max_running,
            gpu_memory_fraction=config.gpu_memory_fraction,
            repeat=arguments.repeat,
            path=arguments.vllm_path.resolve() if arguments.vllm_path else None,
        )
        yield from peer_figures(options, [case for case in cases if dtype_of(case) == dtype])


class Report:
    """Prints each figure as it comes and appends it to the results: a run that is cut off keeps what it has."""

    def __init__(self, arguments: argparse.Namespace, ceilings: Ceilings | None) -> None:
        self._results: Path = arguments.results
        self._device: str = arguments.device
        self._cost = ModelCost.of(TINY if arguments.tiny else LLAMA_8B)
        self._ceilings = ceilings
        self._peer: dict[str, float] = {}
        self._ours: dict[str, float] = {}
        if ceilings is not None:
            copy, matmul = ceilings.copy_bytes_s / 1e12, ceilings.matmul_flops_s / 1e12
            print(f"ceilings of this run: copy {copy:.3f} TB/s, bfloat16 product {matmul:.0f} TFLOP/s", flush=True)

    def peer(self, case: str, figure: Figure) -> None:
        """vLLM's figure, kept for the line of ours."""
        self._peer[case] = figure.value
        self._tell(Measurement(case, figure.value, figure.unit, engine=PEER))

    def ours(self, case: str, figure: Figure) -> None:
        """Our figure, beside the peer's if there is one."""
        peer_value = self._peer.get(case)
        self._ours[case] = figure.value
        self._tell(Measurement(case, figure.value, figure.unit, PEER if peer_value else None, peer_value))

    def invariant(self, case: str, figure: Figure) -> None:
        """Our figure in batch-invariant mode, beside that of the plain mode."""
        plain = self._ours.get(case)
        self._tell(Measurement(case, figure.value, figure.unit, PLAIN if plain else None, plain, engine=INVARIANT))

    def _tell(self, measurement: Measurement) -> None:
        limit = None if self._ceilings is None else limit_ms(measurement.case, self._cost, self._ceilings)
        if limit is not None:
            measurement = replace(measurement, share_of_limit=round(limit / measurement.value, 4))
        print(line_of(measurement, limit), flush=True)
        append(measurement, self._results, self._device)


def line_of(measurement: Measurement, limit: float | None) -> str:
    """A measurement in words: milliseconds, share of the limit, ratio to the peer."""
    words = f"{measurement.case:29} {measurement.engine:9} {measurement.value:10.3f} {measurement.unit:15}"
    if limit is not None:
        words += f" limit {limit:8.3f} ({limit / measurement.value:6.1%})"
    if measurement.peer == PLAIN and measurement.peer_value:
        words += f"  {measurement.value / measurement.peer_value:.3f} of the plain mode ({measurement.peer_value:.3f})"
    elif measurement.peer_value is not None:
        place = standing(measurement.case, measurement.value, measurement.unit, measurement.peer_value)
        words += f"  {measurement.peer} {measurement.peer_value:.3f}, ours {place}"
    return words.rstrip()


def run(arguments: argparse.Namespace, folder: Path, cases: Sequence[str]) -> None:
    """Starts first, then vLLM in its process, then ours in this one: no two share the device's memory."""
    ceilings = measured_ceilings(torch.device(arguments.device)) if arguments.device.startswith("cuda") else None
    report = Report(arguments, ceilings)
    argv = ["--device", arguments.device, "--gpu-memory-fraction", str(arguments.gpu_memory_fraction)]
    argv += ["--tiny"] if arguments.tiny else []
    starts = [case for case in cases if case in STARTS]
    stepped = [case for case in cases if case not in STARTS]
    if arguments.engine != "twostroke":
        for case, figure in vllm_figures(arguments, folder, stepped):
            report.peer(case, figure)
    if arguments.engine != "vllm":
        for case, figure in start_figures(starts, argv):
            report.ours(case, figure)
        for case, figure in our_figures(arguments, folder, stepped):
            report.ours(case, figure)
        for case, figure in our_figures(arguments, folder, stepped if arguments.batch_invariant else (), True):
            report.invariant(case, figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.split("\n")[0])
    parser.add_argument(
        "cases", nargs="*", default=["*"], metavar="CASE", help="names or patterns (default: all); NAME@N: N repeats"
    )
    parser.add_argument("--engine", default="twostroke", choices=("twostroke", "vllm", "both"))
    parser.add_argument("--vllm-path", type=Path, metavar="DIR", help="folder to import vLLM from, if not installed")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="then our batch-invariant mode, beside the plain"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and small cases")
    parser.add_argument("--repeat", type=int, default=3, help="the median of so many")
    parser.add_argument("--gpu-memory-fraction", type=float, default=0.9)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to")
    parser.add_argument("--first-token", action="store_true", help="load, generate one token, and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chosen cases, prints each and appends it to the results; status 1 if the peer cannot run."""
    arguments = parse(argv)
    known = TINY_CASES if arguments.tiny else CASES
    chosen = chosen_cases(known, arguments.cases)
    if not chosen:
        print(f"no case matches {' '.join(arguments.cases)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(TINY if arguments.tiny else LLAMA_8B), encoding="utf-8")
        if arguments.first_token:
            EngineBench(engine_config(arguments, folder, "bf16")).seconds(Work(1, 16, 1))
            return 0
        try:
            run(arguments, folder, chosen)
        except PeerFailed as error:
            print(f"engine: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
