"""How many KV blocks a device holds: what the user said, or what a profile run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from twostroke_engine.model.config import ModelError
from twostroke_engine.request import SamplingParams
from twostroke_engine.schedule.plan import NewSequence, Scheduled, StepPlan
from twostroke_engine.transfer.end import NoSink

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from twostroke_engine.config import EngineConfig
    from twostroke_engine.kv.spec import KVSpec
    from twostroke_engine.runner.model_runner import ModelRunner

CPU_KV_CACHE_BYTES = 1 << 30
MOST_LIBRARY_BYTES = 2 << 30
"""CUDA's context, kernels and workspaces take no more. What else is gone by then, another process took meanwhile."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a profile run found, in bytes."""

    total: int
    """The whole device."""
    free_at_start: int
    """Before this process loaded anything."""
    free: int
    """Now, with weights in place and nothing else."""
    reserved: int
    """Held by torch now: weights, and what its allocator keeps."""
    peak: int
    """The most that torch's tensors took at once, the KV of the profile run left out."""
    captured: int = 0
    """What captured steps will hold besides."""

    def for_kv(self, fraction: float) -> int:
        """Bytes of KV that keep this process within its fraction of the device, and fit beside other processes."""
        libraries = min(max(0, self.free_at_start - self.free - self.reserved), MOST_LIBRARY_BYTES)
        budget = int(self.total * fraction) - libraries - self.peak - self.captured
        room = self.free - max(0, self.peak - self.reserved) - self.captured
        return min(budget, room)


def told_num_blocks(config: EngineConfig, spec: KVSpec, device: torch.device) -> int | None:
    """What the configuration says outright; None if it is to be measured.

    Raises:
        ModelError: it says too little.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_bytes is None and device.type == "cuda":
        return None
    kv_cache_bytes = CPU_KV_CACHE_BYTES if config.kv_cache_bytes is None else config.kv_cache_bytes
    num_blocks = kv_cache_bytes // spec.block_bytes
    if num_blocks < 1:
        raise ModelError(f"kv_cache_bytes ({kv_cache_bytes}) holds no block of {spec.block_bytes} bytes")
    return num_blocks


def measured_num_blocks(
    config: EngineConfig,
    spec: KVSpec,
    free_at_start: int,
    make_pool: Callable[[int], Tensor],
    make_runner: Callable[[Tensor], ModelRunner],
    max_model_len: int,
) -> int:
    """KV blocks beside weights and the largest steps there can be, which are run once over a pool of garbage.

    Raises:
        ModelError: nothing is left.
    """
    plans = profile_plans(config, spec.block_size, max_model_len)
    pool = make_pool(num_profile_blocks(plans))
    device = pool.device
    torch.cuda.reset_peak_memory_stats(device)
    weights = torch.cuda.memory_allocated(device) - pool.nbytes
    try:
        runner = make_runner(pool)
        for plan in plans:
            runner.execute(plan, NoSink())
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"a step of max_step_tokens ({config.max_step_tokens}) and max_running ({config.max_running}) does not fit "
            f"into the memory of {config.device}"
        ) from error
    peak = torch.cuda.max_memory_allocated(device) - pool.nbytes
    # The pieces of a full step are captured, and never give back what it takes.
    captured = peak - weights if runner.backend.captures_graphs else 0
    del runner, pool
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    memory = DeviceMemory(total, free_at_start, free, torch.cuda.memory_reserved(device), peak, captured)
    num_blocks = memory.for_kv(config.gpu_memory_fraction) // spec.block_bytes
    if num_blocks < 2:
        raise ModelError(
            f"gpu_memory_fraction ({config.gpu_memory_fraction}) of {total} bytes leaves no room for KV beside weights "
            f"and activations ({peak} bytes; {free} bytes are free)"
        )
    return num_blocks


def profile_plans(config: EngineConfig, block_size: int, max_model_len: int) -> tuple[StepPlan, StepPlan]:
    """Two full steps: one long chunk, and as many prompts as may run, each with a token to choose."""
    longest = min(config.max_step_tokens, max_model_len)
    many = min(config.max_running, config.max_step_tokens)
    each = min(max(1, config.max_step_tokens // many), max_model_len)
    return _plan(1, 1, longest, block_size), _plan(2, many, each, block_size)


def num_profile_blocks(plans: tuple[StepPlan, ...]) -> int:
    """Blocks that the plans name."""
    return 1 + max(block for plan in plans for new in plan.new for block in new.block_ids)


def _plan(step: int, num_sequences: int, num_tokens: int, block_size: int) -> StepPlan:
    """Every sequence writes to the same blocks: what they hold does not matter."""
    blocks = tuple(range(-(-num_tokens // block_size)))
    first = step * 1_000_000
    sampling = SamplingParams(temperature=1.0, top_p=0.9)
    ids = range(first, first + num_sequences)
    return StepPlan(
        step=step,
        new=tuple(
            NewSequence(
                sequence_id=sequence_id,
                token_ids=(0,) * num_tokens,
                num_prompt_tokens=num_tokens,
                sampling=sampling,
                block_ids=blocks,
            )
            for sequence_id in ids
        ),
        scheduled=tuple(
            Scheduled(sequence_id=sequence_id, start=0, count=num_tokens, choices=(0,)) for sequence_id in ids
        ),
    )
