"""Linear layers over a `ParallelGroup`: which features of which source a rank holds, and what follows the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from twostroke_engine.model.config import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from twostroke_kernels.backend import RowNorm

    from twostroke_engine.quant.scheme import Params, QuantScheme
    from twostroke_engine.runner.parallel import ParallelGroup


@dataclass(frozen=True, slots=True)
class Shard:
    """The features of one source layer that a rank holds."""

    source: str
    """Its name in a checkpoint, without `.weight`."""
    in_features: int
    """Of the whole source."""
    out_features: int
    inputs: range
    outputs: range


class Linear:
    """A product with the weights that this rank holds."""

    def __init__(self, scheme: QuantScheme, params: Params) -> None:
        self._scheme = scheme
        self._params = params

    def prepare(self) -> None:
        """Once, after loading."""
        self._params = self._scheme.prepare(self._params)


class ColumnLinear(Linear):
    """Output features are split over ranks; the output stays split. The input is normed first."""

    def __call__(self, x: Tensor, norm: RowNorm) -> Tensor:
        """[T, in] -> [T, outputs held]."""
        return self._scheme.apply_normed(x, norm, self._params)

    @staticmethod
    def shards(name: str, in_features: int, out_features: int, group: ParallelGroup) -> tuple[Shard, ...]:
        """An equal share of the outputs."""
        return (Shard(name, in_features, out_features, range(in_features), share(name, out_features, group)),)


class MergedLinear(ColumnLinear):
    """Several column layers with one input, multiplied at once; each is split by itself."""

    def gated(self, x: Tensor, norm: RowNorm) -> Tensor:
        """silu(first) * second of two equally wide layers: [T, in] -> [T, outputs held of one]."""
        return self._scheme.apply_gated(x, norm, self._params)

    @staticmethod
    def merged_shards(
        names: Sequence[str], in_features: int, out_features: Sequence[int], group: ParallelGroup
    ) -> tuple[Shard, ...]:
        """An equal share of each source, one after the other."""
        return tuple(
            shard
            for name, size in zip(names, out_features, strict=True)
            for shard in ColumnLinear.shards(name, in_features, size, group)
        )


class QKVLinear(ColumnLinear):
    """Queries, keys and values at once; split by heads, and KV heads are replicated where ranks outnumber them."""

    def __init__(self, scheme: QuantScheme, params: Params, num_heads: int) -> None:
        super().__init__(scheme, params)
        self.num_heads = num_heads
        """Query heads held."""

    @staticmethod
    def head_shards(
        name: str, hidden_size: int, heads: tuple[int, int], head_dim: int, group: ParallelGroup
    ) -> tuple[Shard, ...]:
        """`heads` are the numbers of query and of KV heads."""
        num_heads, num_kv_heads = heads
        queries = share(f"{name}.q_proj", num_heads, group)
        keys = kv_heads(f"{name}.k_proj", num_kv_heads, group)
        return tuple(
            Shard(
                f"{name}.{part}",
                hidden_size,
                total * head_dim,
                range(hidden_size),
                range(held.start * head_dim, held.stop * head_dim),
            )
            for part, total, held in (
                ("q_proj", num_heads, queries),
                ("k_proj", num_kv_heads, keys),
                ("v_proj", num_kv_heads, keys),
            )
        )


class RowLinear(Linear):
    """Input features are split over ranks; the outputs are summed over them, and added to the residual stream."""

    def __init__(self, scheme: QuantScheme, params: Params, group: ParallelGroup) -> None:
        super().__init__(scheme, params)
        self._group = group
        self._add = self._add_alone if group.size == 1 else self._add_reduced

    @staticmethod
    def shards(name: str, in_features: int, out_features: int, group: ParallelGroup) -> tuple[Shard, ...]:
        """An equal share of the inputs."""
        return (Shard(name, in_features, out_features, share(name, in_features, group), range(out_features)),)

    def add(self, residual: Tensor, x: Tensor) -> None:
        """In place: residual [T, out] += the product of x [T, inputs held], summed over ranks."""
        self._add(residual, x)

    def _add_alone(self, residual: Tensor, x: Tensor) -> None:
        self._scheme.add(residual, x, self._params)

    def _add_reduced(self, residual: Tensor, x: Tensor) -> None:
        residual.add_(self._group.all_reduce(self._scheme.apply(x, self._params)))


def share(name: str, total: int, group: ParallelGroup) -> range:
    """This rank's part of `total` things that divide equally.

    Raises:
        ModelError: they do not.
    """
    size, rest = divmod(total, group.size)
    if rest:
        raise ModelError(f"{name}: {total} cannot be split over {group.size} ranks")
    return range(group.rank * size, (group.rank + 1) * size)


def kv_heads(name: str, total: int, group: ParallelGroup) -> range:
    """This rank's KV heads; one head on several ranks where ranks outnumber heads."""
    if group.size <= total:
        return share(name, total, group)
    if group.size % total:
        raise ModelError(f"{name}: {total} KV heads cannot be replicated over {group.size} ranks")
    head = group.rank * total // group.size
    return range(head, head + 1)
