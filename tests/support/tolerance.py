"""How exact a result must be: judged against float64, beside what PyTorch itself manages at the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR_IN_EPS = 2.0


def assert_as_good_as_torch(out: Tensor, ref64: Tensor, torch_same_dtype: Tensor) -> None:
    """The largest and the root mean square error of `out` are at most twice PyTorch's own, plus a few roundings.

    The floor is two units of the dtype's rounding at the largest magnitude for the largest error, and at the root mean
    square for the other.
    """
    assert out.dtype == torch_same_dtype.dtype
    assert out.shape == ref64.shape == torch_same_dtype.shape
    if out.numel() == 0:
        return
    assert out.isfinite().all()
    eps = torch.finfo(out.dtype).eps
    error, allowed = (out.double() - ref64).abs(), (torch_same_dtype.double() - ref64).abs()
    floor = _FLOOR_IN_EPS * eps
    worst, worst_allowed = float(error.max()), 2 * float(allowed.max()) + floor * float(ref64.abs().max())
    assert worst <= worst_allowed, f"largest error {worst:.3g}, allowed {worst_allowed:.3g}"
    usual, usual_allowed = _rms(error), 2 * _rms(allowed) + floor * _rms(ref64)
    assert usual <= usual_allowed, f"root mean square error {usual:.3g}, allowed {usual_allowed:.3g}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
