"""`Decoder`: the whole model, from token ids to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from twostroke_engine.model.architecture import Architecture
    from twostroke_engine.model.attention import Attention
    from twostroke_engine.model.config import ModelConfig
    from twostroke_engine.model.factory import LayerFactory
    from twostroke_engine.model.layers import Embedding, GatedMLP, Head, RMSNorm
    from twostroke_engine.runner.inputs import ForwardInputs


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then MLP, each after a norm; the residual stream is carried beside `x`."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    def __call__(self, x: Tensor, residual: Tensor, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
        """(output of the MLP, residual stream), not yet summed."""
        x, residual = self.attention_norm.add(x, residual)
        x = self.attention(x, inputs)
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp(x), residual


@dataclass(frozen=True, slots=True)
class Hidden:
    """What the last layer leaves: its output and the residual stream, not yet summed nor normed."""

    x: Tensor
    residual: Tensor


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal language model over a paged KV cache."""

    embedding: Embedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: Head

    def __call__(self, inputs: ForwardInputs) -> Hidden:
        """Computes the step's tokens and writes their KV."""
        x = self.embedding(inputs.token_ids)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual, inputs)
        return Hidden(x, residual)

    def logits(self, hidden: Hidden, rows: Tensor) -> Tensor:
        """float32 logits [R, V] of some rows only: the head is a large part of a small model's work."""
        return self.head(self._last(hidden, rows))

    def write_logits(self, hidden: Hidden, out: Tensor) -> None:
        """float32 logits of every row, into a tensor that is there already."""
        self.head.write(self._last(hidden, slice(None)), out)

    def _last(self, hidden: Hidden, rows: Tensor | slice) -> Tensor:
        x, _ = self.norm.add(hidden.x[rows], hidden.residual[rows])
        return x


def build_decoder(architecture: Architecture, config: ModelConfig, layers: LayerFactory) -> Decoder:
    """Allocates a decoder; the factory loads it."""
    embedding = layers.embedding("model.embed_tokens", config)
    return Decoder(
        embedding=embedding,
        layers=tuple(_layer(architecture, config, layers, number) for number in range(config.num_layers)),
        norm=layers.norm("model.norm", config),
        head=layers.head("lm_head", config, embedding),
    )


def _layer(architecture: Architecture, config: ModelConfig, layers: LayerFactory, number: int) -> DecoderLayer:
    name = f"model.layers.{number}"
    return DecoderLayer(
        attention_norm=layers.norm(f"{name}.input_layernorm", config),
        attention=architecture.attention(config, layers, number),
        mlp_norm=layers.norm(f"{name}.post_attention_layernorm", config),
        mlp=architecture.mlp(config, layers, number),
    )
