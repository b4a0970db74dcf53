"""On the card: replayed decode steps give the tokens of eager ones, and a profile run sizes the pool."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.request import Request, SamplingParams
from twostroke_engine.runner.cuda_graphs import GraphForward
from twostroke_engine.runner.inputs import Chunk, FreshTokens
from twostroke_engine.runner.model_runner import LoadedModel, ModelRunner, build_runner
from twostroke_engine.runner.piecewise import PieceForward
from twostroke_engine.runner.sequence import RunnerSequence
from twostroke_engine.schedule.plan import NewSequence
from twostroke_engine.transfer.end import NoSink

from tests.support.engine_bench import make_request
from tests.support.graph_engine import run_requests
from tests.support.plan_driver import RecordingSink

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device"),
]

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
MAX_RUNNING = 20


def config(folder: Path, **settings: object) -> EngineConfig:
    """float32, so that a difference in how sums are cut does not choose another token."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    told = {"block_size": 64, "num_blocks": 200, "max_step_tokens": 512, "max_running": MAX_RUNNING, "dtype": "float32"}
    return EngineConfig(model_dir=str(folder), device="cuda", load_format="random", **{**told, **settings})  # type: ignore[arg-type]


def graphs(model: LoadedModel) -> GraphForward:
    forward = model.runner.forward
    assert isinstance(forward, GraphForward), "this card's backend is not captured"
    return forward


def pieces(model: LoadedModel) -> PieceForward:
    rest = graphs(model).rest
    assert isinstance(rest, PieceForward)
    return rest


def eager_twin(model: LoadedModel) -> ModelRunner:
    """The same weights and the same pool, without graphs."""
    runner = model.runner
    return ModelRunner(pieces(model).eager, runner.backend, runner.kv_pool, runner.model)


def requests(count: int, max_tokens: int = 24) -> list[Request]:
    """Contexts from one token to several blocks; every third request forks; every second is drawn."""
    return [
        make_request(
            f"r{number}",
            tuple((7 * number + 13 * position) % 990 for position in range(1 + 37 * number % 300)),
            n=3 if number % 3 == 2 else 1,
            temperature=float(number % 2),
            top_p=0.95,
            seed=number,
            max_tokens=max_tokens,
        )
        for number in range(count)
    ]


def make_sequence(number: int, num_tokens: int) -> RunnerSequence:
    """Its nine blocks are those of no other number."""
    new = NewSequence(
        sequence_id=number,
        token_ids=tuple((7 * number + 13 * position) % 990 for position in range(num_tokens)),
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(),
        block_ids=tuple(9 * number + (5 * block) % 9 for block in range(9)),
    )
    return RunnerSequence(new, None)


def test_replays_give_eager_tokens_in_batches_of_every_size(tmp_path: Path) -> None:
    told = config(tmp_path)
    model = build_runner(told)
    for count in range(1, MAX_RUNNING + 4):
        before = graphs(model).num_replays, pieces(model).num_steps
        replayed, _ = run_requests(told, model, model.runner, requests(count))
        assert graphs(model).num_replays > before[0]
        assert pieces(model).num_steps > before[1] or count == 1, "the first prompt is one token"
        eager, _ = run_requests(told, model, eager_twin(model), requests(count))
        assert replayed == eager, count


def test_preempted_sequences_replay_as_before(tmp_path: Path) -> None:
    told = config(tmp_path, num_blocks=24, max_model_len=1000)
    model = build_runner(told)
    work = requests(12, max_tokens=200)
    replayed, num_preempted = run_requests(told, model, model.runner, work)
    assert num_preempted > 0
    eager, _ = run_requests(told, model, eager_twin(model), work)
    assert replayed == eager


def test_neither_padding_nor_a_neighbours_nan_reaches_a_sequence(tmp_path: Path) -> None:
    """The scratch block and every free block start as NaN."""
    told = config(tmp_path)
    model = build_runner(told)
    expected, _ = run_requests(told, model, model.runner, requests(5))
    kv_layer = graphs(model)._buffers.inputs(1).kv_layers[0]
    assert kv_layer.shape[0] == model.num_blocks + 1
    model.runner.kv_pool.fill_(float("nan"))
    replayed, _ = run_requests(told, model, model.runner, requests(5))
    assert replayed == expected


