"""Random requests, each a function of the run's seed and its own number: a second run asks for exactly the same."""

from __future__ import annotations

import random
from dataclasses import dataclass

from twostroke_engine.request import Request, SamplingParams

NUM_PREFIXES = 6


@dataclass(frozen=True)
class Sizes:
    """What requests are drawn from."""

    vocab_size: int
    longest_prompt: int
    longest_output: int


@dataclass(frozen=True)
class Asked:
    """A request, and after how many of its tokens it is cancelled, if at all."""

    request: Request
    cancel_after: int | None


class Workload:
    """Lengths from one token up, mostly short; shared beginnings; every way of sampling; some cancelled on the way."""

    def __init__(self, seed: int, sizes: Sizes) -> None:
        self._seed = seed
        self._sizes = sizes
        rng = random.Random(f"{seed}/prefixes")
        self._prefixes = [self._tokens(rng, sizes.longest_prompt // 2) for _ in range(NUM_PREFIXES)]

    def asked(self, number: int) -> Asked:
        """The request of this number."""
        rng = random.Random(f"{self._seed}/{number}")
        sampling = self._sampling(rng)
        request = Request(
            id=f"soak-{number}",
            token_ids=self._prompt(rng),
            sampling=sampling,
            n=rng.choice((1, 1, 1, 1, 2, 3)),
            priority=rng.choice((0, 0, 0, 1)),
        )
        return Asked(request, rng.randrange(sampling.max_tokens) if rng.random() < 0.1 else None)

    def _prompt(self, rng: random.Random) -> tuple[int, ...]:
        longest = self._sizes.longest_prompt
        own = self._tokens(rng, _mostly_short(rng, longest))
        if rng.random() < 0.4:
            prefix = rng.choice(self._prefixes)
            own = prefix[: rng.randint(1, len(prefix))] + own
        return own[:longest]

    def _tokens(self, rng: random.Random, count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(self._sizes.vocab_size) for _ in range(count))

    def _sampling(self, rng: random.Random) -> SamplingParams:
        drawn = rng.random() < 0.7
        penalized = rng.random() < 0.2
        max_tokens = _mostly_short(rng, self._sizes.longest_output)
        return SamplingParams(
            temperature=rng.choice((0.5, 0.8, 1.0, 2.0)) if drawn else 0.0,
            top_k=rng.choice((0, 0, 1, 20, 500)),
            top_p=rng.choice((1.0, 1.0, 0.95, 0.5)),
            min_p=rng.choice((0.0, 0.0, 0.05)),
            repetition_penalty=rng.choice((1.0, 1.2)) if penalized else 1.0,
            presence_penalty=rng.choice((0.0, 0.5)) if penalized else 0.0,
            frequency_penalty=rng.choice((0.0, 0.3)) if penalized else 0.0,
            logit_bias=((rng.randrange(self._sizes.vocab_size), -5.0),) if rng.random() < 0.1 else (),
            seed=rng.getrandbits(64),
            max_tokens=max_tokens,
            min_tokens=rng.choice((0, 0, max_tokens // 2)),
            stop_token_ids=self._tokens(rng, rng.choice((0, 0, 20))),
            ignore_eos=rng.random() < 0.5,
            logprobs=rng.choice((None, None, None, 0, 5)),
        )


def _mostly_short(rng: random.Random, most: int) -> int:
    """From 1 to `most`, every order of magnitude as likely as the next."""
    return max(1, min(most, int(most ** rng.random() + rng.random())))
