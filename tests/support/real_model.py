"""The real model's reference: prompts in English, and what transformers says of an answer to one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTHS = (
    1,
    2,
    5,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    80,
    95,
    96,
    97,
    111,
    112,
    113,
    128,
    160,
    191,
    192,
    193,
)
TEXT = """The lighthouse keeper climbed the narrow stairs every evening before the sun went down. He carried a lamp, a
book and a piece of bread, and he counted the steps although he knew their number. From the gallery he could see the
harbour, the fishing boats coming home, and far away the mountains of the mainland. In winter the storms threw the waves
against the rocks so hard that the glass trembled. People in the village said that his grandfather had built the tower
with his own hands. Nobody could say whether that was true. One morning a letter arrived from the capital. It explained
that the light would be run by a machine from now on, and that the keeper was free to go wherever he liked. He read it
twice, put it into the book, and went up the stairs as he had always done. """


def prompts_of(model: Path) -> list[list[int]]:
    """Prompts across block (16), chunk (96) and prefix-hit boundaries: distinct ones first, then shared beginnings."""
    text = text_of(model)
    distinct = [text[start : start + length] for start, length in enumerate(LENGTHS)]
    shared = [
        text[26 : 26 + hit] + text[:tail] for hit, tail in ((16, 1), (48, 7), (96, 16), (112, 40), (193, 1), (192, 0))
    ]
    return distinct + shared


def text_of(model: Path) -> list[int]:
    """The text's tokens, twice over."""
    tokens: list[int] = AutoTokenizer.from_pretrained(model)(TEXT * 2)["input_ids"]
    return tokens


class Reference:
    """transformers in float32 on the CPU, reading prompt and answer in one pass."""

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def best_two(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[list[int]], list[float]]:
        """The two best tokens at each position of the answer, and how far apart their logits are."""
        best = self._logits(prompt, answer).topk(2, dim=-1)
        return best.indices.tolist(), (best.values[:, 0] - best.values[:, 1]).tolist()

    def regrets(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """How far each token's logit lies below the best one's: 0 for the best."""
        logits = self._logits(prompt, answer)
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        regrets: list[float] = (logits.amax(-1) - chosen).tolist()
        return regrets

    @torch.inference_mode()
    def _logits(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        logits: torch.Tensor = self.model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        return logits
