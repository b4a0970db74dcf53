"""A soak of the engine: random requests for minutes, over a pool that is too small for them, with every check on.

    python -m tests.soak.engine_soak --device cuda --seconds 300
    python -m tests.soak.engine_soak --device cuda --seconds 300 --batch-invariant

Requests arrive at random, share prefixes, fork, are penalised, ask for logprobs and are cancelled; the pool is full, so
sequences are preempted and recomputed. What is checked: `BlockPool.check` all the time; that each request ends once,
with the right tokens in order; that nothing is held at the end; that memory does not grow. In batch-invariant mode the
run is done twice, half the time each, with other arrivals: every request must get the same tokens. Prints a line and a
JSON line; the exit status is 1 if anything failed. The seed is printed first, and `--seed` repeats it.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.engine import Engine
from twostroke_engine.runner.model_runner import build_runner

from tests.soak.heard import Heard, Outputs, SoakFailure, differing
from tests.soak.memory import MemoryRecord
from tests.soak.workload import Sizes, Workload

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LARGE = SMALL | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
EOS = frozenset({5, 7})
CHECK_EVERY = 8
"""Steps; memory is sampled at every eighth check."""
FULL = 0.95
"""Of the pool's blocks: reached at least once, or the soak was not one."""


@dataclass
class Counts:
    """What one or more runs did."""

    steps: int = 0
    requests: int = 0
    choices: int = 0
    tokens: int = 0
    cancelled: int = 0
    preemptions: int = 0
    hit_tokens: int = 0
    pool_sum: float = 0.0
    pool_peak: float = 0.0
    pool_full_steps: int = 0


@dataclass
class Run:
    """Requests 0 to N - 1 in some order of arrival, through one engine."""

    engine: Engine
    workload: Workload
    arrivals: random.Random
    counts: Counts
    memory: MemoryRecord
    most_live: int
    live: dict[str, Heard] = field(default_factory=dict)
    outputs: dict[int, Outputs] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)

    def for_seconds(self, seconds: float) -> None:
        """New requests for so long, then to the last one's end."""
        until_s, numbers = time.monotonic() + seconds, count()
        while time.monotonic() < until_s:
            if len(self.live) < self.most_live and self.arrivals.random() < 0.5:
                for _ in range(self.arrivals.choice((1, 1, 2, 9))):
                    self._submit(next(numbers))
            self._step()
        self._drain()

    def of(self, numbers: Sequence[int]) -> None:
        """These requests, shuffled within a window, in other bursts."""
        waiting = list(numbers)
        while waiting:
            if len(self.live) < self.most_live and self.arrivals.random() < 0.3:
                for _ in range(min(len(waiting), self.arrivals.choice((1, 4, 17)))):
                    self._submit(waiting.pop(self.arrivals.randrange(min(len(waiting), 2 * self.most_live))))
            self._step()
        self._drain()

    def _submit(self, number: int) -> None:
        asked = self.workload.asked(number)
        self.live[asked.request.id] = Heard(asked, self.engine.max_model_len, EOS)
        self.engine.submit(asked.request)
        self.counts.requests += 1

    def _drain(self) -> None:
        while self.live:
            self._step()
        while self.engine.has_work:  # what was launched for requests that have ended
            self._step()
        self.engine.pool.check()
        held, promised = self.engine.pool.num_referenced, self.engine.pool.num_promised
        if held or promised or self.engine.step():
            raise SoakFailure(f"{held} blocks held and {promised} promised at the end, or more to compute")

    def _step(self) -> None:
        self.engine.step()
        self.counts.steps += 1
        used = self.engine.pool.num_referenced / self.engine.pool.num_blocks
        self.counts.pool_sum += used
        self.counts.pool_peak = max(self.counts.pool_peak, used)
        self.counts.pool_full_steps += used >= FULL
        if self.counts.steps % CHECK_EVERY == 0:
            self.engine.pool.check()
        if self.counts.steps % (CHECK_EVERY * 8) == 0:
            self.memory.sample()
        self._listen()
        for name in [name for name, heard in self.live.items() if heard.cancel_is_due]:
            self._cancel(name)
        self.engine.take_block_events()

    def _cancel(self, name: str) -> None:
        self.live[name].was_cancelled = True
        if not self.engine.cancel(name):
            raise SoakFailure(f"{name} runs, but cannot be cancelled")
        self._listen()

    def _listen(self) -> None:
        for update in self.engine.take_updates():
            heard = self.live.get(update.request_id)
            if heard is None:
                raise SoakFailure(f"{update.request_id}: news of a request that is not there")
            heard.hear(update)
            if heard.ended:
                self._end(update.request_id)

    def _end(self, name: str) -> None:
        heard = self.live.pop(name)
        number = int(name.rpartition("-")[2])
        if number in self.outputs:
            raise SoakFailure(f"{name} ended twice")
        self.outputs[number] = heard.tokens
        self.counts.choices += len(heard.tokens)
        self.counts.tokens += heard.num_tokens
        if heard.was_cancelled:
            self.cancelled.add(number)
            self.counts.cancelled += 1


