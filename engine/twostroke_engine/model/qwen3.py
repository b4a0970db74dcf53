"""Qwen3: Llama with an RMS norm of every query and key head before rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twostroke_kernels.backend import Rotation

from twostroke_engine.model import llama
from twostroke_engine.model.architecture import Architecture
from twostroke_engine.model.attention import Attention

if TYPE_CHECKING:
    from twostroke_engine.model.config import ModelConfig
    from twostroke_engine.model.factory import LayerFactory


def attention(config: ModelConfig, layers: LayerFactory, layer: int) -> Attention:
    """Head norms share one weight over all heads of a layer."""
    name = f"model.layers.{layer}.self_attn"
    return Attention(
        backend=layers.backend,
        layer=layer,
        qkv=layers.qkv(name, config, bias=config.attention_bias),
        out=layers.row(
            f"{name}.o_proj", config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_bias
        ),
        rotation=Rotation(layers.rotary, layers.head_norm(name, config)),
        head_dim=config.head_dim,
    )


ARCHITECTURE = Architecture(names=("Qwen3ForCausalLM",), attention=attention, mlp=llama.mlp)
