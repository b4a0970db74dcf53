"""Token equality of two engines and one alone: every block size, prompt length and hit with every other.

    python -m tests.soak.transfer_matrix                         # over shm, collective (gloo) and tcp
    python -m tests.soak.transfer_matrix --channels nixl

Float32 on a CPU. Prints a line for each channel and pair of block sizes, every difference, and a JSON line; the exit
status is 1 if a token differs whose two best candidates were not as good as equal (`transfer_matrix.EXCUSED_MARGIN`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.tiny_model import make_tiny_llama
from tests.support.transfer_matrix import BLOCK_SIZES, compare, whole_matrix


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.transfer_matrix", description=__doc__.split("\n")[0])
    parser.add_argument("--channels", nargs="+", default=["shm", "collective", "tcp"])
    arguments = parser.parse_args(argv)
    totals = {"cases": 0, "tokens": 0, "different": 0, "excused": 0}
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = make_tiny_llama(Path(folder) / "model")
        for channel in arguments.channels:
            for block_sizes in BLOCK_SIZES:
                found = compare(model_dir, block_sizes, whole_matrix(), channels=(channel,))
                bad = found.different + found.wrong_facts
                for said in bad + found.excused:
                    print(f"{channel}: {said}")
                print(f"{channel} {block_sizes}: {found.cases} cases, {found.tokens} tokens, {len(bad)} differences")
                counted = (found.cases, found.tokens, len(bad), len(found.excused))
                totals = {name: totals[name] + count for name, count in zip(totals, counted, strict=True)}
    record = {"soak": "transfer_matrix", "channels": arguments.channels, **totals}
    print(json.dumps(record | {"seconds": round(time.monotonic() - began_s, 1)}))
    return 1 if totals["different"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
