"""`Fleet`: the workers' numbers as columns, kept up to date one worker at a time, and a view of them per request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from twostroke_chassis.prefix_table import Depths, Keys, PrefixTable

from twostroke_router.pools import Pool, View

Rows = npt.NDArray[np.int64]
Kind = tuple[object, ...]

TOKEN_S = 1e-4
STEP_S = 1e-2
SEQUENCE_S = 1e-4
"""What a worker counts for until its own steps have been seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What of a worker does not change while it lives."""

    worker_id: str
    role: Literal["prefill", "decode"]
    block_size: int
    max_model_len: int
    likeness: tuple[object, ...] = ()
    """Workers alike in this can hand KV over to each other, if they have a channel in common."""
    channels: tuple[str, ...] = ()
    """KV channels; two workers can use one that both name, text for text."""

    @property
    def kind(self) -> Kind:
        """Workers of one kind can hand KV over to, or take it from, the same others."""
        return (self.likeness, *sorted(self.channels))


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """How busy a worker is, what this router has placed there and not yet heard of included."""

    queued_tokens: float = 0.0
    sequences: float = 0.0
    free_tokens: float = 0.0
    token_s: float = TOKEN_S
    step_s: float = STEP_S
    sequence_s: float = SEQUENCE_S


@dataclass(slots=True)
class _Member:
    profile: Profile
    slot: int
    numbers: Numbers = field(default_factory=Numbers)


@dataclass(slots=True)
class _Role:
    """One role's pool, and where its hits are found."""

    pool: Pool
    lookups: list[tuple[int, Rows, Rows]]
    """By block size: rows, and the numbers in the prefix table of the workers there."""


class Fleet:
    """Workers that take new work."""

    def __init__(self, prefixes: PrefixTable) -> None:
        self._prefixes = prefixes
        self._members: dict[str, _Member] = {}
        self._roles = {name: _Role(Pool.of([]), []) for name in ("prefill", "decode")}
        self._row_of: dict[str, tuple[Pool, int]] = {}
        self._hands_over = np.zeros((0, 0), np.bool_)
        self._num_slots = 0
        self._turn = 0

    def join(self, profile: Profile, slot: int) -> None:
        """A worker takes work from now on; `slot` is its number in the prefix table."""
        self._members[profile.worker_id] = _Member(profile, slot)
        self._rebuild()

    def leave(self, worker_id: str) -> None:
        """It takes no more; unknown ones are ignored."""
        if self._members.pop(worker_id, None) is not None:
            del self._row_of[worker_id]
            self._rebuild()

    def update(self, worker_id: str, numbers: Numbers) -> None:
        """How busy a worker is now."""
        member = self._members.get(worker_id)
        if member is None:
            return
        member.numbers = numbers
        _write(*self._row_of[worker_id], numbers)

    def placed(self) -> None:
        """A placement was made from the last view: the next one breaks ties differently."""
        self._turn += 1

    def view(self, keys_of: Callable[[int], Keys], num_prompt_tokens: int) -> View:
        """The workers as one request sees them now; good until the next change.

        Args:
            keys_of: the prompt's keys in the prefix table, for a block size.
            num_prompt_tokens: tokens of the prompt; the last one is computed in any case.
        """
        depths: dict[int, Depths] = {}
        for role in self._roles.values():
            role.pool.hit_tokens = self._hit_tokens(role, keys_of, depths, num_prompt_tokens - 1)
        return View(self._roles["prefill"].pool, self._roles["decode"].pool, self._hands_over, self._turn)

    def _hit_tokens(self, role: _Role, keys_of: Callable[[int], Keys], depths: dict[int, Depths], most: int) -> Rows:
        hits = np.zeros(len(role.pool), np.int64)
        for block_size, rows, slots in role.lookups:
            if block_size not in depths:
                depths[block_size] = self._prefixes.depths(keys_of(block_size), self._num_slots)
            hits[rows] = depths[block_size][slots] * block_size
        return np.minimum(hits, most)

    def _rebuild(self) -> None:
        """After a change of who is there: rare, so all columns are made anew."""
        members = list(self._members.values())
        kinds: dict[Kind, int] = {}
        numbered = [kinds.setdefault(member.profile.kind, len(kinds)) for member in members]
        self._hands_over = np.array([[can_hand_over(giver, taker) for taker in kinds] for giver in kinds], np.bool_)
        self._num_slots = max((member.slot for member in members), default=-1) + 1
        kind_of = {member.profile.worker_id: number for member, number in zip(members, numbered, strict=True)}
        for name in self._roles:
            self._roles[name] = self._role([each for each in members if each.profile.role == name], kind_of)

    def _role(self, members: Sequence[_Member], kind_of: dict[str, int]) -> _Role:
        ids = [member.profile.worker_id for member in members]
        longest = [member.profile.max_model_len for member in members]
        pool = Pool.of(ids, kinds=[kind_of[worker_id] for worker_id in ids], max_model_len=longest)
        by_size: dict[int, list[int]] = {}
        for row, member in enumerate(members):
            self._row_of[member.profile.worker_id] = (pool, row)
            _write(pool, row, member.numbers)
            by_size.setdefault(member.profile.block_size, []).append(row)
        slots = np.array([member.slot for member in members], np.int64)
        lookups = [(size, np.array(rows), slots[rows]) for size, rows in by_size.items()]
        return _Role(pool, lookups)


def can_hand_over(giver: Kind, taker: Kind) -> bool:
    """Whether KV can go between workers of two kinds: they are alike, and have a channel in common."""
    return giver[0] == taker[0] and not set(giver[1:]).isdisjoint(taker[1:])


def _write(pool: Pool, row: int, numbers: Numbers) -> None:
    pool.queued_tokens[row] = numbers.queued_tokens
    pool.sequences[row] = numbers.sequences
    pool.free_tokens[row] = numbers.free_tokens
    pool.token_s[row] = numbers.token_s
    pool.step_s[row] = numbers.step_s
    pool.sequence_s[row] = numbers.sequence_s
