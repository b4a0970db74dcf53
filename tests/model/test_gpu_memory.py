"""How many KV blocks a GPU gets: arithmetic and the profile's steps, on any machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.model.config import ModelError
from twostroke_engine.runner.forward import EagerForward
from twostroke_engine.runner.memory import (
    DeviceMemory,
    num_profile_blocks,
    profile_plans,
    told_num_blocks,
)
from twostroke_engine.runner.model_runner import LoadedModel, ModelRunner
from twostroke_engine.transfer.end import NoSink

from tests.support.model_oracle import load

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("memory", "fraction", "kv"),
    [
        # 100 of memory, all free at first; 20 of weights, 8 more at the peak, 2 taken by libraries.
        (DeviceMemory(total=100, free_at_start=100, free=78, reserved=20, peak=28), 0.9, 90 - 2 - 28),
        (DeviceMemory(total=100, free_at_start=100, free=78, reserved=20, peak=28), 0.5, 50 - 2 - 28),
        # Another process holds 45 and holds on to it: its share is not ours to count, but its memory is not there.
        (DeviceMemory(total=100, free_at_start=55, free=33, reserved=20, peak=28), 0.45, 45 - 2 - 28),
        (DeviceMemory(total=100, free_at_start=55, free=33, reserved=20, peak=28), 0.9, 33 - 8),
        # Another process has let go of memory meanwhile.
        (DeviceMemory(total=100, free_at_start=50, free=75, reserved=20, peak=25), 0.8, 80 - 25),
        # Captured steps keep memory of their own.
        (DeviceMemory(total=100, free_at_start=100, free=78, reserved=20, peak=28, captured=5), 0.9, 90 - 2 - 28 - 5),
        (DeviceMemory(total=100, free_at_start=55, free=33, reserved=20, peak=28, captured=5), 0.9, 33 - 8 - 5),
        # What torch keeps may serve the peak.
        (DeviceMemory(total=100, free_at_start=100, free=68, reserved=30, peak=28), 1.0, 68),
        (DeviceMemory(total=100, free_at_start=100, free=8, reserved=90, peak=95), 0.9, -7),
    ],
)
def test_bytes_for_kv(memory: DeviceMemory, fraction: float, kv: int) -> None:
    assert memory.for_kv(fraction) == kv


def test_what_another_process_takes_meanwhile_is_not_this_ones() -> None:
    """Two workers that start on one card at once would else each count the other's weights as their own."""
    gib = 1 << 30
    memory = DeviceMemory(total=80 * gib, free_at_start=80 * gib, free=46 * gib, reserved=16 * gib, peak=17 * gib)
    assert memory.for_kv(0.45) == int(80 * gib * 0.45) - 2 * gib - 17 * gib


def test_who_says_how_many_blocks(loaded: LoadedModel) -> None:
    block_bytes = loaded.spec.block_bytes
    measured = EngineConfig(model_dir="")
    told = EngineConfig(model_dir="", kv_cache_bytes=7 * block_bytes + 1)
    assert told_num_blocks(measured, loaded.spec, CUDA) is None
    assert told_num_blocks(measured, loaded.spec, CPU) == (1 << 30) // block_bytes
    assert told_num_blocks(told, loaded.spec, CUDA) == told_num_blocks(told, loaded.spec, CPU) == 7
    assert told_num_blocks(EngineConfig(model_dir="", num_blocks=5, kv_cache_bytes=1), loaded.spec, CUDA) == 5


@pytest.mark.parametrize("fraction", [0.0, 1.1, float("nan")])
def test_refused_fractions(fraction: float, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="gpu_memory_fraction"):
        load(tiny_llama, gpu_memory_fraction=fraction)


@pytest.mark.parametrize(
    ("max_step_tokens", "max_running", "max_model_len"), [(96, 8, 2048), (96, 200, 2048), (300, 4, 50), (1, 1, 16)]
)
def test_profile_runs_the_largest_steps(
    max_step_tokens: int, max_running: int, max_model_len: int, loaded: LoadedModel
) -> None:
    config = EngineConfig(model_dir="", max_step_tokens=max_step_tokens, max_running=max_running)
    plans = profile_plans(config, 16, max_model_len)
    assert max(plan.num_tokens for plan in plans) <= max_step_tokens
    assert plans[0].num_tokens == min(max_step_tokens, max_model_len)
    assert len(plans[1].scheduled) == min(max_running, max_step_tokens)
    pool = torch.zeros(num_profile_blocks(plans), *loaded.runner.kv_pool.shape[1:])
    assert isinstance(loaded.runner.forward, EagerForward)
    forward = EagerForward(loaded.runner.forward._decoder, pool)
    runner = ModelRunner(forward, loaded.runner.backend, pool, loaded.runner.model)
    for plan in plans:
        assert len(runner.execute(plan, NoSink()).sampled) == len(plan.scheduled)
