"""The flags of `twostroke bench`, the same for one target and for several, and the load that they describe."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from twostroke_cli.bench.arrivals import Arrivals, Closed, Open, Replay
from twostroke_cli.bench.job import Form
from twostroke_cli.bench.lengths import parse_length
from twostroke_cli.bench.prompts import (
    FilePrompts,
    FromFile,
    FromTrace,
    PromptSpec,
    Synthetic,
    TracePrompts,
    open_prompts,
)
from twostroke_cli.errors import CommandError
from twostroke_cli.flag_groups import option

DEFAULT_PROMPT_LEN = "256"
DEFAULT_MAX_TOKENS = "64"
LENGTH = "N|LOW..HIGH|lognormal:MEDIAN:SIGMA[:MOST]"
_ASK, _LOAD, _PROMPTS, _END = "What is asked", "The load", "The prompts", "What is made of it"


@dataclass(frozen=True)
class Flags:
    """What the command line says, as it says it. `None` and empty texts: not given."""

    model: Annotated[str, option("Which model; the first that the server lists by default.", _ASK, metavar="NAME")] = ""
    endpoint: Annotated[str, option("The kind of request.", _ASK, metavar="chat|completions")] = "chat"
    no_stream: Annotated[bool, option("Ask for whole answers: no TTFT and no ITL.", _ASK, "--no-stream")] = False
    temperature: Annotated[float, option("0 is greedy.", _ASK, metavar="T", min=0)] = 0.0
    ignore_eos: Annotated[
        bool, option("Ask for answers of full length; servers that know the field only.", _ASK, "--ignore-eos")
    ] = False
    extra: Annotated[str, option("More fields of every request's body.", _ASK, metavar="JSON")] = ""
    api_key_env: Annotated[
        str, option("Environment variable with the API key, sent if it is set.", _ASK, metavar="NAME")
    ] = "TWOSTROKE_API_KEY"

    rate: Annotated[
        float | None, option("Open loop: requests a second on average; inf: all at once.", _LOAD, metavar="R")
    ] = None
    arrivals: Annotated[str, option("How an open loop spaces them.", _LOAD, metavar="poisson|gamma|constant")] = (
        "poisson"
    )
    burstiness: Annotated[
        float, option("Of gamma arrivals: 1 is Poisson, less comes in bursts.", _LOAD, metavar="SHAPE")
    ] = 1.0
    concurrency: Annotated[
        int | None,
        option("Closed loop: clients that wait for their answers. 1 by default.", _LOAD, metavar="N", min=1),
    ] = None
    requests: Annotated[int | None, option("How many. 100 by default, a trace's all.", _LOAD, metavar="N", min=1)] = (
        None
    )
    duration: Annotated[
        float | None, option("Begin requests for so long; those begun are waited for.", _LOAD, metavar="SECONDS")
    ] = None
    warm_up: Annotated[int, option("Requests before the first, not counted.", _LOAD, metavar="N", min=0)] = 4
    processes: Annotated[int, option("Client processes; more for thousands of tokens a second.", _LOAD, min=1)] = 1
    seed: Annotated[int, option("Equal seeds ask the same at the same times.", _LOAD)] = 0
    timeout: Annotated[
        float, option("Longest silence of a server before a request fails.", _LOAD, metavar="SECONDS")
    ] = 600.0
    deadline: Annotated[
        float | None, option("Give a request up after so long; it then counts as failed.", _LOAD, metavar="SECONDS")
    ] = None

    prompt_len: Annotated[
        str,
        option(
            f"Words of a made-up prompt, about a token each. {DEFAULT_PROMPT_LEN} by default.", _PROMPTS, metavar=LENGTH
        ),
    ] = ""
    max_tokens: Annotated[
        str,
        option(f"Most tokens of an answer. {DEFAULT_MAX_TOKENS} by default, a trace's own.", _PROMPTS, metavar=LENGTH),
    ] = ""
    prefix_share: Annotated[
        float, option("Share of a made-up prompt that others begin with too.", _PROMPTS, min=0, max=1)
    ] = 0.0
    prefix_groups: Annotated[int, option("How many such beginnings there are.", _PROMPTS, metavar="N", min=1)] = 1
    vocab_size: Annotated[
        int, option("Token ids below this instead of words (completions).", _PROMPTS, metavar="N", min=0)
    ] = 0
    prompts: Annotated[
        Path | None,
        option("JSON lines with `prompt` or `messages`; else text, a prompt a line.", _PROMPTS, metavar="FILE"),
    ] = None
    trace: Annotated[Path | None, option("Replay: Mooncake's .jsonl or Azure's .csv.", _PROMPTS, metavar="FILE")] = None
    trace_speed: Annotated[float, option("Replay so many times as fast.", _PROMPTS, metavar="X")] = 1.0
    length_scale: Annotated[float, option("A trace's lengths times this.", _PROMPTS, metavar="X")] = 1.0
    max_prompt_len: Annotated[
        int | None, option("Cut a trace's longer prompts.", _PROMPTS, metavar="TOKENS", min=1)
    ] = None

    slo: Annotated[str, option("Objectives for goodput.", _END, metavar="ttft=S,itl=S,tpot=S,e2e=S")] = ""
    explain: Annotated[
        bool, option("Ask a Twostroke router where the time went: mean waterfalls.", _END, "--explain")
    ] = False
    json_file: Annotated[Path | None, option("Write the raw figures.", _END, "--json", metavar="FILE")] = None
    html_file: Annotated[Path | None, option("Write a report with plots.", _END, "--html", metavar="FILE")] = None
    no_progress: Annotated[bool, option("No progress bar.", _END, "--no-progress")] = False


def form_of(flags: Flags, model: str) -> Form:
    """What every request says besides its prompt.

    Raises:
        CommandError: a flag says nothing of use; the message names it.
    """
    if flags.endpoint not in ("chat", "completions"):
        raise CommandError(f"--endpoint {flags.endpoint}: expected chat or completions")
    more: dict[str, Any] = {"temperature": flags.temperature}
    if flags.ignore_eos:
        more["ignore_eos"] = True
    if flags.extra:
        try:
            extra = json.loads(flags.extra)
        except ValueError as error:
            raise CommandError(f"--extra: not JSON: {error}") from None
        if not isinstance(extra, dict):
            raise CommandError("--extra: expected a JSON object")
        more |= extra
    endpoint: Any = flags.endpoint
    return Form(model, endpoint, not flags.no_stream, more)


def arrivals_of(flags: Flags) -> Arrivals:
    """When requests are sent; `CommandError` naming the flag that does not fit."""
    if flags.rate is not None and flags.concurrency is not None:
        raise CommandError("--rate is an open loop and --concurrency a closed one: give one of them")
    if flags.rate is not None:
        _check_positive("--rate", flags.rate, may_be_infinite=True)
        _check_positive("--burstiness", flags.burstiness)
        shape: Any = flags.arrivals
        if shape not in ("poisson", "gamma", "constant"):
            raise CommandError(f"--arrivals {shape}: expected poisson, gamma or constant")
        return Open(None if math.isinf(flags.rate) else flags.rate, shape, flags.burstiness)
    if flags.trace is not None and flags.concurrency is None:
        _check_positive("--trace-speed", flags.trace_speed)
        return Replay(flags.trace_speed)
    return Closed(flags.concurrency or 1)


def prompts_of(flags: Flags) -> PromptSpec:
    """What is asked; `CommandError` naming the flag that does not fit, or what is wrong with its file."""
    if flags.trace is not None and flags.prompts is not None:
        raise CommandError("--trace and --prompts both say what is asked: give one of them")
    if flags.vocab_size and flags.endpoint != "completions":
        raise CommandError("--vocab-size: a chat takes no token ids; add --endpoint completions")
    max_tokens = parse_length(flags.max_tokens or DEFAULT_MAX_TOKENS, "--max-tokens")
    if flags.trace is not None:
        _check_positive("--length-scale", flags.length_scale)
        return FromTrace(str(flags.trace.resolve()), flags.length_scale, flags.max_prompt_len)
    if flags.prompts is not None:
        return FromFile(str(flags.prompts.resolve()), max_tokens)
    length = parse_length(flags.prompt_len or DEFAULT_PROMPT_LEN, "--prompt-len")
    return Synthetic(length, max_tokens, flags.prefix_share, flags.prefix_groups, flags.vocab_size)


def check_prompts(spec: PromptSpec, flags: Flags) -> int | None:
    """Reads the file that there may be, and says how many requests it has at most; None: no end."""
    prompts = open_prompts(spec, flags.seed)
    if isinstance(prompts, FilePrompts):
        prompts.check_for(flags.endpoint)
    return prompts.size if isinstance(prompts, TracePrompts) else None


def limits_of(flags: Flags, size: int | None) -> tuple[int | None, float | None]:
    """How many requests, and for how long they begin: one of the two is given, or both."""
    _check_positive("--timeout", flags.timeout)
    for name, value in (("--duration", flags.duration), ("--deadline", flags.deadline)):
        if value is not None:
            _check_positive(name, value)
    if flags.rate is not None and math.isinf(flags.rate) and flags.requests is None:
        raise CommandError("--rate inf: say how many with --requests")
    if size is not None:
        return min(flags.requests or size, size), flags.duration
    return (100 if flags.requests is None and flags.duration is None else flags.requests), flags.duration


def _check_positive(name: str, value: float, may_be_infinite: bool = False) -> None:
    if not value > 0 or (math.isinf(value) and not may_be_infinite):
        raise CommandError(f"{name} {value:g}: must be positive")
