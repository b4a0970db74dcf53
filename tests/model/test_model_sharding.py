"""The sharding seam: two ranks that hold half of every layer give the logits of one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from twostroke_engine.model.config import ModelError, read_model_config
from twostroke_engine.model.decoder import build_decoder
from twostroke_engine.model.factory import LayerFactory
from twostroke_engine.model.families import FAMILIES
from twostroke_engine.model.layers import rotary_table
from twostroke_engine.model.linear import ColumnLinear, QKVLinear, RowLinear
from twostroke_engine.quant.dense import Dense
from twostroke_engine.quant.scheme import ParamSpec
from twostroke_engine.runner.forward import EagerForward
from twostroke_engine.runner.model_runner import LoadedModel, ModelRunner
from twostroke_engine.runner.parallel import OneRank
from twostroke_engine.weights.checkpoint import Checkpoint
from twostroke_kernels.choice import choose_backend

from tests.support.model_oracle import load, logprobs_along, random_tokens
from tests.support.tiny_model import make_tiny

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


class Exchange:
    """Where the threads of a group meet."""

    def __init__(self, size: int) -> None:
        self.parts: list[torch.Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)


class ThreadRank:
    """One rank of a group whose ranks are threads."""

    def __init__(self, rank: int, size: int, exchange: Exchange | None = None) -> None:
        self.rank, self.size = rank, size
        self._exchange = exchange or Exchange(size)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._exchange.parts[self.rank] = x
        self._exchange.barrier.wait()
        total = torch.stack([part for part in self._exchange.parts if part is not None]).sum(0)
        self._exchange.barrier.wait()
        return total


def rank_of(folder: Path, group: ThreadRank, whole: LoadedModel) -> LoadedModel:
    """A rank's share of the model; its pool holds the rank's KV heads only."""
    config = read_model_config(folder, FAMILIES)
    backend = choose_backend(CPU)
    rotary = rotary_table(config.rope, config.head_dim, whole.max_model_len, CPU)
    layers = LayerFactory(backend, Dense(backend, torch.float32), group, torch.float32, rotary)
    decoder = build_decoder(FAMILIES[config.architecture], config, layers)
    layers.load(Checkpoint.open(folder))
    num_heads = max(1, config.num_kv_heads // group.size)
    pool = torch.zeros(whole.num_blocks, config.num_layers, 2, 16, num_heads, config.head_dim)
    fields = {name: getattr(whole, name) for name in LoadedModel.__slots__}
    return LoadedModel(**{**fields, "runner": ModelRunner(EagerForward(decoder, pool), backend, pool, config)})


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1}),
        ("qwen3", {}),
    ],
)
def test_two_ranks_equal_one(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, family, **overrides)
    whole = load(folder)
    tokens = random_tokens(30)
    exchange = Exchange(2)
    ranks = [rank_of(folder, ThreadRank(rank, 2, exchange), whole) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda rank: logprobs_along(rank, tokens, num_prompt=27, chunks=(9,)), ranks)
    assert torch.equal(first, second)
    assert torch.allclose(first, logprobs_along(whole, tokens, num_prompt=27, chunks=(9,)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_partition_the_features(size: int) -> None:
    groups = [ThreadRank(rank, size) for rank in range(size)]
    outputs = [f for group in groups for shard in ColumnLinear.shards("x", 6, 8, group) for f in shard.outputs]
    inputs = [f for group in groups for shard in RowLinear.shards("x", 8, 6, group) for f in shard.inputs]
    assert outputs == inputs == list(range(8))


def test_kv_heads_are_replicated_where_ranks_outnumber_them() -> None:
    """4 ranks, 8 query heads and 2 KV heads of size 3: each query head meets its own KV head."""
    for rank in range(4):
        queries, keys, values = QKVLinear.head_shards("a", 5, (8, 2), 3, ThreadRank(rank, 4))
        assert queries.outputs == range(rank * 6, rank * 6 + 6)
        assert keys.outputs == values.outputs == range(rank // 2 * 3, rank // 2 * 3 + 3)
        assert (queries.source, keys.source, values.source) == ("a.q_proj", "a.k_proj", "a.v_proj")


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ModelError, match=r"mlp\.up.*7.*2 ranks"):
        ColumnLinear.shards("mlp.up", 4, 7, ThreadRank(0, 2))
    with pytest.raises(ModelError, match="3 KV heads"):
        QKVLinear.head_shards("a", 5, (8, 3), 3, ThreadRank(0, 4))
    assert ColumnLinear.shards("mlp.up", 4, 7, OneRank())[0].outputs == range(7)


def test_param_spec_slices_packed_formats() -> None:
    """Eight int4 inputs in an int32; a scale for 32 inputs and each output; an order of inputs for all outputs."""
    packed = ParamSpec("qweight", (16, 24), torch.int32, output_axis=1, input_axis=0, input_unit=8)
    scales = ParamSpec("scales", (4, 24), torch.float16, output_axis=1, input_axis=0, input_unit=32)
    order = ParamSpec("g_idx", (128,), torch.int32, input_axis=0)
    inputs, outputs = range(64, 128), range(12, 24)
    assert packed.slices(inputs, outputs) == (slice(8, 16), slice(12, 24))
    assert scales.slices(inputs, outputs) == (slice(2, 4), slice(12, 24))
    assert order.slices(inputs, outputs) == (slice(64, 128),)
    with pytest.raises(ValueError, match="units of 32"):
        scales.slices(range(8, 40), outputs)
