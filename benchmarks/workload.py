"""What an engine is given to do: model shapes, cases, and how a case's name becomes a figure.

A case's name says what it does: `decode/bf16/b64/c1024` is the time of a decode step at batch 64 behind prompts of 1024
tokens, (time for 129 tokens - time for 1) / 128; `prefill/bf16/1x8192` the time to the first token of one prompt;
`throughput/bf16/512x512+256` output tokens per second of 512 requests at once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import median
from typing import Any, Protocol

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
"""The shape of Llama-3.1-8B."""
TINY = LLAMA_8B | {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
STEPPED = (
    *(f"decode/bf16/b{batch}/c1024" for batch in (1, 8, 32, 64, 128, 256)),
    "decode/bf16/b16/c8192",
    "prefill/bf16/1x8192",
    "prefill/bf16/8x1024",
    "prefill/bf16/1x1024",
    "prefill/bf16/1x128",
    "throughput/bf16/512x512+256",
)
STARTS = ("start/cold", "start/warm")
CASES = (*STEPPED, *STARTS)
TINY_CASES = ("decode/bf16/b2/c40", "prefill/bf16/2x24", "throughput/bf16/4x20+5", *STARTS)
CASE_NAME = re.compile(r"(decode/\w+/b\d+/c\d+|prefill/\w+/\d+x\d+|throughput/\w+/\d+x\d+\+\d+)")
"""Any of these can be measured, whether or not it is in the table of targets."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DECODE_TOKENS = 128
"""Steps that a decode case spreads its time over."""
MAX_WARM_UP_TOKENS = 32768
"""Prompt tokens of an uncounted run: enough to compile whatever is left and to wake the card's clocks."""


@dataclass(frozen=True, slots=True)
class Work:
    """Requests of one size, all at once: greedy, end tokens ignored."""

    num_requests: int
    prompt_len: int
    max_tokens: int


class Bench(Protocol):
    """An engine that can be given work."""

    def seconds(self, work: Work) -> float:
        """From the first submission to the last token."""
        ...


@dataclass(frozen=True, slots=True)
class Figure:
    """What a case measured."""

    value: float
    unit: str


class Prompts:
    """Random token ids, new in each call: nothing hits a prefix cache. The same sequence in every process."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._random = random.Random(0)

    def draw(self, length: int) -> list[int]:
        """One prompt."""
        return self._random.choices(range(self._vocab_size), k=length)


def chosen_cases(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Those of `known` that match one of the names or patterns, then names that are cases of their own.

    A name may end with `@N`: its number of repeats, whatever that of the others.
    """
    matching = [case for case in known if any(fnmatchcase(case, pattern) for pattern in wanted)]
    others = [name for name in wanted if name not in matching and CASE_NAME.fullmatch(plain_name(name))]
    return [*matching, *others]


def plain_name(case: str) -> str:
    """A case's name without its number of repeats."""
    return case.partition("@")[0]


def dtype_of(case: str) -> str:
    """The number format that a case's name speaks of, `bf16` for instance."""
    return case.split("/")[1]


def measure(case: str, bench: Bench, repeat: int) -> Figure:
    """Does what a case's name says, `repeat` times unless it ends with `@N`, and takes the median.

    Raises:
        ValueError: the name says nothing.
    """
    case, _, times = case.partition("@")
    repeat = int(times) if times else repeat
    if match := re.fullmatch(r"decode/\w+/b(\d+)/c(\d+)", case):
        batch, context = map(int, match.groups())
        return _decode_step(bench, batch, context, repeat)
    if match := re.fullmatch(r"prefill/\w+/(\d+)x(\d+)", case):
        work = Work(int(match[1]), int(match[2]), 1)
        bench.seconds(work)
        return Figure(round(1000 * median_seconds(bench, work, repeat), 3), "ms")
    if match := re.fullmatch(r"throughput/\w+/(\d+)x(\d+)\+(\d+)", case):
        work = Work(*map(int, match.groups()))
        tokens = work.num_requests * work.max_tokens
        return Figure(round(tokens / median_seconds(bench, work, repeat), 1), "output tokens/s")
    raise ValueError(f"no such case: {case}")


def median_seconds(bench: Bench, work: Work, repeat: int) -> float:
    """Of several runs; prompts are new in each."""
    return median(bench.seconds(work) for _ in range(repeat))


def _decode_step(bench: Bench, batch: int, context: int, repeat: int) -> Figure:
    """The two runs of a pair are neighbours in time, so the card is as warm in one as in the other."""
    bench.seconds(Work(min(batch, max(1, MAX_WARM_UP_TOKENS // context)), context, 2))
    steps_ms = []
    for _ in range(repeat):
        first_s = bench.seconds(Work(batch, context, 1))
        whole_s = bench.seconds(Work(batch, context, 1 + DECODE_TOKENS))
        steps_ms.append(1000 * (whole_s - first_s) / DECODE_TOKENS)
    return Figure(round(median(steps_ms), 4), "ms/step")
