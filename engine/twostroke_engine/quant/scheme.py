"""`QuantScheme`: one number format of weights. `ParamSpec`: one tensor of a layer in that format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    import torch
    from twostroke_kernels.backend import RowNorm

Params = Mapping[str, Tensor]
"""The tensors of one layer, by `ParamSpec.name`."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """Shape and meaning of one tensor; enough to slice any format for any rank without knowing the format."""

    name: str
    """Last part of its name in a checkpoint."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    output_axis: int | None = None
    """Axis along the layer's output features; None: the tensor does not depend on them."""
    input_axis: int | None = None
    output_unit: int = 1
    """Output features that one entry of `output_axis` stands for (8 int4 values in an int32, rows of a scale)."""
    input_unit: int = 1

    def slices(self, inputs: range, outputs: range) -> tuple[slice, ...]:
        """Where these features lie in the tensor.

        Raises:
            ValueError: a range does not fall on whole entries.
        """
        where = [slice(0, size) for size in self.shape]
        for axis, features, unit in (
            (self.input_axis, inputs, self.input_unit),
            (self.output_axis, outputs, self.output_unit),
        ):
            if axis is None:
                continue
            if features.start % unit or features.stop % unit:
                raise ValueError(f"{self.name}: {features} does not fall on units of {unit}")
            where[axis] = slice(features.start // unit, features.stop // unit)
        return tuple(where)


class QuantScheme(Protocol):
    """A number format of weights. Hidden states go into a product together with the norm before it, or into a sum
    together with the product: a format whose kernels can do both at once may."""

    def params(self, in_features: int, out_features: int, bias: bool) -> tuple[ParamSpec, ...]:
        """The tensors of a layer of this size; asked for whole layers and for a rank's share alike."""
        ...

    def prepare(self, params: Params) -> Params:
        """Once, after loading: the layout that the products want."""
        ...

    def apply(self, x: Tensor, params: Params) -> Tensor:
        """x [T, in] -> [T, out]."""
        ...

    def apply_normed(self, x: Tensor, norm: RowNorm, params: Params) -> Tensor:
        """The same of rms_norm(x)."""
        ...

    def apply_gated(self, x: Tensor, norm: RowNorm, params: Params) -> Tensor:
        """silu(gate) * up of rms_norm(x) [T, in], where the outputs are 2 I (gate, then up) -> [T, I]."""
        ...

    def add(self, residual: Tensor, x: Tensor, params: Params) -> None:
        """In place: residual [T, out] += the product of x [T, in]."""
        ...
