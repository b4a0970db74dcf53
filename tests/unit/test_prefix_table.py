"""The table of blocks and holders against a dictionary of sets, and what it promises of memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from twostroke_chassis.prefix_table import PrefixTable, keys_of

WORKERS = 11
KEYS = np.random.default_rng(0).integers(0, 2**64, 200, dtype=np.uint64)
KEYS[0] = 0  # as good a key as any

some_keys = st.lists(st.integers(0, len(KEYS) - 1), max_size=60)
change = st.tuples(st.sampled_from(["add", "remove", "forget"]), st.integers(0, WORKERS - 1), some_keys)


def depths_by_hand(held: list[set[int]], prompt: list[int]) -> list[int]:
    ends = [next((at for at, key in enumerate(prompt) if key not in mine), len(prompt)) for mine in held]
    return ends


@settings(max_examples=150, deadline=None)
@given(st.lists(change, max_size=30), st.lists(some_keys, min_size=1, max_size=5))
def test_it_says_what_a_dictionary_of_sets_says(changes: list[tuple[str, int, list[int]]], prompts: list[list[int]]):
    table, held = PrefixTable(), [set[int]() for _ in range(WORKERS)]
    for what, worker, numbers in changes:
        if what == "forget":
            table.forget(worker)
            held[worker].clear()
        elif what == "add":
            table.add(worker, KEYS[numbers])
            held[worker] |= set(numbers)
        else:
            table.remove(worker, KEYS[numbers])
            held[worker] -= set(numbers)
        for prompt in prompts:
            assert table.depths(KEYS[prompt], WORKERS).tolist() == depths_by_hand(held, prompt)
        assert len(table) == len(set().union(*held))


def test_it_grows_and_forgets() -> None:
    table, keys = PrefixTable(), np.random.default_rng(1).integers(0, 2**64, 50_000, dtype=np.uint64)
    for at in range(0, len(keys), 1000):
        table.add(at % 3, keys[at : at + 1000])
    assert len(table) == len(keys)
    for at in range(0, len(keys), 1000):
        assert table.depths(keys[at : at + 1000], 3)[at % 3] == 1000
    for worker in range(3):
        table.forget(worker)
    assert len(table) == 0
    assert not table.depths(keys[:100], 3).any()


def test_an_entry_takes_few_bytes() -> None:
    table, rng = PrefixTable(), np.random.default_rng(2)
    for worker in range(64):
        table.add(worker, rng.integers(0, 2**64, 3000, dtype=np.uint64))
    assert table.num_bytes / len(table) < 64


def test_keys_are_the_first_half_of_a_hash() -> None:
    hashes = [bytes(range(at, at + 16)) for at in range(3)]
    assert keys_of(hashes).tolist() == [int.from_bytes(each[:8], "little") for each in hashes]
    assert len(keys_of([])) == 0
