"""Block sizes, prompt lengths and prefix hits of two engines against one engine alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from twostroke_engine.request import Request, SamplingParams

from tests.support.split_engines import SplitEngines, Streams

BLOCK_SIZES = ((16, 16), (16, 64), (64, 16))
"""Of the prefill and of the decode engine."""
CHUNK = 64
"""Token budget of a step."""
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 2000)
HITS = (0.0, 0.5, 1.0)
"""Share of a prompt that a side computed before: none, some or all of it."""
MAX_TOKENS = 12
EXCUSED_MARGIN = 1e-3
"""Two logprobs of the engine alone that are closer may change places: the first such token excuses what follows it."""

Case = tuple[int, float, float]
"""Length, hits of the prefill and of the decode engine."""


def pairwise() -> list[Case]:
    """Each length with each hit on either side, and each hit with each hit."""
    return [(length, HITS[at], HITS[(at + row) % 3]) for row, length in enumerate(LENGTHS) for at in range(3)]


def whole_matrix() -> list[Case]:
    """Each with each."""
    return list(product(LENGTHS, HITS, HITS))


@dataclass
class Compared:
    """What came of cases."""

    cases: int = 0
    tokens: int = 0
    excused: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    wrong_facts: list[str] = field(default_factory=list)


def compare(model_dir: Path, block_sizes: tuple[int, int], cases: list[Case], **config: Any) -> Compared:
    """Runs the cases at once, so that they share steps and a pair, and compares every token."""
    num_tokens = 1 << (13 if len(cases) < 50 else 16)
    engines = SplitEngines(model_dir, block_sizes, num_tokens, max_step_tokens=CHUNK, **config)
    try:
        return _compare(engines, block_sizes, cases)
    finally:
        engines.stop()


def _compare(engines: SplitEngines, block_sizes: tuple[int, int], cases: list[Case]) -> Compared:
    prompts = [prompt_of(number, length) for number, (length, _, _) in enumerate(cases)]
    for side, engine in ((1, "prefill"), (2, "decode")):
        known = [(number, int(case[0] * case[side])) for number, case in enumerate(cases)]  # type: ignore[misc]
        engines.run_on(engine, [asked(f"k{number}", prompts[number][:count], 1) for number, count in known if count])
    requests = [asked(f"r{number}", prompt) for number, prompt in enumerate(prompts)]
    split = engines.run(requests)
    with_margins = [replace(request, sampling=replace(request.sampling, logprobs=2)) for request in requests]
    whole = engines.run_on("alone", with_margins)
    found = Compared(cases=len(cases), tokens=sum(map(len, whole.values())))
    for number, case in enumerate(cases):
        where = f"blocks {block_sizes}, length and hits {case}"
        _compare_tokens(engines, (f"r{number}", 0), (split, whole), where, found)
        facts = engines.ends["decode", f"r{number}"].facts
        skipped = int(case[0] * case[2]) // block_sizes[1] * block_sizes[1]
        if facts.skipped_tokens != skipped or facts.kv_resends:
            found.wrong_facts.append(
                f"{where}: {facts.skipped_tokens} skipped, not {skipped}; {facts.kv_resends} resent"
            )
    return found


def _compare_tokens(
    engines: SplitEngines, stream: tuple[str, int], both: tuple[Streams, Streams], where: str, found: Compared
) -> None:
    split, whole = (streams[stream] for streams in both)
    if split == whole:
        return
    first = min(at for at in split.keys() | whole.keys() if split.get(at) != whole.get(at))
    margin = engines.margins.get(stream, {}).get(first, float("inf"))
    said = f"{where}: from token {first}, margin {margin:.2g}"
    (found.excused if margin < EXCUSED_MARGIN else found.different).append(said)


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    """Each prompt differs from every other one in its first tokens, so that hits are those that were meant."""
    return tuple((number * 7919 + at * at * 31 + at * (number % 13)) % 290 + 3 for at in range(length))


def asked(name: str, tokens: tuple[int, ...], max_tokens: int = MAX_TOKENS) -> Request:
    """A greedy request of so many tokens."""
    return Request(
        id=name,
        token_ids=tokens,
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
    )
