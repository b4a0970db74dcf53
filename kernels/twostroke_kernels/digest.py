"""Digest of KV segments: a multilinear hash modulo 2^64 over signed 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# A slice of words and its multipliers stay in the second-level cache; GPUs want few launches instead.
_WORDS_AT_ONCE = {"cpu": 1 << 15}
_WORDS_AT_ONCE_ELSEWHERE = 1 << 24


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _xor_shift(z: Tensor, bits: int) -> Tensor:
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))


def multipliers(count: int, device: torch.device) -> Tensor:
    """[count] int64: splitmix64's finaliser of (i + 1) * golden ratio | 1, made odd."""
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN) | 1
    z = _xor_shift(z, 30) * _signed(_MIX[0])
    z = _xor_shift(z, 27) * _signed(_MIX[1])
    return _xor_shift(z, 31) | 1


class SegmentDigest:
    """Digests segments on one device; keeps the longest row of multipliers it has needed."""

    def __init__(self, device: torch.device) -> None:
        self._multipliers = multipliers(0, device)
        self._at_once = _WORDS_AT_ONCE.get(device.type, _WORDS_AT_ONCE_ELSEWHERE)

    def __call__(self, segment: Tensor) -> Tensor:
        """[n, ...] -> [n] int64, see `Backend.digest`."""
        n = segment.shape[0]
        if segment.numel() == 0:
            return torch.zeros(n, dtype=torch.int64, device=segment.device)
        words = segment.contiguous().view(n, -1).view(torch.int32)
        length = words.shape[1]
        factors = self._row_of(length, segment.device)
        if length >= self._at_once:
            return torch.stack([self._long(row, factors) for row in words])
        items = self._at_once // length
        parts = (words[first : first + items] for first in range(0, n, items))
        return torch.cat([(part.to(torch.int64) * factors).sum(1) for part in parts])

    def _row_of(self, length: int, device: torch.device) -> Tensor:
        # Several threads digest at once: each goes on with the row it has seen or made.
        row = self._multipliers
        if row.numel() < length:
            row = self._multipliers = multipliers(length, device)
        return row[:length]

    def _long(self, words: Tensor, factors: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for first in range(0, words.numel(), self._at_once):
            part = words[first : first + self._at_once].to(torch.int64)
            total += (part * factors[first : first + part.numel()]).sum()
        return total
