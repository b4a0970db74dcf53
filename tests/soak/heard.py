"""What an engine said of each request, checked as it comes: no gaps, one end, the right number of tokens."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import TypeAlias

from twostroke_engine.messages import ChoiceDelta, RequestUpdate
from twostroke_engine.request import ErrorCode, FinishReason, TokenOut

from tests.soak.workload import Asked

Outputs: TypeAlias = "dict[int, array[int]]"
"""Tokens by choice."""


class SoakFailure(AssertionError):
    """Something that must never happen."""


@dataclass
class Heard:
    """One request's news."""

    asked: Asked
    max_model_len: int
    eos: frozenset[int]
    tokens: Outputs = field(default_factory=dict)
    finishes: dict[int, FinishReason] = field(default_factory=dict)
    was_cancelled: bool = False
    ended: bool = False

    @property
    def num_tokens(self) -> int:
        """Of all choices."""
        return sum(len(tokens) for tokens in self.tokens.values())

    @property
    def cancel_is_due(self) -> bool:
        """Whether it is to be cancelled and has not been."""
        after = self.asked.cancel_after
        return after is not None and not self.was_cancelled and self.num_tokens >= after

    def hear(self, update: RequestUpdate) -> None:
        """Takes news in."""
        self._require(not self.ended, "news after the end")
        for delta in update.deltas:
            self._hear_delta(delta)
        if update.end is not None:
            self.ended = True
            self._require(
                update.end.error is (ErrorCode.CANCELLED if self.was_cancelled else None),
                f"ended with {update.end.error} {update.end.message}",
            )
            self._check_counts()

    def _hear_delta(self, delta: ChoiceDelta) -> None:
        tokens = self.tokens.setdefault(delta.choice, array("i"))
        self._require(delta.choice not in self.finishes, "tokens after a choice's finish")
        self._require(delta.offset == len(tokens), f"token {delta.offset} after {len(tokens)} tokens")
        for token in delta.tokens:
            self._check_logprobs(token)
            tokens.append(token.id)
        if delta.finish is not None:
            self.finishes[delta.choice] = delta.finish

    def _check_logprobs(self, token: TokenOut) -> None:
        count = self.asked.request.sampling.logprobs
        self._require(len(token.top) == (count or 0), f"{len(token.top)} likely tokens, {count} asked for")
        logprobs = [token.logprob, *(logprob for _, logprob in token.top)]
        self._require(all(math.isfinite(x) and x < 1e-3 for x in logprobs), f"logprobs {logprobs}")
        likely = logprobs[1:]
        self._require(likely == sorted(likely, reverse=True), f"the likely tokens are not in order: {likely}")

    def _check_counts(self) -> None:
        request = self.asked.request
        most = min(request.sampling.max_tokens, self.max_model_len - request.num_prompt_tokens)
        self._require(all(len(tokens) <= most for tokens in self.tokens.values()), "more tokens than asked for")
        if self.was_cancelled:
            return
        self._require(set(self.finishes) == set(range(request.n)), f"choices {sorted(self.finishes)} of {request.n}")
        ends = set(request.sampling.stop_token_ids) | (set() if request.sampling.ignore_eos else self.eos)
        for choice, finish in self.finishes.items():
            tokens = self.tokens[choice]
            if finish is FinishReason.LENGTH:
                self._require(len(tokens) == most, f"{len(tokens)} tokens at the end by length, not {most}")
            else:
                self._require(finish is FinishReason.STOP and tokens[-1] in ends, f"{finish} at token {tokens[-1]}")

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise SoakFailure(f"{self.asked.request.id}: {message}")


def differing(one: dict[int, Outputs], other: dict[int, Outputs], cancelled: set[int]) -> list[str]:
    """Requests whose tokens differ between two runs; of cancelled ones the tokens that both have count."""
    found = []
    for number in sorted(one):
        for choice in sorted(set(one[number]) | set(other[number])):
            a, b = one[number].get(choice, array("i")), other[number].get(choice, array("i"))
            length = min(len(a), len(b)) if number in cancelled else max(len(a), len(b))
            if a[:length] != b[:length]:
                first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                found.append(f"soak-{number} choice {choice} from token {first}")
    return found
