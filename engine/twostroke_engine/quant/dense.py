"""`Dense`: weights as they are, in the model's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from twostroke_engine.quant.scheme import Params, ParamSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from twostroke_kernels.backend import Backend, RowNorm


@dataclass(frozen=True, slots=True)
class Dense:
    """The null object among the schemes."""

    backend: Backend
    dtype: torch.dtype

    def params(self, in_features: int, out_features: int, bias: bool) -> tuple[ParamSpec, ...]:
        """`weight` [out, in] and, with a bias, `bias` [out]."""
        weight = ParamSpec("weight", (out_features, in_features), self.dtype, output_axis=0, input_axis=1)
        if not bias:
            return (weight,)
        return (weight, ParamSpec("bias", (out_features,), self.dtype, output_axis=0))

    def prepare(self, params: Params) -> Params:
        """Nothing to do."""
        return params

    def apply(self, x: Tensor, params: Params) -> Tensor:
        """One matrix product."""
        return self.backend.linear(x, params["weight"], params.get("bias"))

    def apply_normed(self, x: Tensor, norm: RowNorm, params: Params) -> Tensor:
        """Norm and product."""
        return self.backend.norm_linear(x, norm, params["weight"], params.get("bias"))

    def apply_gated(self, x: Tensor, norm: RowNorm, params: Params) -> Tensor:
        """Norm, product and SwiGLU."""
        return self.backend.norm_gated_linear(x, norm, params["weight"], params.get("bias"))

    def add(self, residual: Tensor, x: Tensor, params: Params) -> None:
        """Product and sum."""
        self.backend.add_linear(residual, x, params["weight"], params.get("bias"))
