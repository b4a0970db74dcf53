"""Qwen2: Llama with a bias on queries, keys and values, and on nothing else."""

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
    """The biases are not named in config.json: the family always has them."""
    name = f"model.layers.{layer}.self_attn"
    return Attention(
        backend=layers.backend,
        rotation=Rotation(layers.rotary, None),
        layer=layer,
        qkv=layers.qkv(name, config, bias=True),
        out=layers.row(f"{name}.o_proj", config.num_heads * config.head_dim, config.hidden_size, bias=False),
        head_dim=config.head_dim,
    )


ARCHITECTURE = Architecture(names=("Qwen2ForCausalLM",), attention=attention, mlp=llama.mlp)
