"""Single kernels: time, rate, and share of what the card can do, measured in the same run.

    python -m benchmarks.kernels --device cuda                          # every case, shapes of Llama-3.1-8B
    python -m benchmarks.kernels --device cuda 'attention/*' 'sampling/*'
    python -m benchmarks.kernels --tiny                                 # any machine, in seconds

A kernel is checked on the data of its case before it is timed; one that is wrong is reported and not timed. On a GPU
times are of a CUDA graph, so without the host. Rates count the bytes and operations that must be, not those that are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from twostroke_kernels.backend import Backend
from twostroke_kernels.choice import choose_backend

from benchmarks.ceilings import measured_ceilings
from benchmarks.kernel_attention import DECODE, LLAMA_HEADS, PREFILL, TINY_ATTENTION, TINY_HEADS, attention_case
from benchmarks.kernel_case import KernelCase, WrongResult, seconds_a_call
from benchmarks.kernel_dense import LINEAR, LLAMA_DENSE, POINTWISE, TINY_DENSE, TINY_DENSE_SHAPE, dense_case
from benchmarks.kernel_sampling import SAMPLING, TINY_SAMPLING, TINY_VOCAB, VOCAB, sampling_case
from benchmarks.record import ROOT, Measurement, append
from benchmarks.targets import Ceilings

RESULTS = ROOT / "benchmarks" / "results" / "kernels.jsonl"
CASES = (*PREFILL, *DECODE, *LINEAR, *POINTWISE, *SAMPLING)
TINY_CASES = (*TINY_ATTENTION, *TINY_DENSE, *TINY_SAMPLING)


def build(name: str, backend: Backend, tiny: bool) -> KernelCase:
    """The case that a name says."""
    if name.startswith("attention/"):
        return attention_case(name, backend, TINY_HEADS if tiny else LLAMA_HEADS)
    if name.startswith("sampling/"):
        return sampling_case(name, backend, TINY_VOCAB if tiny else VOCAB)
    return dense_case(name, backend, TINY_DENSE_SHAPE if tiny else LLAMA_DENSE)


@torch.inference_mode()
def measure(case: KernelCase, device: torch.device, ceilings: Ceilings | None) -> Measurement:
    """Checks a case, then times it and its peer.

    Raises:
        WrongResult: it is not timed.
    """
    case.check()
    took_s = seconds_a_call(case.calls, device)
    peer_s = seconds_a_call(case.peer_calls, device) if case.peer_calls else None
    measurement = Measurement(case.name, round(1e6 * took_s, 2), "us")
    if peer_s is not None:
        measurement = replace(measurement, peer=case.peer, peer_value=round(1e6 * peer_s, 2))
    if ceilings is not None:
        measurement = replace(measurement, share_of_limit=round(case.limit_s(ceilings) / took_s, 4))
    return measurement


def line_of(case: KernelCase, measurement: Measurement) -> str:
    """Time, rates, share of the limit, and how much faster than the peer."""
    seconds = measurement.value / 1e6
    words = f"{measurement.case:36} {measurement.value:10.2f} us {case.bytes / seconds / 1e9:7.0f} GB/s"
    words += f" {case.flops / seconds / 1e12:6.1f} TFLOP/s" if case.flops else " " * 15
    if measurement.share_of_limit is not None:
        words += f" {measurement.share_of_limit:6.1%} of the limit"
    if measurement.peer_value is not None:
        words += f"  {measurement.peer_value / measurement.value:.3f} x {measurement.peer} ({measurement.peer_value})"
    return words


def run(arguments: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Each case, printed and appended as it comes; the names of those that failed."""
    device = torch.device(arguments.device)
    ceilings = measured_ceilings(device) if device.type == "cuda" else None
    if ceilings is not None:
        copy, matmul = ceilings.copy_bytes_s / 1e12, ceilings.matmul_flops_s / 1e12
        print(f"ceilings of this run: copy {copy:.3f} TB/s, bfloat16 product {matmul:.0f} TFLOP/s", flush=True)
    backend, failed = choose_backend(device), []
    for name in names:
        torch.manual_seed(0)
        try:
            case = build(name, backend, arguments.tiny)
            measurement = measure(case, device, ceilings)
        except (WrongResult, RuntimeError, ValueError) as error:
            failed.append(name)
            print(f"{name:36} failed: {' '.join(str(error).split())[:200]}", flush=True)
            continue
        print(line_of(case, measurement), flush=True)
        append(measurement, arguments.results, arguments.device)
    return failed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", default=["*"], metavar="CASE", help="names or patterns (default: all)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen cases; status 1 if one was wrong or failed."""
    arguments = parse(argv)
    known = TINY_CASES if arguments.tiny else CASES
    chosen = [case for case in known if any(fnmatchcase(case, pattern) for pattern in arguments.cases)]
    if not chosen:
        print(f"no case matches {' '.join(arguments.cases)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    return 1 if run(arguments, chosen) else 0


if __name__ == "__main__":
    raise SystemExit(main())
