"""`ModelRunner`: executes step plans. `build_runner`: from a configuration to a loaded model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from twostroke_kernels.choice import choose_backend

from twostroke_engine.kv.spec import DTYPE_BYTES, KVSpec, LayerGroup
from twostroke_engine.model.config import ModelError, read_model_config
from twostroke_engine.model.decoder import build_decoder
from twostroke_engine.model.factory import LayerFactory
from twostroke_engine.model.families import FAMILIES
from twostroke_engine.model.layers import rotary_table
from twostroke_engine.quant.dense import Dense
from twostroke_engine.runner.inputs import InputBuilder, chunks_in_order
from twostroke_engine.runner.parallel import OneRank
from twostroke_engine.runner.sequence import RunnerSequence
from twostroke_engine.sample.logits import adjustments_for
from twostroke_engine.sample.sampler import Sampler, SampleRow
from twostroke_engine.schedule.plan import Sampled, StepOutput
from twostroke_engine.weights.checkpoint import Checkpoint
from twostroke_engine.weights.fingerprint import model_fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from twostroke_kernels.backend import Backend

    from twostroke_engine.config import EngineConfig
    from twostroke_engine.model.config import ModelConfig
    from twostroke_engine.model.decoder import Decoder
    from twostroke_engine.runner.inputs import Chunk
    from twostroke_engine.schedule.plan import BlockCopy, NewSequence, Scheduled, StepPlan
    from twostroke_engine.transfer.end import KVSink

DEVICE_TYPES = ("cpu", "cuda")


class ModelRunner:
    """One rank's model, KV pool and copies of the sequences it was told of."""

    def __init__(self, decoder: Decoder, backend: Backend, kv_pool: Tensor, model: ModelConfig) -> None:
        self.backend = backend
        self.kv_pool = kv_pool
        self._decoder = decoder
        self._model = model
        self._block_size = kv_pool.shape[3]
        self._inputs = InputBuilder(kv_pool, self._block_size)
        self._sampler = Sampler(backend, model.vocab_size)
        self._sequences: dict[int, RunnerSequence] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan, sink: KVSink) -> StepOutput:
        """Runs one step.

        Args:
            plan: what to compute; its order of work is written there.
            sink: hears of each layer, in order, as soon as the layer's KV of this step is in the pool.
        """
        for sequence_id in plan.finished:
            self._sequences.pop(sequence_id, None)
        self._copy_blocks(plan.copies)
        for new in plan.new:
            self._sequences[new.sequence_id] = self._learn(new)
        for entry in plan.scheduled:
            self._sequences[entry.sequence_id].blocks.extend(entry.new_block_ids)
        if not plan.scheduled:
            return StepOutput(step=plan.step)
        chunks, last_rows = chunks_in_order(plan.scheduled, self._sequences)
        self._clear_begun(chunks)
        hidden = self._decoder(self._inputs.build(chunks, sink))
        ends = [(entry, row) for entry, row in zip(plan.scheduled, last_rows, strict=True) if entry.choices]
        if not ends:
            return StepOutput(step=plan.step)
        rows = torch.tensor([row for _, row in ends], device=self.backend.device)
        logits = self._decoder.logits(hidden, rows)
        return StepOutput(step=plan.step, sampled=self._sample(logits, [entry for entry, _ in ends]))

    def _learn(self, new: NewSequence) -> RunnerSequence:
        adjustments = adjustments_for(
            new.sampling, new.token_ids, new.num_prompt_tokens, self._model.eos_token_ids, self._model.vocab_size
        )
        return RunnerSequence(new, adjustments)

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        if not copies:
            return
        device = self.backend.device
        sources = torch.tensor([copy.source for copy in copies], device=device)
        targets = torch.tensor([copy.target for copy in copies], device=device)
        self.backend.copy_blocks(self.kv_pool, sources, targets)

    def _clear_begun(self, chunks: Sequence[Chunk]) -> None:
        """Zeroes blocks that this step begins and does not fill: NaN in an unused row would reach P.V."""
        begun = [block for chunk in chunks if (block := chunk.begun_block(self._block_size)) is not None]
        if begun:
            self.kv_pool.index_fill_(0, torch.tensor(begun, device=self.backend.device), 0)

    def _sample(self, logits: Tensor, ends: Sequence[Scheduled]) -> tuple[Sampled, ...]:
        """`logits` has one row per entry, whatever its number of choices."""
        rows = [self._sample_row(entry, choice) for entry in ends for choice in entry.choices]
        if len(rows) > len(ends):
            counts = torch.tensor([len(entry.choices) for entry in ends], device=logits.device)
            logits = logits.repeat_interleave(counts, dim=0)
        chosen = iter(self._sampler.sample(logits, rows))
        sampled = []
        for entry in ends:
            tokens = [next(chosen) for _ in entry.choices]
            finite = all(token.finite for token in tokens)
            sampled.append(
                Sampled(sequence_id=entry.sequence_id, tokens=tuple(token.token for token in tokens), finite=finite)
            )
            self._append_own(entry, sampled[-1])
        return tuple(sampled)

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

    def _append_own(self, entry: Scheduled, sampled: Sampled) -> None:
        """The sequence goes on with its own choice; the others arrive as new sequences."""
        sequence = self._sequences[entry.sequence_id]
        if sampled.finite and sequence.choice in entry.choices:
            sequence.append_token(sampled.tokens[entry.choices.index(sequence.choice)].id)


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


