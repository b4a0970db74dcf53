"""How long prompts and answers are: a number, or a distribution to draw from."""

from __future__ import annotations

import math
import random
import re
from typing import Literal

import msgspec

from twostroke_cli.errors import CommandError

SYNTAX = "N, LOW..HIGH, or lognormal:MEDIAN:SIGMA[:MOST]"


class Length(msgspec.Struct, frozen=True):
    """Tokens: always `low`, evenly from `low` to `high`, or lognormal with median `low`, cut off at `high`."""

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int
    high: int
    sigma: float = 0.0

    def draw(self, source: random.Random) -> int:
        """One length, at least 1."""
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return source.randint(self.low, self.high)
        return max(1, min(self.high, round(source.lognormvariate(math.log(self.low), self.sigma))))

    def __str__(self) -> str:
        if self.kind == "fixed":
            return str(self.low)
        if self.kind == "uniform":
            return f"{self.low}..{self.high}"
        return f"lognormal:{self.low}:{self.sigma:g}:{self.high}"


LONGEST = 1_000_000


def parse_length(text: str, flag: str) -> Length:
    """A length as the command line writes it.

    Raises:
        CommandError: it is none; the message names the flag.
    """
    if re.fullmatch(r"\d+", text):
        found = Length("fixed", int(text), int(text))
    elif match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        found = Length("uniform", int(match[1]), int(match[2]))
    elif match := re.fullmatch(r"lognormal:(\d+):(\d*\.?\d+)(?::(\d+))?", text):
        found = Length("lognormal", int(match[1]), int(match[3] or LONGEST), float(match[2]))
    else:
        raise CommandError(f"{flag} {text}: expected {SYNTAX}")
    if not 1 <= found.low <= found.high <= LONGEST:
        raise CommandError(f"{flag} {text}: lengths go from 1 to {LONGEST}, the lower one first")
    return found
