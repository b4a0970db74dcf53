"""A child of `compile_ahead`: `python -m twostroke_engine.runner.compile_share K N`, an `EngineConfig` on stdin.

It makes a model of one layer and computes every Nth kind of step, from the Kth on: nothing of it is used, but Triton
keeps what it compiled.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
from twostroke_kernels.choice import choose_backend

from twostroke_engine.config import EngineConfig
from twostroke_engine.model.config import read_model_config
from twostroke_engine.model.families import FAMILIES
from twostroke_engine.runner.cuda_graphs import DecodeBuffers
from twostroke_engine.runner.decode_rows import graph_rows, padded_sizes
from twostroke_engine.runner.memory import num_profile_blocks, profile_plans
from twostroke_engine.runner.model_runner import RunnerBuild, kv_spec, load_decoder, most_positions
from twostroke_engine.runner.piecewise import PieceBuffers, launched_pieces, piece_sizes
from twostroke_engine.runner.warm_up import warm_attention, warm_blocks, warm_sampling
from twostroke_engine.transfer.end import NoSink
from twostroke_engine.weights.random_weights import RandomWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from twostroke_engine.runner.model_runner import ModelRunner
    from twostroke_engine.schedule.plan import StepPlan

MANY_ROWS = 129
"""From here on the number of rows changes no kernel."""


@dataclass(frozen=True, slots=True)
class StepKinds:
    """The kinds of steps that an engine computes, over a model of one layer."""

    build: RunnerBuild
    max_model_len: int

    def calls(self) -> Iterator[Callable[[], None]]:
        """A call for each kind, those that take longest to compile first."""
        config, backend = self.build.config, self.build.backend
        plans = profile_plans(config, config.block_size, self.max_model_len)
        max_rows = graph_rows(config)
        pool = self.build.pool(1 + max(2, num_profile_blocks(plans)))
        logits = torch.empty(max_rows, self.build.model.vocab_size, dtype=torch.float32, device=pool.device)
        decode = DecodeBuffers(pool, max_rows, -(-self.max_model_len // config.block_size), logits)
        pieces = PieceBuffers(self.build.decoder, pool, piece_sizes(config.max_step_tokens)[-1])
        yield partial(warm_sampling, backend, self.build.model.vocab_size)
        yield partial(warm_attention, backend, pool, self.build.model, max_rows, self.max_model_len)
        for size in _of_each_class(padded_sizes(max_rows)):
            yield partial(self._decode, decode, size)
        for size in _of_each_class(piece_sizes(config.max_step_tokens)):
            yield partial(self._pieces, pieces, size)
        runner = self.build.eager_runner(pool)
        for plan in plans:
            yield partial(_execute, runner, plan)
        yield partial(warm_blocks, backend, pool)

    def _decode(self, buffers: DecodeBuffers, size: int) -> None:
        decoder = self.build.decoder
        decoder.write_logits(decoder(buffers.inputs(size)), buffers.logits[:size])

    def _pieces(self, buffers: PieceBuffers, size: int) -> None:
        for piece in launched_pieces(self.build.decoder, buffers, size):
            piece()


def _of_each_class(sizes: Sequence[int]) -> list[int]:
    """The largest size of each class."""
    return list({_class_of(size): size for size in sizes}.values())


def _class_of(num_rows: int) -> int:
    """Kernels of few rows are compiled for a power of two of them, 16 at least; one row has kernels of its own."""
    if num_rows == 1:
        return 1
    return min(MANY_ROWS, max(16, 1 << (num_rows - 1).bit_length()))


def _execute(runner: ModelRunner, plan: StepPlan) -> None:
    runner.execute(plan, NoSink())


def step_kinds(config: EngineConfig) -> StepKinds:
    """Builds the model of one layer."""
    device = torch.device(config.device)
    folder = Path(config.model_dir)
    model = msgspec.structs.replace(read_model_config(folder, FAMILIES), num_layers=1)
    max_model_len = most_positions(config, model)
    backend = choose_backend(device, config.batch_invariant)
    decoder = load_decoder(config, model, RandomWeights(device), backend, max_model_len)
    return StepKinds(RunnerBuild(config, model, kv_spec(config, model), decoder, backend), max_model_len)


@torch.inference_mode()
def compute_share(config: EngineConfig, share: int, num_shares: int) -> int:
    """Computes this share of the kinds of steps; how many there were."""
    torch.set_num_threads(1)
    calls = list(step_kinds(config).calls())[share::num_shares]
    for call in calls:
        call()
    if config.device.startswith("cuda"):
        torch.cuda.synchronize(config.device)
    return len(calls)


if __name__ == "__main__":
    compute_share(
        msgspec.msgpack.decode(sys.stdin.buffer.read(), type=EngineConfig), int(sys.argv[1]), int(sys.argv[2])
    )
