"""transformers' logits, and the runner's, of the same tokens."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.request import SamplingParams
from twostroke_engine.runner.model_runner import LoadedModel, build_runner

from tests.support.plan_driver import PlanDriver, Take

if TYPE_CHECKING:
    from pathlib import Path

    from twostroke_engine.schedule.plan import Sampled


def load(folder: Path, **config: Any) -> LoadedModel:
    """A loaded model, fp32 and 96 blocks of 16 unless told otherwise."""
    return build_runner(EngineConfig(model_dir=str(folder), **{"dtype": "float32", "num_blocks": 96, **config}))


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[T, V] float32."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


def random_tokens(count: int, vocab_size: int = 300, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, vocab_size), k=count)


def all_logprobs(sampled: Sampled, vocab_size: int) -> torch.Tensor:
    """The distribution that a row was sampled from, before temperature."""
    (token,) = sampled.tokens
    logprobs = torch.full((vocab_size,), float("nan"))
    logprobs[[i for i, _ in token.top]] = torch.tensor([p for _, p in token.top])
    return logprobs


def logprobs_along(model: LoadedModel, tokens: list[int], num_prompt: int, chunks: tuple[int, ...]) -> torch.Tensor:
    """Teacher-forced: after the prompt, and after each token that follows."""
    everything = SamplingParams(temperature=0.0, logprobs=model.vocab_size)
    driver = PlanDriver(model)
    sequence = driver.add(tokens, everything)
    for count in chunks:
        driver.step(Take(sequence, count))
    counts = [num_prompt - sum(chunks)] + [1] * (len(tokens) - num_prompt)
    # The choice is not the sequence's own, so that the given tokens go on and not the sampled ones.
    rows = [driver.step(Take(sequence, count, (1,)))[0] for count in counts]
    return torch.stack([all_logprobs(row, model.vocab_size) for row in rows])
