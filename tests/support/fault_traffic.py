"""Requests for tests with faults: what is asked, what must come, and one try's way through two engines."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import dataclass

from msgspec.structs import replace
from twostroke_engine.messages import LeaseGrant, RequestEnd, RequestUpdate
from twostroke_engine.request import Request, SamplingParams

from tests.support.fault_cluster import EngineUnit, Watched
from tests.support.fault_plan import Planned, id_of

LONGEST = 200
Tokens = dict[int, dict[int, int]]
"""By choice and offset."""


class Prompts:
    """Requests that are asked again and again; groups of three share a prefix."""

    def __init__(self, seed: int, count: int, vocab_size: int) -> None:
        self._rng = random.Random(f"{seed}/prompts")
        self._vocab_size = vocab_size
        shared: tuple[int, ...] = ()
        self.requests: list[Request] = []
        for number in range(count):
            if number % 3 == 0:
                shared = self._tokens(self._length() // 2)
            self.requests.append(self._request(number, (*shared, *self._tokens(self._length()))[:LONGEST]))

    def _request(self, number: int, tokens: tuple[int, ...]) -> Request:
        rng = self._rng
        sampling = SamplingParams(
            temperature=rng.choice((0.0, 0.8)),
            seed=rng.getrandbits(64),
            max_tokens=rng.choice((1, 2, 3, 4, 6, 40)),
            ignore_eos=True,
        )
        return Request(id=f"{number}", token_ids=tokens, sampling=sampling, n=rng.choice((1, 1, 1, 1, 2)))

    def _length(self) -> int:
        rng = self._rng
        return rng.choice((1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, rng.randint(1, LONGEST)))

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(3, self._vocab_size) for _ in range(count))


@dataclass
class Job:
    """A request that must be served in the end."""

    number: int
    request: Request
    salt: bytes
    tries: int = 0


class Attempt(Watched):
    """One try."""

    def __init__(self, job: Job, faults: tuple[Planned, ...], decode: EngineUnit) -> None:
        super().__init__(faults)
        job.tries += 1
        self.job = job
        self.id = id_of(job.number, job.tries, faults)
        self.request = replace(job.request, id=self.id, cache_salt=job.salt)
        self.decode = decode
        self.prefill: EngineUnit | None = None
        self.lease: LeaseGrant | None = None
        self.tokens: Tokens = defaultdict(dict)
        self.hashes: dict[str, str] = {}
        self.ends: dict[str, RequestEnd | None] = {}
        """By role; None if the engine died."""
        self.begun_s = time.monotonic()
        self.is_given_up = False

    def hear(self, role: str, update: RequestUpdate) -> None:
        for delta in update.deltas:
            self.tokens[delta.choice].update(
                {at: token.id for at, token in enumerate(delta.tokens, start=delta.offset)}
            )
        if update.end is not None:
            self.ends[role] = update.end

    @property
    def failed(self) -> bool:
        return any(end is None or end.error is not None for end in self.ends.values())

    @property
    def is_served(self) -> bool:
        """Decode ended well, and the first tokens came: they are lost if prefill dies after its commit."""
        end = self.ends.get("decode")
        has_first = all(0 in self.tokens[choice] for choice in range(self.request.n))
        return end is not None and end.error is None and has_first

    @property
    def needs_kv(self) -> bool:
        """Whether anything is left to decode after the first token; otherwise no one reads what was sent."""
        return self.request.sampling.max_tokens > 1

    @property
    def is_over(self) -> bool:
        """Nothing more is to be expected of it. What a stopped engine has to say comes later."""
        waits = self.prefill is not None and not self.prefill.is_stopped and "prefill" not in self.ends
        return "decode" in self.ends and not waits

    def wrong_tokens(self, expected: Tokens) -> list[tuple[int, int]]:
        """(choice, offset) of tokens that were told and are not what one engine alone says, or that were not told."""
        told = {(choice, at): token for choice, tokens in self.tokens.items() for at, token in tokens.items()}
        right = {(choice, at): token for choice, tokens in expected.items() for at, token in tokens.items()}
        places = told.keys() | (right.keys() if self.is_served else set())
        return sorted(place for place in places if told.get(place) != right.get(place))
