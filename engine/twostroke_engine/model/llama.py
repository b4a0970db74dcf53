"""Llama, and Mistral without a window: plain attention, gated MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twostroke_kernels.backend import Rotation

from twostroke_engine.model.architecture import Architecture
from twostroke_engine.model.attention import Attention
from twostroke_engine.model.layers import GatedMLP

if TYPE_CHECKING:
    from twostroke_engine.model.config import ModelConfig
    from twostroke_engine.model.factory import LayerFactory


def attention(config: ModelConfig, layers: LayerFactory, layer: int) -> Attention:
    """`attention_bias` gives all four projections a bias."""
    name = f"model.layers.{layer}.self_attn"
    return Attention(
        backend=layers.backend,
        rotation=Rotation(layers.rotary, None),
        layer=layer,
        qkv=layers.qkv(name, config, bias=config.attention_bias),
        out=layers.row(
            f"{name}.o_proj", config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_bias
        ),
        head_dim=config.head_dim,
    )


def mlp(config: ModelConfig, layers: LayerFactory, layer: int) -> GatedMLP:
    """silu(gate) * up, then down."""
    name = f"model.layers.{layer}.mlp"
    wide = config.intermediate_size
    return GatedMLP(
        gate_up=layers.merged(
            (f"{name}.gate_proj", f"{name}.up_proj"), config.hidden_size, (wide, wide), bias=config.mlp_bias
        ),
        down=layers.row(f"{name}.down_proj", wide, config.hidden_size, bias=config.mlp_bias),
    )


ARCHITECTURE = Architecture(names=("LlamaForCausalLM", "MistralForCausalLM"), attention=attention, mlp=mlp)
