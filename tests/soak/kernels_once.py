"""Every kernel of the package once, at small shapes: what compute-sanitizer is given, under which all else takes hours.

    compute-sanitizer --tool memcheck python -m tests.soak.kernels_once
    compute-sanitizer --tool racecheck --racecheck-report all python -m tests.soak.kernels_once --share 0/6

`pip install nvidia-cuda-sanitizer-api` brings the tool; with `--share K/N` several processes divide the work. Run it
once without the tool first, so that nothing is compiled under it. Prints how many operations ran.
"""

from __future__ import annotations

import argparse

import torch

from tests.kernels import test_triton_repeats as operations

SMALL = operations.Model(256, 384, 8, 2, 128, 64, 5000)
PROMPTS = [([70, 1, 130], [70, 9, 200])]


def main() -> None:
    """Computes this share of the operations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", default="0/1", metavar="K/N", help="every Nth operation, from the Kth on")
    share, _, num_shares = parser.parse_args().share.partition("/")
    operations.MODEL, operations.PROMPTS = SMALL, PROMPTS
    computes = operations.everything()[int(share) :: int(num_shares)]
    for compute in computes:
        compute()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"{len(computes)} operations")


if __name__ == "__main__":
    main()
