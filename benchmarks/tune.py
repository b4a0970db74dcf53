"""Finds the fastest config of each linear layer of few rows on this card, and writes the file that the kernels read.

    python -m benchmarks.tune                                   # the shape of Llama-3.1-8B, bfloat16
    python -m benchmarks.tune --model DIR --out FILE            # another config.json

Every candidate is compiled first, in parallel; then each is checked against float64 and timed in a CUDA graph that
reads other weights in each call. The fastest must give the same bits in 100 runs, or it is dropped for the next one.
The file belongs into `kernels/twostroke_kernels/gpu/tuned/`, named by the card; shapes it already names are kept unless
measured anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from twostroke_kernels.backend import Backend, RowNorm
from twostroke_kernels.gpu import tuned
from twostroke_kernels.gpu.gemv import GemvConfig
from twostroke_kernels.gpu.skinny import SkinnyConfig
from twostroke_kernels.gpu.small_linear import LinearConfig
from twostroke_kernels.reference import ReferenceBackend
from twostroke_kernels.torch_backend import TorchBackend
from twostroke_kernels.triton_backend import TritonBackend

from benchmarks.ceilings import graph_seconds
from benchmarks.kernel_case import WrongResult, require_as_good
from benchmarks.record import commit
from benchmarks.workload import DTYPES, LLAMA_8B

EPS = 1e-5
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
REPEATS = 100
MIN_WEIGHT_BYTES = 400 << 20
"""Of all copies of a weight together: more than the caches hold."""
PROCESSES = 12
SHARED_BYTES = 232448
"""Of a multiprocessor of the largest cards, for one program."""
SKINNY = (
    (32, 256, 4, 4, False),
    (32, 512, 4, 3, False),
    (64, 128, 4, 5, False),
    (64, 128, 4, 5, True),
    (64, 128, 4, 3, True),
    (64, 128, 8, 3, True),
    (64, 256, 4, 4, True),
    (128, 128, 4, 4, True),
    (128, 128, 8, 3, True),
    (128, 128, 8, 2, True),
    (128, 64, 8, 5, True),
)
"""Outputs, inputs, warps, stages, and whether the weight is the left factor."""


@dataclass(frozen=True)
class Role:
    """A layer as the model uses it."""

    name: str
    width_out: int
    width_in: int
    gated: bool = False
    adds: bool = False
    """Into a residual; otherwise the input is normed first."""
    is_wide: bool = False
    """The output is float32."""

    @property
    def operation(self) -> str:
        """As the file names it."""
        return "gated_linear" if self.gated else "linear"


def roles_of(config: dict[str, Any]) -> tuple[Role, ...]:
    """The linear layers of a Llama-shaped model."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return (
        Role("qkv", q + 2 * kv, hidden),
        Role("o", hidden, q, adds=True),
        Role("gate_up", 2 * intermediate, hidden, gated=True),
        Role("down", hidden, intermediate, adds=True),
        Role("head", config["vocab_size"], hidden, is_wide=True),
    )


def candidates(num_rows: int, role: Role) -> Sequence[LinearConfig]:
    """What is worth a try: the forms that won on an H100 at some shape, and their neighbours."""
    if num_rows == 1:
        return [
            GemvConfig(outputs, inputs, warps)
            for outputs, inputs, warps in ((1, 4096, 4), (1, 2048, 4), (2, 2048, 4), (2, 4096, 8), (4, 2048, 4))
            if inputs <= role.width_in
        ]
    found = [
        SkinnyConfig(outputs, inputs, warps, stages, left, tma)
        for outputs, inputs, warps, stages, left in SKINNY
        for tma in (False, True)
        if _staged_bytes(outputs, inputs, stages, num_rows, role.gated) <= SHARED_BYTES
    ]
    narrow = [
        SkinnyConfig(each.outputs, each.inputs, each.num_warps, each.num_stages, True, each.tma, min_rows=8)
        for each in found
        if each.weight_left and num_rows <= 8
    ]
    return found + narrow


