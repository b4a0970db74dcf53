"""Sampling noise that is a function of (seed, choice, position, token): Philox-4x32-10 in int64 tensors.

The generator is that of Salmon et al. 2011 (Random123) and of `tl.philox`, so every backend draws the same words.
"""

from __future__ import annotations

from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

GUMBEL_MAX = 16.65
"""More than the largest possible noise: 24 ln 2 = 16.636."""

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds over words held in int64 (0 to 2^32 - 1) that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products wrap modulo 2^64, which keeps both halves. Only what is multiplied next must be free of high bits,
        # so the odd words and the keys go unmasked.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((b >> 32) ^ c1 ^ k0).bitwise_and_(_MASK32)
        c2 = ((a >> 32) ^ c3 ^ k1).bitwise_and_(_MASK32)
        c1, c3 = b, a
        k0, k1 = k0 + _KEY_STEPS[0], k1 + _KEY_STEPS[1]
    return c0, c1 & _MASK32, c2, c3 & _MASK32


def split_seed(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The key's two words: the low, then the high half of a 64-bit seed."""
    return seed & _MASK32, (seed >> 32) & _MASK32


def uniform(words: Tensor) -> Tensor:
    """32-bit words to float32 in (0, 1): (word >> 9) + 1/2, times 2^-23.

    23 bits and a half are the 24 that a float32 holds exactly; one bit more would round the largest word to 1.
    """
    return (words >> 9).float().add_(0.5).mul_(2.0**-23)


def gumbel(words: Tensor) -> Tensor:
    """-log(-log(u)) in float32; finite, as u is neither 0 nor 1."""
    return uniform(words).log_().neg_().log_().neg_()