def test_bf16_logits_of_a_replay_are_near_eager_ones(tmp_path: Path) -> None:
    told = config(tmp_path, dtype="bfloat16")
    model = build_runner(told)
    eager = eager_twin(model)
    logits: dict[str, torch.Tensor] = {}
    for name, runner in (("replayed", model.runner), ("eager", eager)):
        model.runner.kv_pool.zero_()
        spied = dataclasses.replace(model, runner=runner)
        seen: list[torch.Tensor] = []
        plain = runner.forward.logits

        def spy(*args: object, plain: object = plain, seen: list[torch.Tensor] = seen) -> torch.Tensor | None:
            result = plain(*args)  # type: ignore[operator]
            if result is not None:
                seen.append(result.clone())
            return result  # type: ignore[no-any-return]

        class Spy:
            overlaps = False
            logits = staticmethod(spy)

        run_requests(told, spied, ModelRunner(Spy(), runner.backend, runner.kv_pool, runner.model), requests(1, 2))
        logits[name] = seen[-1]
    assert logits["replayed"].shape == logits["eager"].shape == (1, 1000)
    assert torch.allclose(logits["replayed"], logits["eager"], atol=0.05, rtol=0.02)


STEPS = {
    "prompts": [(0, 0, 100), (1, 0, 200), (2, 0, 170)],
    "decodes beside chunks": [(0, 100, 101), (1, 200, 201), (3, 0, 97), (4, 0, 65)],
    "one decode beside a chunk that fills the step": [(2, 170, 171), (5, 0, 511)],
    "decodes alone": [(0, 101, 102), (3, 97, 98), (5, 511, 512)],
    "few tokens": [(1, 201, 202), (4, 65, 67)],
}
"""(sequence, start, end) of a step's chunks."""


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 0.02), ("bfloat16", 0.1)])
@torch.inference_mode()
def test_steps_in_pieces_give_eager_logits(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """The pool starts as NaN; every layer is told of in order; the eager way computes each step again."""
    model = build_runner(config(tmp_path, dtype=dtype))
    forward = pieces(model)
    model.runner.kv_pool.fill_(float("nan"))
    sequences = [make_sequence(number, 520) for number in range(6)]
    for name, entries in STEPS.items():
        chunks = [Chunk(sequences[at], start, end, is_decode=end - start == 1) for at, start, end in entries]
        rows = [sum(chunk.count for chunk in chunks[: at + 1]) - 1 for at in range(len(chunks))]
        before, sink = forward.num_steps, RecordingSink()
        logits = forward.logits(chunks, rows, sink)
        assert logits is not None, name
        got, kv = logits.clone(), model.runner.kv_pool.clone()
        eager = forward.eager.logits(chunks, rows, NoSink())
        assert eager is not None, name
        assert forward.num_steps == before + 1, name
        assert sink.layers == [0, 1, 2], name
        assert torch.allclose(got, eager, atol=tolerance, rtol=tolerance), name
        assert torch.allclose(kv, model.runner.kv_pool, atol=tolerance, rtol=tolerance, equal_nan=True), name


def test_fresh_tokens_are_those_of_the_device(tmp_path: Path) -> None:
    model = build_runner(config(tmp_path))
    sequences = [make_sequence(number, 100) for number in range(3)]
    prompts = [Chunk(sequence, 0, 98, is_decode=False) for sequence in sequences]
    for forward in (graphs(model), pieces(model), pieces(model).eager):
        forward.logits(prompts, [], NoSink())
        chunks = [Chunk(sequence, 98, 99, is_decode=True) for sequence in sequences]
        wanted = forward.logits(chunks, [0, 1, 2], NoSink())
        assert wanted is not None
        wanted = wanted.clone()
        newest = torch.tensor([sequences[at].tokens.at(98) for at in (2, 0)], device="cuda")
        known = [make_sequence(number, 98 if number != 1 else 99) for number in range(3)]
        chunks = [Chunk(sequence, 98, 99, is_decode=True) for sequence in known]
        got = forward.logits(chunks, [0, 1, 2], NoSink(), FreshTokens(np.array([2, 0]), newest))
        assert got is not None
        assert torch.equal(got, wanted)


def test_profile_fills_the_fraction_and_leaves_the_rest(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    model = build_runner(config(tmp_path, num_blocks=None, gpu_memory_fraction=0.5))
    now, _ = torch.cuda.mem_get_info()
    assert 0.4 * total < free - now < 0.52 * total
    assert model.runner.kv_pool.shape[0] == model.num_blocks
    tokens, _ = run_requests(config(tmp_path), model, model.runner, requests(9))
    assert len(tokens) == 9 + 2 * 3
