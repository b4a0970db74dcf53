"""Where the time of many requests went, and how much of it no stage accounts for.

    python -m tests.soak.waterfalls --requests 10000 --concurrency 8

A whole cluster with a tiny model, real processes all of them, sends its spans to a receiver in this process. Every
request's waterfalls are read from its root span. Printed: each stage's percentiles, spans without a parent, traces that
are not one per request. The status is 1 if `unattributed` is above the bar at p99, or a trace is not whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx
from twostroke_cli.plan import usable_cores

from tests.support.cluster import Cluster, running_cluster
from tests.support.otlp_receiver import OtlpReceiver, Span
from tests.support.tiny_model import make_tiny_llama

BAR_S = 0.001
PERCENTILES = (50, 90, 99)
WORDS = ("the", "dog", "could", "do", "nothing", "more", "about", "it", "than", "what", "was", "done", "before")


async def drive(cluster: Cluster, num_requests: int, concurrency: int, max_tokens: int, seed: int) -> float:
    """Runs the requests in a closed loop; returns how long it took."""
    rng = random.Random(seed)
    bodies = iter(
        [
            {
                "prompt": " ".join(rng.choices(WORDS, k=24)),
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            for _ in range(num_requests)
        ]
    )
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=60) as http:

        async def client() -> None:
            for body in bodies:
                (await http.post("/v1/completions", json=body)).raise_for_status()

        begun = time.monotonic()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return time.monotonic() - begun


def stages_of(roots: list[Span], waterfall: str) -> dict[str, list[float]]:
    """Seconds by stage, over all requests that have this waterfall."""
    found: dict[str, list[float]] = defaultdict(list)
    for span in roots:
        facts = span.facts.get(f"waterfall.{waterfall}", {})
        for name, seconds in facts.items():
            found[name.removeprefix("twostroke.").removeprefix("stage.").removesuffix("_s")].append(seconds)
        if facts:
            parts = sum(seconds for name, seconds in facts.items() if name.startswith("twostroke.stage."))
            assert abs(parts - facts["twostroke.total_s"]) < 1e-9, (span.trace_id, facts)
    return found


def percentile(values: list[float], share: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)]


def report(roots: list[Span]) -> dict[str, float]:
    """Prints a table for each waterfall; returns the p99 of what no stage accounts for."""
    left = {}
    for waterfall in ("ttft", "second_token"):
        stages = stages_of(roots, waterfall)
        print(f"\n{waterfall:17} {'requests':>9} " + " ".join(f"{f'p{share} ms':>9}" for share in PERCENTILES))
        for name, values in stages.items():
            cells = " ".join(f"{1000 * percentile(values, share):9.3f}" for share in PERCENTILES)
            print(f"{name:17} {len(values):9d} {cells}")
        left[waterfall] = percentile(stages["unattributed"], 99)
    return left


def broken(receiver: OtlpReceiver, roots: list[Span]) -> list[str]:
    """What is wrong with the traces."""
    by_trace = defaultdict(list)
    for span in receiver.spans:
        by_trace[span.trace_id].append(span.name)
    wrong = [f"{len(receiver.orphans())} spans without their parent"] if receiver.orphans() else []
    if len(by_trace) != len(roots):
        wrong.append(f"{len(by_trace)} traces for {len(roots)} requests")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=4)
    parser.add_argument("--prefill", type=int, default=1, help="0 is the colocated mode")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, OtlpReceiver() as receiver:
        model = make_tiny_llama(Path(folder) / "tiny")
        flags = ["--prefill", str(args.prefill), "--decode", "1", "--otlp-endpoint", receiver.grpc]
        with running_cluster(Path(folder) / "run", model, *flags, workers=1 + args.prefill) as cluster:
            took_s = asyncio.run(drive(cluster, args.requests, args.concurrency, args.max_tokens, args.seed))
        roots = [span for span in receiver.spans if span.name == "text_completion tiny"]
    print(f"{args.requests} requests, {args.concurrency} at a time, {args.requests / took_s:.1f} a second")
    print(f"load average {os.getloadavg()[0]:.1f} on {usable_cores()} cores: above that, CPUs are waited for")
    print(f"{len(receiver.spans)} spans of {len(roots)} requests")
    left, wrong = report(roots), broken(receiver, roots)
    if len(roots) != args.requests:
        wrong.append(f"{args.requests - len(roots)} requests without a trace")
    print("\n" + json.dumps({"unattributed_p99_s": left, "bar_s": BAR_S, "wrong": wrong}))
    return int(bool(wrong) or any(seconds > BAR_S for seconds in left.values()))


if __name__ == "__main__":
    sys.exit(main())
