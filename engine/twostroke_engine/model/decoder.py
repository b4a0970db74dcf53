"""`Decoder`: the whole model, from token ids to logits, in pieces that end where attention begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from twostroke_engine.model.attention import StepAttention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from twostroke_kernels.backend import RowNorm

    from twostroke_engine.model.architecture import Architecture
    from twostroke_engine.model.attention import Attention
    from twostroke_engine.model.config import ModelConfig
    from twostroke_engine.model.factory import LayerFactory
    from twostroke_engine.model.layers import Embedding, GatedMLP, Head
    from twostroke_engine.runner.inputs import ForwardInputs


@dataclass(frozen=True, slots=True)
class Activations:
    """What pieces of a forward pass leave to each other; every layer writes over the one before."""

    hidden: Tensor
    """[T, E], the residual stream."""
    q: Tensor
    """[T, H, D]."""
    attended: Tensor
    """[T, H, D]."""

    def first(self, num_tokens: int) -> Activations:
        """The first rows."""
        return Activations(self.hidden[:num_tokens], self.q[:num_tokens], self.attended[:num_tokens])


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then MLP, each of a norm of the residual stream and added to it."""

    attention_norm: RowNorm
    attention: Attention
    mlp_norm: RowNorm
    mlp: GatedMLP

    def begin(self, inputs: ForwardInputs, step: Activations) -> None:
        """What comes before attention."""
        self.attention.begin(step.hidden, self.attention_norm, inputs, step.q)

    def finish(self, step: Activations) -> None:
        """What comes after it."""
        self.attention.finish(step.hidden, step.attended)
        self.mlp.add(step.hidden, self.mlp_norm)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal language model over a paged KV cache."""

    embedding: Embedding
    layers: tuple[DecoderLayer, ...]
    head: Head

    @property
    def num_pieces(self) -> int:
        """Pieces of a forward pass: between them each layer attends once."""
        return len(self.layers) + 1

    def activations(self, num_tokens: int) -> Activations:
        """Room for so many tokens."""
        weight, attention = self.embedding.weight, self.layers[0].attention
        shape = (num_tokens, attention.qkv.num_heads, attention.head_dim)
        q, attended = (torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        hidden = torch.empty((num_tokens, weight.shape[1]), dtype=weight.dtype, device=weight.device)
        return Activations(hidden, q, attended)

    def __call__(self, inputs: ForwardInputs) -> Tensor:
        """Computes the step's tokens, writes their KV, and returns the residual stream [T, E]."""
        step = self.activations(inputs.token_ids.shape[0])
        self.run(inputs, step, lambda number: self.run_piece(number, inputs, step))
        return step.hidden

    def run(self, inputs: ForwardInputs, step: Activations, piece: Callable[[int], None]) -> None:
        """A forward pass whose pieces `piece` computes, by their number."""
        attention = StepAttention.of(inputs, step.q, step.attended)
        for number, (layer, kv_layer) in enumerate(zip(self.layers, inputs.kv_layers, strict=True)):
            piece(number)
            # Told before attention runs, so that sending the layer overlaps with the rest of its work.
            inputs.sink.layer_written(number)
            layer.attention.attend(attention, kv_layer)
        piece(len(self.layers))

    def run_piece(self, number: int, inputs: ForwardInputs, step: Activations) -> None:
        """Finishes the layer before (the first piece embeds instead) and begins layer `number` (the last does not)."""
        if number == 0:
            self.embedding.write(inputs.token_ids, step.hidden)
        else:
            self.layers[number - 1].finish(step)
        if number < len(self.layers):
            self.layers[number].begin(inputs, step)

    def logits(self, hidden: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 logits [R, V] of some rows only: the head is a large part of a small model's work."""
        return self.head(hidden[rows], out)

    def write_logits(self, hidden: Tensor, out: Tensor) -> None:
        """float32 logits of every row, into a tensor that is there already."""
        self.head(hidden, out)


def build_decoder(architecture: Architecture, config: ModelConfig, layers: LayerFactory) -> Decoder:
    """Allocates a decoder; the factory loads it."""
    embedding = layers.embedding("model.embed_tokens", config)
    blocks = tuple(_layer(architecture, config, layers, number) for number in range(config.num_layers))
    norm = layers.norm("model.norm", config)
    return Decoder(embedding, blocks, layers.head("lm_head", config, norm, embedding))


def _layer(architecture: Architecture, config: ModelConfig, layers: LayerFactory, number: int) -> DecoderLayer:
    name = f"model.layers.{number}"
    return DecoderLayer(
        attention_norm=layers.norm(f"{name}.input_layernorm", config),
        attention=architecture.attention(config, layers, number),
        mlp_norm=layers.norm(f"{name}.post_attention_layernorm", config),
        mlp=architecture.mlp(config, layers, number),
    )