def build_runner(config: EngineConfig) -> LoadedModel:
    """Loads the model and allocates the KV pool.

    Raises:
        ModelError: anything that the user can put right; one line.
    """
    device = _device(config)
    folder = Path(config.model_dir)
    model = read_model_config(folder, FAMILIES)
    checkpoint = Checkpoint.open(folder)
    spec = _kv_spec(config, model)
    num_blocks = _num_blocks(config, spec)
    limit = config.max_model_len if config.max_model_len is not None else model.max_positions
    max_model_len = min(model.max_positions, limit, num_blocks * config.block_size)
    torch.set_num_threads(config.num_threads)
    backend = choose_backend(device)
    decoder = _load_decoder(config, model, checkpoint, backend, max_model_len)
    return LoadedModel(
        runner=ModelRunner(decoder, backend, _kv_pool(spec, num_blocks, device), model),
        spec=spec,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        model_fingerprint=model_fingerprint(model, config.dtype, checkpoint),
    )


def _load_decoder(
    config: EngineConfig, model: ModelConfig, checkpoint: Checkpoint, backend: Backend, max_model_len: int
) -> Decoder:
    dtype: torch.dtype = getattr(torch, config.dtype)
    rotary = rotary_table(model.rope, model.head_dim, max_model_len, backend.device)
    layers = LayerFactory(backend, Dense(backend, dtype), OneRank(), dtype, rotary)
    try:
        decoder = build_decoder(FAMILIES[model.architecture], model, layers)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{config.model_dir} in {config.dtype} does not fit into the memory of {config.device}"
        ) from error
    layers.load(checkpoint)
    return decoder


def _device(config: EngineConfig) -> torch.device:
    """Checks what of the configuration does not depend on the model, and names the device."""
    if config.dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {config.dtype!r} is not supported; supported are {', '.join(DTYPE_BYTES)}")
    if config.block_size <= 0 or config.block_size % 16:
        raise ModelError(f"block_size must be a positive multiple of 16, not {config.block_size}")
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


def _kv_spec(config: EngineConfig, model: ModelConfig) -> KVSpec:
    group = LayerGroup(num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim)
    return KVSpec(block_size=config.block_size, dtype=config.dtype, groups=(group,))


def _num_blocks(config: EngineConfig, spec: KVSpec) -> int:
    num_blocks = config.num_blocks if config.num_blocks is not None else config.kv_cache_bytes // spec.block_bytes
    if num_blocks < 1:
        raise ModelError(f"kv_cache_bytes ({config.kv_cache_bytes}) holds no block of {spec.block_bytes} bytes")
    return num_blocks


def _kv_pool(spec: KVSpec, num_blocks: int, device: torch.device) -> Tensor:
    group = spec.groups[0]
    shape = (num_blocks, spec.num_layers, 2, spec.block_size, group.num_kv_heads, group.head_dim)
    try:
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device)
    except RuntimeError as error:  # torch raises no narrower one when a CPU has too little memory
        raise ModelError(
            f"cannot allocate {num_blocks * spec.block_bytes} bytes of KV cache ({num_blocks} blocks) on {device}"
        ) from error
