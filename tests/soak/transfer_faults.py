"""Faults in KV hand-offs between engine processes, by the thousand: nothing wrong is served, nothing hangs or stays.

    python -m tests.soak.transfer_faults --channel shm --faults 10000 --seed 1
    python -m tests.soak.transfer_faults --channel tcp --faults 500
    python -m tests.soak.transfer_faults --channel cuda_ipc-host     # its sockets and fences, memory of the host
    python -m tests.soak.transfer_faults --channel cuda_ipc --device cuda --faults 1000

A router's part is played here: random requests go through four prefill engines and one decode engine with a tiny model,
and what fails is tried again. Tries carry one to three faults each (`tests/support/fault_plan.py`): bits flip, messages
are cut, come twice, out of order, late or with another epoch, answers are lost, processes are killed before, in and
after a segment, and a writer is stopped in mid-segment, continued when its lease has lapsed and its memory is in use.

What must hold, or the exit status is 1: every token that is told is what one engine alone says; a prompt's KV is, byte
by byte, what was computed, when it is adopted and still when its request ends; no segment with wrong bytes is accepted;
every try ends within the deadline; and whenever nothing runs, which is looked for every now and then, no engine holds a
block. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.record import card, commit
from tests.soak.transfer_faults_run import CHANNELS, NUM_LAYERS, FaultSoak
from tests.support.fault_cluster import Engines
from tests.support.fault_plan import CLASSES
from tests.support.tiny_model import make_tiny_llama


def report(soak: FaultSoak, arguments: argparse.Namespace, took_s: float) -> dict[str, object]:
    """Prints the table and gives the JSON line."""
    tally = soak.judge.tally
    print(f"{'class':16}{'injected':>10}{'re-sent':>10}{'re-prefilled':>14}{'absorbed':>10}")
    for name in CLASSES:
        count = tally.classes[name]
        print(f"{name:16}{count.injected:10}{count.resent:10}{count.re_prefilled:14}{count.absorbed:10}")
    figures = {name: value for name, value in vars(tally).items() if name != "classes"}
    return {
        "soak": "transfer_faults",
        "channel": arguments.channel,
        "seed": arguments.seed,
        "faults": tally.injected,
        "seconds": round(took_s, 1),
        **figures,
        "longest_try_s": round(tally.longest_try_s, 2),
        "classes": {name: asdict(tally.classes[name]) for name in CLASSES},
        "kinds": dict(soak.judge.kinds),
        "engine_counts": dict(soak.judge.engine_counts),
        "card": card(arguments.device),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.transfer_faults", description=__doc__.split("\n")[0])
    parser.add_argument("--channel", default="shm", choices=("cuda_ipc", *CHANNELS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, with fewer faults")
    parser.add_argument("--seed", type=int, default=None, help="default: a random one, which is printed")
    parser.add_argument("--results", type=Path, default=None, help="file to append the JSON line to")
    parser.add_argument("--drain-every", type=int, default=500, help="faults between two looks for leaks")
    arguments = parser.parse_args(argv)
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(1 << 32)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Soaks and says what came of it."""
    arguments = parse(argv)
    print(f"seed {arguments.seed}", flush=True)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir, engines = make_tiny_llama(folder / "model", num_hidden_layers=NUM_LAYERS), Engines(folder)
        device, drain_every = arguments.device, arguments.drain_every
        soak = FaultSoak(arguments.channel, arguments.seed, engines, model_dir, device, drain_every=drain_every)
        try:
            soak.run(arguments.faults, arguments.seconds)
        finally:
            engines.stop()
    record = report(soak, arguments, time.monotonic() - began_s)
    print(json.dumps(record))
    if arguments.results is not None:
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 1 if soak.judge.tally.violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
