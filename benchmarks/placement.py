"""How long placing takes, and how large the prefix index is: `python -m benchmarks.placement`.

Prompts of 200 blocks of 64 tokens, of which workers hold leading parts; half of the workers prefill, half decode.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from twostroke_chassis.prefix_table import Keys, PrefixTable
from twostroke_engine.kv.hashing import block_hashes
from twostroke_router.fleet import Fleet, Numbers, Profile
from twostroke_router.placement import POLICIES, RequestShape

NUM_BLOCKS, BLOCK_SIZE, NUM_PROMPTS = 200, 64, 500
SHARED_BLOCKS = 20
"""That all prompts begin with."""


@dataclass(frozen=True)
class _Prompt:
    keys: Keys

    def of(self, block_size: int) -> Keys:
        return self.keys


def placement_s(num_workers: int, num_rounds: int, policy: str) -> npt.NDArray[np.float64]:
    """Seconds of each of many placements: the lookup in the index and the choice."""
    random, table = np.random.default_rng(0), PrefixTable()
    table.reserve(num_workers * 4000)
    fleet = Fleet(table)
    prompts = random.integers(0, 2**64, (NUM_PROMPTS, NUM_BLOCKS), dtype=np.uint64)
    prompts[:, :SHARED_BLOCKS] = prompts[0, :SHARED_BLOCKS]
    for slot in range(num_workers):
        role: Literal["prefill", "decode"] = "prefill" if slot < num_workers // 2 else "decode"
        profile = Profile(
            worker_id=f"w{slot}", role=role, block_size=BLOCK_SIZE, max_model_len=131072, channels=("tcp",)
        )
        fleet.join(profile, slot)
        busy = Numbers(queued_tokens=20_000 * random.random(), sequences=60 * random.random(), free_tokens=100_000)
        fleet.update(f"w{slot}", busy)
        for prompt in random.integers(0, NUM_PROMPTS, 12):
            table.add(slot, prompts[prompt][: random.integers(SHARED_BLOCKS, NUM_BLOCKS + 1)])
    shape, place, spent_s = RequestShape(NUM_BLOCKS * BLOCK_SIZE, 256), POLICIES[policy], []
    for number in range(num_rounds):
        prompt = _Prompt(prompts[number % NUM_PROMPTS])
        begin = time.perf_counter()
        placement = place(shape, fleet.view(prompt.of, shape.num_prompt_tokens))
        fleet.placed()
        spent_s.append(time.perf_counter() - begin)
        assert placement is not None
    return np.array(spent_s)


def hashing_s(num_rounds: int) -> float:
    """Median seconds of hashing such a prompt, in units of 16 tokens."""
    tokens = np.random.default_rng(0).integers(0, 128_000, NUM_BLOCKS * BLOCK_SIZE).tolist()
    spent_s = []
    for _ in range(num_rounds):
        begin = time.perf_counter()
        block_hashes(tokens, BLOCK_SIZE)
        spent_s.append(time.perf_counter() - begin)
    return float(np.median(spent_s))


def entry_bytes(num_entries: int) -> float:
    """Resident bytes an entry of an index that grew to so many, from nothing."""
    random, table = np.random.default_rng(0), PrefixTable()
    before = _resident_bytes()
    for number in range(num_entries // 1000):
        table.add(number % 64, random.integers(0, 2**64, 1000, dtype=np.uint64))
    return (_resident_bytes() - before) / num_entries


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--entries", type=int, default=10_000_000, help="of the index whose size is measured")
    parser.add_argument("--rounds", type=int, default=5000, help="placements that are timed")
    parser.add_argument("--policy", default="cost", choices=list(POLICIES))
    flags = parser.parse_args()
    for num_workers in (64, 1000):
        p50, p99 = 1e6 * np.percentile(placement_s(num_workers, flags.rounds, flags.policy), (50, 99))
        print(f"placing among {num_workers:4d} workers   p50 {p50:7.1f} us   p99 {p99:7.1f} us")
    print(f"hashing {NUM_BLOCKS * BLOCK_SIZE} tokens         p50 {1e6 * hashing_s(50):7.1f} us")
    print(f"index of {flags.entries:,} entries  {entry_bytes(flags.entries):.1f} bytes an entry")


if __name__ == "__main__":
    main()