def _staged_bytes(outputs: int, inputs: int, stages: int, num_rows: int, gated: bool) -> int:
    """Half-precision tiles of both factors, of all stages; a gated tile of the weight is twice as tall as it says."""
    rows = max(16, 1 << (num_rows - 1).bit_length())
    return 2 * stages * inputs * (rows + outputs * (2 if gated else 1))


@dataclass
class Operands:
    """Random data of one layer, and the ways to compute it."""

    role: Role
    num_rows: int
    device: torch.device
    dtype: torch.dtype
    is_timed: bool = True
    """Over several weights, so that none is read from a cache."""
    weights: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        role = self.role
        copies = max(2, -(-MIN_WEIGHT_BYTES // (2 * role.width_out * role.width_in)))
        self.weights = [
            self._random(role.width_out, role.width_in) * role.width_in**-0.5
            for _ in range(copies if self.is_timed else 1)
        ]
        self.x = self._random(self.num_rows, role.width_in)
        self.norm = RowNorm(1 + 0.1 * self._random(role.width_in), EPS)
        self.before = self._random(self.num_rows, role.width_out // 2 if role.gated else role.width_out)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def result(self, backend: Backend, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """As the model calls it; `out` is what a layer adds to, or where logits go."""
        role = self.role
        if role.adds:
            out = self.start() if out is None else out
            backend.add_linear(out, self.x, weight)
            return out
        if role.gated:
            return backend.norm_gated_linear(self.x, self.norm, weight)
        if role.is_wide:
            return backend.norm_logits(self.x, self.norm, weight, out)
        return backend.norm_linear(self.x, self.norm, weight)

    def ours(self, config: LinearConfig | None, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """By the backend that is measured, with this config for few rows."""
        return self.result(TritonBackend(self.device, lambda x, weight, gated=False: config), weight, out)

    def start(self) -> Tensor:
        """A residual as it is before."""
        return self.before.clone()

    def check(self, config: LinearConfig | None) -> None:
        """Raises `WrongResult` if a config's error is more than twice PyTorch's."""
        weight = self.weights[0]
        exact = self.result(ReferenceBackend(self.device), weight, self.before.double() if self.role.adds else None)
        plain = self.result(TorchBackend(self.device), weight)
        require_as_good(str(config), self.ours(config, weight), exact, plain.to(self.dtype))

    def repeats(self, config: LinearConfig | None) -> bool:
        """Whether the same inputs give the same bits every time."""
        first = self.ours(config, self.weights[0])
        return all(torch.equal(first, self.ours(config, self.weights[0])) for _ in range(REPEATS))

    def seconds(self, config: LinearConfig | None) -> float:
        """A call's share of a graph over all copies of the weight."""
        out = None
        if self.role.adds or self.role.is_wide:
            out = torch.empty_like(self.before, dtype=torch.float32) if self.role.is_wide else self.start()
        backend = TritonBackend(self.device, lambda x, weight, gated=False: config)
        return graph_seconds([partial(self.result, backend, weight, out) for weight in self.weights])


@torch.inference_mode()
def those_that_run(work: Operands, configs: Sequence[LinearConfig]) -> list[LinearConfig]:
    """Runs each once; those that do not fit the card are left out, with the reason."""
    fit = []
    for config in configs:
        try:
            work.ours(config, work.weights[0])
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - Triton, its compiler and the driver raise what they like
            print(f"  {config}: {' '.join(str(error).split())[:120]}", flush=True)
        else:
            fit.append(config)
    return fit


def compile_ahead(arguments: argparse.Namespace, roles: Sequence[Role]) -> None:
    """Fills Triton's cache from several processes: most of a compilation holds Python's lock."""
    jobs = [(role, rows, arguments.dtype) for role in roles for rows in sorted(arguments.rows, reverse=True)]
    with ProcessPoolExecutor(min(PROCESSES, len(jobs)), mp_context=get_context("spawn")) as processes:
        num_compiled = sum(processes.map(_compile, *zip(*jobs, strict=True)))
    print(f"{num_compiled} candidates compiled", flush=True)


def _compile(role: Role, num_rows: int, dtype: str) -> int:
    device = torch.device("cuda", torch.cuda.current_device())
    with redirect_stdout(StringIO()):  # the parent meets the same errors, and says so
        work = Operands(role, num_rows, device, getattr(torch, DTYPES[dtype]), is_timed=False)
        return len(those_that_run(work, candidates(num_rows, role)))


@torch.inference_mode()
def best_of(work: Operands) -> dict[str, Any]:
    """The entry of one layer at one number of rows."""
    role = work.role
    configs = those_that_run(work, candidates(work.num_rows, role))
    times = {config: work.seconds(config) for config in (None, *configs)}
    for config in sorted(times, key=lambda each: times[each]):
        if config is None or _is_sound(work, config):
            print(f"{role.name:8} {work.num_rows:4} {1e6 * times[config]:8.2f} us  {config}", flush=True)
            return _entry(work, config, times)
    raise AssertionError("doing without is always among the candidates")


def _is_sound(work: Operands, config: LinearConfig) -> bool:
    """Right, and the same every time."""
    try:
        work.check(config)
    except WrongResult as error:
        print(f"  dropped, wrong: {error}", flush=True)
        return False
    if not work.repeats(config):
        print(f"  dropped, not repeatable: {config}", flush=True)
        return False
    return True


def _entry(work: Operands, config: LinearConfig | None, times: dict[LinearConfig | None, float]) -> dict[str, Any]:
    return {
        "operation": work.role.operation,
        "rows": work.num_rows,
        "width_out": work.role.width_out,
        "width_in": work.role.width_in,
        "dtype": str(work.dtype).removeprefix("torch."),
        "config": None if config is None else asdict(config),
        "us": round(1e6 * times[config], 2),
        "us_otherwise": round(1e6 * times[None], 2),
    }


def merged(path: Path, entries: Sequence[dict[str, Any]], card: str) -> dict[str, Any]:
    """The file's content with new entries in place of old ones of the same key."""

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[name] for name in ("operation", "dtype", "width_out", "width_in", "rows"))

    old = json.loads(path.read_text(encoding="utf-8"))["choices"] if path.is_file() else []
    choices = {key(entry): entry for entry in (*old, *entries)}
    facts = {"card": card, "torch": torch.__version__, "commit": commit()}
    facts["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    return {**facts, "choices": [choices[each] for each in sorted(choices)]}


def measured(arguments: argparse.Namespace, roles: Sequence[Role], device: torch.device) -> Iterator[dict[str, Any]]:
    """Each layer at each number of rows."""
    dtype = getattr(torch, DTYPES[arguments.dtype])
    for role in roles:
        for num_rows in arguments.rows:
            yield best_of(Operands(role, num_rows, device, dtype))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; without a GPU there is nothing to measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder with a config.json (default: Llama-3.1-8B)")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"))
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS), help="powers of two")
    parser.add_argument("--roles", nargs="*", default=[], metavar="NAME", help="qkv, o, gate_up, down, head")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the card's file beside the kernels")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: configs are measured on a GPU, and there is none", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    config = json.loads((arguments.model / "config.json").read_text()) if arguments.model else LLAMA_8B
    roles = [role for role in roles_of(config) if not arguments.roles or role.name in arguments.roles]
    card = tuned.card_name(device)
    path = arguments.out or tuned.FOLDER / f"{card}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    compile_ahead(arguments, roles)
    for entry in measured(arguments, roles, device):
        # After each, so that a run that is cut off keeps what it has.
        path.write_text(json.dumps(merged(path, [entry], card), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
