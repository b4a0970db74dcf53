"""`LayerFactory`: the one place where number format, sharding and device meet.

A model names its layers and their sizes; it never sees a rank, a bit width or a device. The factory allocates this
rank's share in the scheme's format and remembers what has to be pulled from the checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from twostroke_kernels.backend import HeadNorm, RowNorm

from twostroke_engine.model.layers import Embedding, Head
from twostroke_engine.model.linear import Linear, MergedLinear, QKVLinear, RowLinear, Shard, share
from twostroke_engine.weights.loader import Pull, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from twostroke_kernels.backend import Backend, RotaryTable

    from twostroke_engine.model.config import ModelConfig
    from twostroke_engine.quant.scheme import Params, ParamSpec, QuantScheme
    from twostroke_engine.runner.parallel import ParallelGroup
    from twostroke_engine.weights.loader import WeightSource


AnyLinear = TypeVar("AnyLinear", bound=Linear)


class LayerFactory:
    """Makes layers, then loads all of them."""

    def __init__(
        self, backend: Backend, scheme: QuantScheme, group: ParallelGroup, dtype: torch.dtype, rotary: RotaryTable
    ) -> None:
        self.backend = backend
        self.rotary = rotary
        self._scheme = scheme
        self._group = group
        self._dtype = dtype
        self._pulls: list[Pull] = []
        self._linears: list[Linear] = []
        # Old checkpoints store the rotary frequencies, which config.json defines.
        self._unneeded = ["*.rotary_emb.inv_freq"]

    def merged(self, names: Sequence[str], in_features: int, out_features: Sequence[int], bias: bool) -> MergedLinear:
        """Several linear layers with one input."""
        shards = MergedLinear.merged_shards(names, in_features, out_features, self._group)
        return self._keep(MergedLinear(self._scheme, self._allocate(shards, bias)))

    def qkv(self, name: str, config: ModelConfig, bias: bool) -> QKVLinear:
        """`q_proj`, `k_proj` and `v_proj` under `name`."""
        heads = (config.num_heads, config.num_kv_heads)
        shards = QKVLinear.head_shards(name, config.hidden_size, heads, config.head_dim, self._group)
        held = share(f"{name}.q_proj", config.num_heads, self._group)
        return self._keep(QKVLinear(self._scheme, self._allocate(shards, bias), len(held)))

    def row(self, name: str, in_features: int, out_features: int, bias: bool) -> RowLinear:
        """A linear layer whose inputs are split; one rank adds the bias, for the outputs are summed."""
        shards = RowLinear.shards(name, in_features, out_features, self._group)
        held = bias and self._group.rank == 0
        if bias and not held:
            self._unneeded.append(f"{name}.bias")
        return self._keep(RowLinear(self._scheme, self._allocate(shards, held), self._group))

    def norm(self, name: str, config: ModelConfig) -> RowNorm:
        """An RMS norm of hidden states."""
        return RowNorm(self._whole(f"{name}.weight", (config.hidden_size,)), config.rms_norm_eps)

    def head_norm(self, name: str, config: ModelConfig) -> HeadNorm:
        """`q_norm` and `k_norm` under `name`."""
        q_weight, k_weight = (self._whole(f"{name}.{part}.weight", (config.head_dim,)) for part in ("q_norm", "k_norm"))
        return HeadNorm(q_weight, k_weight, config.rms_norm_eps)

    def embedding(self, name: str, config: ModelConfig) -> Embedding:
        """Token embeddings, whole on every rank."""
        return Embedding(self._whole(f"{name}.weight", (config.vocab_size, config.hidden_size)))

    def head(self, name: str, config: ModelConfig, norm: RowNorm, embedding: Embedding) -> Head:
        """The output head, or the embedding's weight again where the two are tied."""
        if config.tie_word_embeddings:
            self._unneeded.append(f"{name}.weight")
            return Head(self.backend, norm, embedding.weight)
        return Head(self.backend, norm, self._whole(f"{name}.weight", (config.vocab_size, config.hidden_size)))

    def load(self, weights: WeightSource) -> None:
        """Fills every layer made so far.

        Raises:
            ModelError: the weights do not fit the model.
        """
        weights.fill(self._pulls, self._unneeded)
        for linear in self._linears:
            linear.prepare()

    def _keep(self, linear: AnyLinear) -> AnyLinear:
        self._linears.append(linear)
        return linear

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.backend.device)

    def _whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that every rank holds whole, in the model's dtype."""
        target = self._empty(shape, self._dtype)
        everything = tuple(slice(0, size) for size in shape)
        self._pulls.append(Pull(target, (Source(name, shape, everything, everything),)))
        return target

    def _allocate(self, shards: Sequence[Shard], bias: bool) -> Params:
        """The tensors of one linear layer, its shards one after the other along the outputs."""
        num_inputs = len(shards[0].inputs)
        num_outputs = sum(len(shard.outputs) for shard in shards)
        params: dict[str, Tensor] = {}
        for spec in self._scheme.params(num_inputs, num_outputs, bias):
            params[spec.name] = self._empty(spec.shape, spec.dtype)
            self._pulls.append(Pull(params[spec.name], tuple(self._sources(spec, shards, bias))))
        return params

    def _sources(self, spec: ParamSpec, shards: Sequence[Shard], bias: bool) -> list[Source]:
        sources = []
        end = 0
        for shard in shards:
            start, end = end, end + len(shard.outputs)
            whole = next(
                whole
                for whole in self._scheme.params(shard.in_features, shard.out_features, bias)
                if whole.name == spec.name
            )
            sources.append(
                Source(
                    name=f"{shard.source}.{spec.name}",
                    shape=whole.shape,
                    read=whole.slices(shard.inputs, shard.outputs),
                    write=spec.slices(range(len(shard.inputs)), range(start, end)),
                )
            )
        return sources
