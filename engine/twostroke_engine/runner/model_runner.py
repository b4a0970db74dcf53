"""`ModelRunner`: executes step plans. `build_runner`: from a configuration to a loaded model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from twostroke_kernels.choice import choose_backend, runs_triton

from twostroke_engine.kv.spec import DTYPE_BYTES, KVSpec, LayerGroup
from twostroke_engine.model.config import ModelError, read_model_config
from twostroke_engine.model.decoder import build_decoder
from twostroke_engine.model.factory import LayerFactory
from twostroke_engine.model.families import FAMILIES
from twostroke_engine.model.layers import rotary_table
from twostroke_engine.quant.dense import Dense
from twostroke_engine.runner.compile_ahead import compile_ahead
from twostroke_engine.runner.cuda_graphs import graph_forward
from twostroke_engine.runner.decode_rows import graph_rows
from twostroke_engine.runner.flight import NOTHING, Flight
from twostroke_engine.runner.forward import EagerForward
from twostroke_engine.runner.inputs import FreshTokens, chunks_in_order
from twostroke_engine.runner.memory import measured_num_blocks, told_num_blocks
from twostroke_engine.runner.parallel import OneRank
from twostroke_engine.runner.sequence import RunnerSequence
from twostroke_engine.runner.upload import uploader
from twostroke_engine.runner.warm_up import warm_up
from twostroke_engine.sample.logits import adjustments_for
from twostroke_engine.sample.sampler import Sampler, SampleRow
from twostroke_engine.schedule.plan import Sampled, StepOutput
from twostroke_engine.weights.checkpoint import Checkpoint
from twostroke_engine.weights.fingerprint import model_fingerprint
from twostroke_engine.weights.random_weights import RandomWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from twostroke_kernels.backend import Backend

    from twostroke_engine.config import EngineConfig
    from twostroke_engine.model.config import ModelConfig
    from twostroke_engine.model.decoder import Decoder
    from twostroke_engine.runner.forward import ForwardPath
    from twostroke_engine.runner.inputs import Chunk
    from twostroke_engine.schedule.plan import BlockCopy, NewSequence, Scheduled, StepPlan
    from twostroke_engine.transfer.end import KVSink
    from twostroke_engine.weights.loader import WeightSource

DEVICE_TYPES = ("cpu", "cuda")


class ModelRunner:
    """One rank's model, KV pool and copies of the sequences it was told of."""

    def __init__(
        self,
        forward: ForwardPath,
        backend: Backend,
        kv_pool: Tensor,
        model: ModelConfig,
        batch_invariant: bool = False,
    ) -> None:
        self.backend = backend
        self.kv_pool = kv_pool
        self.forward = forward
        self.model = model
        self._block_size = kv_pool.shape[3]
        self._upload = uploader(backend.device)
        self._sampler = Sampler(backend, model.vocab_size)
        self._sequences: dict[int, RunnerSequence] = {}
        self._newest = NOTHING
        self._by_position = batch_invariant
        self.overlaps = forward.overlaps
        """Launching a step returns before the device is done."""

    @torch.inference_mode()
    def launch(self, plan: StepPlan, sink: KVSink) -> Callable[[], StepOutput]:
        """Starts one step; the call that comes back waits for its end. Steps land in the order of their launches.

        Args:
            plan: what to compute; its order of work is written there. A token that the step before chooses, and that
                the host does not know yet, is taken from the device.
            sink: hears of each layer, in order, as soon as the layer's KV of this step is in the pool.
        """
        for sequence_id in plan.finished:
            self._sequences.pop(sequence_id, None)
        self._copy_blocks(plan.copies)
        for new in plan.new:
            self._sequences[new.sequence_id] = self._learn(new)
        for entry in plan.scheduled:
            if entry.new_block_ids:
                self._sequences[entry.sequence_id].blocks.extend(entry.new_block_ids)
        flight = self._newest = self._compute(plan.scheduled, sink)
        return lambda: StepOutput(step=plan.step, sampled=tuple(self._land(flight)))

    def execute(self, plan: StepPlan, sink: KVSink) -> StepOutput:
        """Runs one step to its end."""
        return self.launch(plan, sink)()

    def _compute(self, scheduled: Sequence[Scheduled], sink: KVSink) -> Flight:
        if not scheduled:
            return NOTHING
        chunks, last_rows = chunks_in_order(scheduled, self._sequences, self._by_position)
        if self.backend.reads_unwritten:
            self._clear_begun(chunks)
        ends = [(entry, row) for entry, row in zip(scheduled, last_rows, strict=True) if entry.choices]
        logits = self.forward.logits(chunks, [row for _, row in ends], sink, self._fresh_tokens(chunks))
        return NOTHING if logits is None else self._choose(logits, [entry for entry, _ in ends])

    def _fresh_tokens(self, chunks: Sequence[Chunk]) -> FreshTokens | None:
        """The tokens of chunks that end with one that only the device knows."""
        ends = accumulate(chunk.count for chunk in chunks)
        fresh = [
            (end - 1, chunk.sequence)
            for chunk, end in zip(chunks, ends, strict=True)
            if chunk.end > len(chunk.sequence.tokens)
        ]
        if not fresh:
            return None
        assert self._newest.choosing is not None, "no step chooses what this one begins with"
        own_rows = self._newest.own_rows()
        sources = np.array([own_rows[sequence] for _, sequence in fresh], dtype=np.int64)
        token_ids = self._newest.choosing.token_ids
        if not np.array_equal(sources, np.arange(len(token_ids))):
            token_ids = token_ids[self._upload(sources)]
        return FreshTokens(np.array([row for row, _ in fresh], dtype=np.int64), token_ids)

    def _learn(self, new: NewSequence) -> RunnerSequence:
        adjustments = adjustments_for(
            new.sampling, new.token_ids, new.num_prompt_tokens, self.model.eos_token_ids, self.model.vocab_size
        )
        return RunnerSequence(new, adjustments)

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        if not copies:
            return
        ends = self._upload(np.array([(copy.source, copy.target) for copy in copies], dtype=np.int64).T.copy())
        self.backend.copy_blocks(self.kv_pool, ends[0], ends[1])

    def _clear_begun(self, chunks: Sequence[Chunk]) -> None:
        """Zeroes blocks that this step begins and does not fill: NaN in an unused row would reach P.V."""
        begun = [block for chunk in chunks if (block := chunk.begun_block(self._block_size)) is not None]
        if begun:
            self.kv_pool.index_fill_(0, self._upload(np.array(begun, dtype=np.int64)), 0)

    def _choose(self, logits: Tensor, ends: Sequence[Scheduled]) -> Flight:
        """`logits` has one row per entry, whatever its number of choices."""
        rows = [self._sample_row(entry, choice) for entry in ends for choice in entry.choices]
        if len(rows) > len(ends):
            counts = self._upload(np.array([len(entry.choices) for entry in ends], dtype=np.int64))
            logits = logits.repeat_interleave(counts, dim=0, output_size=len(rows))
        firsts = accumulate((len(entry.choices) for entry in ends[:-1]), initial=0)
        sequences = [self._sequences[entry.sequence_id] for entry in ends]
        return Flight(tuple(ends), tuple(sequences), tuple(firsts), self._sampler.start(logits, rows))

    def _land(self, flight: Flight) -> Iterator[Sampled]:
        """Waits for a flight's tokens."""
        chosen = flight.choosing.result() if flight.choosing else []
        for entry, sequence, first in zip(flight.entries, flight.sequences, flight.rows, strict=True):
            tokens = chosen[first : first + len(entry.choices)]
            finite = all(token.finite for token in tokens)
            sampled = Sampled(
                sequence_id=entry.sequence_id, tokens=tuple(token.token for token in tokens), finite=finite
            )
            # The sequence goes on with its own choice; the others arrive as new sequences.
            if finite and sequence.choice in entry.choices:
                sequence.append_token(tokens[entry.choices.index(sequence.choice)].token.id)
            yield sampled

    def _sample_row(self, entry: Scheduled, choice: int) -> SampleRow:
        sequence = self._sequences[entry.sequence_id]
        position = entry.start + entry.count
        return SampleRow(
            params=sequence.sampling,
            choice=choice,
            position=position,
            num_generated=position - sequence.num_prompt_tokens,
            adjustments=sequence.adjustments,
        )


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A runner and what the engine must know of it."""

    runner: ModelRunner
    spec: KVSpec
    num_blocks: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    model_fingerprint: str


def build_runner(config: EngineConfig, compiles_ahead: bool = False) -> LoadedModel:
    """Loads the model and allocates the KV pool.

    Args:
        config: of the engine.
        compiles_ahead: kernels that are not cached are first compiled by several processes (`compile_ahead`).

    Raises:
        ModelError: anything that the user can put right; one line.
    """
    device = _device(config)
    folder = Path(config.model_dir)
    model = read_model_config(folder, FAMILIES)
    if compiles_ahead and runs_triton(device):
        compile_ahead(config)
    free_at_start = _free_bytes(device)
    weights = _weights(config, folder, device)
    spec = kv_spec(config, model)
    num_blocks = told_num_blocks(config, spec, device)
    max_model_len = most_positions(config, model)
    if num_blocks is not None:
        max_model_len = min(max_model_len, num_blocks * config.block_size)
    torch.set_num_threads(config.num_threads)
    backend = choose_backend(device, config.batch_invariant)
    decoder = load_decoder(config, model, weights, backend, max_model_len)
    build = RunnerBuild(config, model, spec, decoder, backend)
    if num_blocks is None:
        num_blocks = measured_num_blocks(config, spec, free_at_start, build.pool, build.eager_runner, max_model_len)
        max_model_len = min(max_model_len, num_blocks * config.block_size)
    return LoadedModel(
        runner=build.runner(num_blocks, max_model_len),
        spec=spec,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        model_fingerprint=model_fingerprint(model, config.dtype, weights, config.batch_invariant),
    )


@dataclass(frozen=True, slots=True)
class RunnerBuild:
    """A loaded decoder, about to become a runner."""

    config: EngineConfig
    model: ModelConfig
    spec: KVSpec
    decoder: Decoder
    backend: Backend

    def pool(self, num_blocks: int) -> Tensor:
        """A pool of zeros: NaN in rows that nothing has written would reach P.V."""
        group = self.spec.groups[0]
        shape = (num_blocks, self.spec.num_layers, 2, self.spec.block_size, group.num_kv_heads, group.head_dim)
        device = self.backend.device
        try:
            return torch.zeros(shape, dtype=getattr(torch, self.spec.dtype), device=device)
        except RuntimeError as error:  # torch raises no narrower one when a CPU has too little memory
            raise ModelError(
                f"cannot allocate {num_blocks * self.spec.block_bytes} bytes of KV cache ({num_blocks} blocks) on "
                f"{device}"
            ) from error

    def eager_runner(self, pool: Tensor) -> ModelRunner:
        """A runner without graphs."""
        return self._runner(EagerForward(self.decoder, pool), pool)

    def runner(self, num_blocks: int, max_model_len: int) -> ModelRunner:
        """The runner that serves; with graphs where the backend can be captured."""
        if not self.backend.captures_graphs:
            return self.eager_runner(self.pool(num_blocks))
        # One block beyond those that the scheduler knows: padding rows write there.
        pool = self.pool(num_blocks + 1)
        max_rows = graph_rows(self.config)
        try:
            logits = torch.empty(max_rows, self.model.vocab_size, dtype=torch.float32, device=pool.device)
            forward = graph_forward(self.decoder, pool, max_model_len, self.config.max_step_tokens, logits)
            warm_up(self.backend, pool[:num_blocks], self.model, max_rows, max_model_len)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"the KV cache leaves no room for graphs of {max_rows} sequences: lower gpu_memory_fraction "
                f"({self.config.gpu_memory_fraction}), num_blocks or kv_cache_bytes"
            ) from error
        return self._runner(forward, pool[:num_blocks])

    def _runner(self, forward: ForwardPath, pool: Tensor) -> ModelRunner:
        return ModelRunner(forward, self.backend, pool, self.model, self.config.batch_invariant)


def load_decoder(
    config: EngineConfig, model: ModelConfig, weights: WeightSource, backend: Backend, max_model_len: int
) -> Decoder:
    """Allocates a decoder in the configured dtype, and loads it.

    Raises:
        ModelError: it does not fit into the device's memory, or the weights do not fit the model.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    rotary = rotary_table(model.rope, model.head_dim, max_model_len, backend.device)
    layers = LayerFactory(backend, Dense(backend, dtype), OneRank(), dtype, rotary)
    try:
        decoder = build_decoder(FAMILIES[model.architecture], model, layers)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{config.model_dir} in {config.dtype} does not fit into the memory of {config.device}"
        ) from error
    layers.load(weights)
    return decoder