class Soak:
    """An engine, its model, and one or two runs."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.counts = Counts()
        shape = LARGE if arguments.device == "cuda" else SMALL
        (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        self.config = engine_config(arguments, folder)
        model = build_runner(self.config)
        self.engine = Engine(self.config, model.spec, model.num_blocks, model.runner, tuple(EOS), time.monotonic)
        self.memory = MemoryRecord(torch.device(arguments.device))
        longest = (2500, 400) if arguments.device == "cuda" else (150, 60)
        self.workload = Workload(arguments.seed, Sizes(shape["vocab_size"], *longest))

    def run(self) -> list[str]:
        """What failed."""
        arguments = self.arguments
        try:
            first = self._run("first")
            first.for_seconds(arguments.seconds / (2 if arguments.batch_invariant else 1))
            failures = self._failures_of_load()
            if arguments.batch_invariant:
                second = self._run("second")
                second.of(sorted(first.outputs))
                differ = differing(first.outputs, second.outputs, first.cancelled | second.cancelled)
                failures += [f"{len(differ)} outputs differ between two runs: {differ[:5]}"] if differ else []
        except AssertionError as failure:
            return [str(failure) or repr(failure)]
        return failures + self.memory.growths()

    def _run(self, name: str) -> Run:
        # The second run finds the prompts of the first in the prefix cache, as far as they are still there.
        arrivals = random.Random(f"{self.arguments.seed}/{name}")
        most_live = self.config.max_running * 3 // 2
        return Run(self.engine, self.workload, arrivals, self.counts, self.memory, most_live)

    def _failures_of_load(self) -> list[str]:
        load = self.engine.load()
        self.counts.preemptions, self.counts.hit_tokens = load.preemptions, load.prefix_hit_tokens
        peak = self.counts.pool_peak
        found = [f"the pool was only {100 * peak:.0f} % full at most"] if peak < FULL else []
        return (
            found
            + ["nothing was preempted"] * (not load.preemptions)
            + ["no prefix was hit"] * (not load.prefix_hit_tokens)
        )

    def record(self, failures: list[str], took_s: float) -> dict[str, Any]:
        """The JSON line."""
        counts = self.counts
        return {
            "soak": "batch-invariant" if self.arguments.batch_invariant else "plain",
            "seed": self.arguments.seed,
            "device": torch.cuda.get_device_name() if self.arguments.device == "cuda" else "cpu",
            "seconds": round(took_s, 1),
            **{name: value for name, value in vars(counts).items() if not name.startswith("pool")},
            "pool_mean": round(counts.pool_sum / max(1, counts.steps), 3),
            "pool_peak": round(counts.pool_peak, 3),
            "pool_full": round(counts.pool_full_steps / max(1, counts.steps), 3),
            "memory_mib": self.memory.summary(),
            "failures": failures,
        }


def engine_config(arguments: argparse.Namespace, folder: Path) -> EngineConfig:
    """A pool that holds about half of what the batch could use."""
    on_gpu = arguments.device == "cuda"
    return EngineConfig(
        model_dir=str(folder),
        device=arguments.device,
        dtype="bfloat16",
        load_format="random",
        batch_invariant=arguments.batch_invariant,
        block_size=64 if on_gpu else 16,
        num_blocks=arguments.num_blocks or (320 if on_gpu else 40),
        max_model_len=3000 if on_gpu else 256,
        max_step_tokens=2048 if on_gpu else 64,
        max_running=64 if on_gpu else 24,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.engine_soak", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=300.0, help="both runs together, if there are two")
    parser.add_argument("--seed", type=int, default=None, help="default: a random one, which is printed")
    parser.add_argument("--batch-invariant", action="store_true", help="and every output equals that of a second run")
    parser.add_argument("--num-blocks", type=int, default=None, help="KV blocks of the pool")
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
        soak = Soak(arguments, Path(name))
        failures = soak.run()
    record = soak.record(failures, time.monotonic() - began_s)
    print(
        f"soak {record['soak']} {'FAILED: ' + '; '.join(failures) if failures else 'passed'}: {record['requests']} "
        f"requests, {record['tokens']} tokens, {record['cancelled']} cancelled, {record['preemptions']} preemptions, "
        f"pool {100 * record['pool_mean']:.0f} % in use on average and at least {100 * FULL:.0f} % in "
        f"{100 * record['pool_full']:.0f} % of the steps, {record['seconds']} s"
    )
    print(json.dumps(record))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
