"""Tiny random checkpoints in HuggingFace folders, tokenizer included: they load in milliseconds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKENIZER_SIZE = 300
"""Tokens: three special ones, 256 bytes, and merges."""
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
EOS_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog and then there is nothing more that the dog could do about it",
    "What is the capital of France? The capital of France is Paris, and the answer is one sentence.",
    "a router takes requests, a prefill worker computes the prompt, and a decode worker generates the rest",
)
WEIGHT_STD = 0.15
"""Large enough for the best token to stand out from the second, small enough for bf16 to agree with fp32."""


def make_tiny_llama(folder: Path, **overrides: Any) -> Path:
    """A random two-layer Llama (4 query heads, 2 KV heads), any field of its `LlamaConfig` overridden."""
    return make_tiny(folder, "llama", **overrides)


def make_tiny(folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Writes a random checkpoint of a family and a tokenizer.

    Args:
        folder: created if it does not exist.
        family: a model type of transformers (`llama`, `mistral`, `qwen2`, `qwen3`).
        seed: of the weights; equal seeds give equal files.
        dtype: of the stored weights.
        overrides: fields of the family's config; `max_shard_size` splits the weights into several files.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shard_size = overrides.pop("max_shard_size", "1GB")
    config = AutoConfig.for_model(family, **{**_SHAPE, **overrides})
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, WEIGHT_STD)
            if "norm" in name:
                weight.add_(1.0)
    torch.random.set_rng_state(state)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    write_tiny_tokenizer(folder)
    return folder


_SHAPE: Mapping[str, Any] = {
    "vocab_size": TOKENIZER_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def write_tiny_tokenizer(folder: Path) -> None:
    """tokenizer.json (byte-level BPE) and tokenizer_config.json (ChatML) beside a model."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": _SHAPE["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == TOKENIZER_SIZE
    assert tokenizer.token_to_id(IM_END) == EOS_TOKEN_ID
    return tokenizer.to_str()