def _weights(config: EngineConfig, folder: Path, device: torch.device) -> WeightSource:
    return RandomWeights(device) if config.load_format == "random" else Checkpoint.open(folder)


def _free_bytes(device: torch.device) -> int:
    """Of a GPU, before anything is loaded; a CPU's memory is not sized."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _device(config: EngineConfig) -> torch.device:
    """Checks what of the configuration does not depend on the model, and names the device."""
    if config.dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {config.dtype!r} is not supported; supported are {', '.join(DTYPE_BYTES)}")
    if config.block_size <= 0 or config.block_size % 16:
        raise ModelError(f"block_size must be a positive multiple of 16, not {config.block_size}")
    if not 0 < config.gpu_memory_fraction <= 1:
        raise ModelError(f"gpu_memory_fraction must be above 0 and at most 1, not {config.gpu_memory_fraction}")
    for name in ("max_model_len", "num_blocks", "num_threads"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ModelError(f"{name} must be positive, not {value}")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ModelError(f"device {config.device!r} is not a device") from error
    if device.type not in DEVICE_TYPES:
        raise ModelError(f"device {config.device!r} is not supported; supported are {', '.join(DEVICE_TYPES)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {config.device!r} asked for, but torch finds {torch.cuda.device_count()} of them")
    return device


def most_positions(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of the longest request, before it is known how many the KV pool holds."""
    return model.max_positions if config.max_model_len is None else min(model.max_positions, config.max_model_len)


def kv_spec(config: EngineConfig, model: ModelConfig) -> KVSpec:
    """How this engine stores KV."""
    group = LayerGroup(num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim)
    return KVSpec(block_size=config.block_size, dtype=config.dtype, groups=(group,))
