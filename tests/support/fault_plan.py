"""Faults of a KV hand-off, by name, and how a request carries those that are to meet it: in its id.

An id is `NUMBER.TRY/KIND@AT+KIND@AT`: the fault KIND is injected at the AT-th segment or control message of that try.
So whichever process sees the request knows what to do, and what was done can be told apart by request.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

FLIP, TRUNCATION, DUPLICATE, REORDER = "bit flip", "truncation", "duplicate", "reorder"
STALE, ACK_LOST, KILLED, STOPPED = "stale epoch", "ack lost", "peer killed", "writer stopped"

KINDS = {
    # In the sender's process, at its AT-th segment.
    "flip": FLIP,
    "flips": FLIP,  # and again each time it is sent again
    "truncate": TRUNCATION,
    "twice": DUPLICATE,
    "kill-before": KILLED,
    "kill-mid": KILLED,
    "kill-after": KILLED,
    "stop": STOPPED,
    # In the receiver's process, at its AT-th segment.
    "die-before": KILLED,
    "die-after": KILLED,
    # Between the two, at the AT-th control message of the sender or of the receiver.
    "dup": DUPLICATE,
    "late": DUPLICATE,  # a message of an earlier hand-off comes once more
    "swap": REORDER,
    "stale": STALE,
    "dup-back": DUPLICATE,
    "stale-back": STALE,
    "lose-back": ACK_LOST,
    "lose-welcome": ACK_LOST,  # the next one on the pair's stream, whatever AT says
}
"""Every kind's class."""
CLASSES = tuple(dict.fromkeys(KINDS.values()))
BYTES_ARE_WRONG = ("flip", "flips", "truncate")
"""No receiver may accept the segment that this happened to."""
BY_SENDER = ("flip", "flips", "truncate", "twice", "kill-before", "kill-mid", "kill-after", "stop")
BY_RECEIVER = ("die-before", "die-after")
FATAL = ("kill-before", "kill-mid", "kill-after", "stop", "die-before", "die-after")

NUM_PLACES = 6
_WEIGHTS = {
    "flip": 34.0,
    "flips": 2.5,
    "truncate": 6.0,
    "twice": 4.0,
    "dup": 9.0,
    "late": 5.0,
    "dup-back": 6.0,
    "swap": 9.0,
    "stale": 5.0,
    "stale-back": 5.0,
    "lose-back": 11.0,
    "lose-welcome": 0.5,
    "kill-before": 1.5,
    "kill-mid": 1.5,
    "kill-after": 1.5,
    "die-before": 0.5,
    "die-after": 0.5,
    "stop": 3.0,
}


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault that is to be injected."""

    kind: str
    at: int


def draw(rng: random.Random, most_fatal: int) -> tuple[Planned, ...]:
    """One to three faults for a try of a request; not more than `most_fatal` (0 or 1) of them end a process."""
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    drawn = rng.choices(kinds, weights, k=rng.choice((1, 2, 3)))
    fatal = [kind for kind in drawn if kind in FATAL][:most_fatal]
    mild = [kind for kind in drawn if kind not in FATAL]
    # One place has one fault: two could undo each other.
    places = rng.sample(range(NUM_PLACES), len(mild) + len(fatal))
    return tuple(Planned(kind, at) for kind, at in zip((*mild, *fatal), places, strict=True))


def id_of(number: int, tries: int, faults: Sequence[Planned]) -> str:
    """The id of one try of a request."""
    return f"{number}.{tries}/" + "+".join(f"{fault.kind}@{fault.at}" for fault in faults)


def faults_of(request_id: str) -> tuple[Planned, ...]:
    """The faults that an id tells of."""
    told = request_id.partition("/")[2]
    parts = [part.partition("@") for part in told.split("+") if part]
    return tuple(Planned(kind, int(at)) for kind, _, at in parts)
