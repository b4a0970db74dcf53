"""The counter-based noise: published vectors, agreement of both implementations, and the range of u."""

from __future__ import annotations

import math

import pytest
import torch
from twostroke_kernels.noise import GUMBEL_MAX, gumbel, philox_4x32, split_seed, uniform
from twostroke_kernels.reference import noise, philox_words

# Random123's kat_vectors, the lines of philox4x32 with 10 rounds: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
Four = tuple[int, int, int, int]


def words(counter: Four, key: tuple[int, int]) -> list[int]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return [int(word) for word in philox_4x32((c0, c1, c2, c3), (torch.tensor([key[0]]), torch.tensor([key[1]])))]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_published_vectors(counter: Four, key: tuple[int, int], output: Four) -> None:
    assert words(counter, key) == list(output)
    assert philox_words(counter, key) == output


def test_both_implementations_agree(rng: torch.Generator) -> None:
    for row in torch.randint(1 << 32, (200, 6), generator=rng).tolist():
        counter, key = (row[0], row[1], row[2], row[3]), (row[4], row[5])
        assert words(counter, key) == list(philox_words(counter, key))


def test_counters_broadcast() -> None:
    """One word per token, one key: as a backend with a row at a time would call it."""
    tokens, one = torch.arange(50), torch.tensor([7])
    whole = torch.stack(philox_4x32((tokens, one, one, one), (one, one)), -1)
    assert whole.tolist() == [list(philox_words((token, 7, 7, 7), (7, 7))) for token in range(50)]


def test_a_seed_is_split_low_half_first() -> None:
    low, high = split_seed(torch.tensor([0x0123456789ABCDEF, -1, -(1 << 63)]))
    assert low.tolist() == [0x89ABCDEF, 0xFFFFFFFF, 0]
    assert high.tolist() == [0x01234567, 0xFFFFFFFF, 0x80000000]


def test_u_is_exact_and_strictly_between_0_and_1() -> None:
    extreme = torch.tensor([0, 511, 512, 1 << 31, 0xFFFFFE00, 0xFFFFFFFF])
    u = uniform(extreme)
    assert u.dtype == torch.float32
    assert u.tolist() == [((word >> 9) + 0.5) / 2**23 for word in extreme.tolist()]
    assert u.min() > 0
    assert u.max() < 1


def test_noise_is_finite_and_bounded() -> None:
    extreme = gumbel(torch.tensor([0, 0xFFFFFFFF]))
    assert extreme.isfinite().all()
    assert extreme[1] < GUMBEL_MAX
    assert math.isclose(extreme[1], 24 * math.log(2), rel_tol=1e-6)


def test_noise_matches_the_reference(rng: torch.Generator) -> None:
    for seed, choice, position in [(0, 0, 1), (-5, 3, 100), ((1 << 62) + 12345, 1, 4096)]:
        tokens = torch.arange(100)
        c = [torch.tensor([value]) for value in (position, choice, 0)]
        key = split_seed(torch.tensor([seed]))
        drawn = gumbel(torch.stack(philox_4x32((tokens // 4, c[0], c[1], c[2]), key), -1))
        drawn = drawn[torch.arange(100), tokens % 4]
        exact = torch.tensor([noise(seed, choice, position, token) for token in range(100)], dtype=torch.float64)
        # u near 1 leaves log(u) few digits of its own, not of u's: u itself is exact.
        torch.testing.assert_close(drawn.double(), exact, rtol=2e-6, atol=2e-6)
