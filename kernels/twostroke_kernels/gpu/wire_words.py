"""Pieces of the kernels that make and read what a `KVWire` sends: digest multipliers, numbers as integer codes.

Rounding is integer arithmetic: the same bits on every card and in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multipliers(at):
    """See `digest.multipliers`: splitmix64's finaliser of every index, made odd."""
    z = (at.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15 | 1
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) | 1).to(tl.int64, bitcast=True)


@triton.jit
def bfloat16_code(x):
    """float32 -> int32: the 16 bits of the nearest bfloat16, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    return tl.where(x == x, near, 0x7FC0)


@triton.jit
def float16_code(x):
    """float32 -> int32: the 16 bits of the nearest float16."""
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def e4m3_code(x):
    """float32 of magnitude at most 448 (and a rounding) -> int32: the code of the nearest float8_e4m3fn."""
    bits = x.to(tl.int32, bitcast=True)
    sign, size = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count steps of 2^-9, which is the last bit of numbers from 2^14 on.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return sign | tl.where(size < 0x3C800000, small, normal)


@triton.jit
def int8_code(x):
    """float32 of magnitude at most 127 (and a rounding) -> int32: the low byte of the nearest integer, ties to even."""
    return ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000) & 0xFF


@triton.jit
def e4m3_number(code):
    """int32 code -> float32, exactly. NaN codes never travel: a scale says NaN."""
    size = code & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    number = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    return tl.where((code & 0x80) != 0, -number, number)
