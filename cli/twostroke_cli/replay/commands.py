"""`twostroke replay` and its flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer

from twostroke_cli.errors import CommandError
from twostroke_cli.flag_groups import option, takes_flags
from twostroke_cli.replay.cluster import Cluster, Delays
from twostroke_cli.replay.worker import Limits, StepTimes

_CLUSTER, _WORKERS, _LOAD, _OUTPUT = "The cluster", "Its workers", "The load", "What comes out"
_NUMBERS = "NAME=SECONDS,..."
_Numbers = TypeVar("_Numbers", StepTimes, Delays)


@dataclass(frozen=True)
class ReplayFlags:
    """What the command line says, as it says it."""

    prefill: Annotated[int, option("Workers.", _CLUSTER, metavar="N", min=0)] = 4
    decode: Annotated[int, option("Workers; 0: requests end with their first token.", _CLUSTER, metavar="N", min=0)] = 4
    routers: Annotated[int, option("They take turns.", _CLUSTER, metavar="N", min=1)] = 1
    policy: Annotated[
        list[str] | None, option("Placement policies, a replay each (default: cost).", _CLUSTER, metavar="NAME")
    ] = None
    redis_away: Annotated[str, option("Seconds of the trace without Redis.", _CLUSTER, metavar="FROM:TO")] = ""
    delays: Annotated[str, option("message, index, snapshot, move: how late news is.", _CLUSTER, metavar=_NUMBERS)] = ""
    times: Annotated[
        str,
        option(
            "step, token (of a prompt), sequence, context (a token attended to): what a step takes. Default: an 8B "
            "model on an H100.",
            _WORKERS,
            metavar=_NUMBERS,
        ),
    ] = ""
    max_step_tokens: Annotated[int, option("Token budget of a step.", _WORKERS, metavar="N", min=1)] = 8192
    max_running: Annotated[int, option("Sequences in a batch.", _WORKERS, metavar="N", min=1)] = 256
    num_blocks: Annotated[int, option("Blocks of 512 tokens that a worker holds.", _WORKERS, metavar="N", min=1)] = 800
    speed: Annotated[float, option("Requests come X times as fast.", _LOAD, metavar="X", min=0.001)] = 1.0
    spread: Annotated[
        bool, option("Requests of one moment come evenly until the next: for coarse times.", _LOAD, "--spread")
    ] = False
    limit: Annotated[int | None, option("The first N requests only.", _LOAD, metavar="N", min=1)] = None
    slo: Annotated[str, option("Objectives for goodput: ttft, itl, e2e.", _OUTPUT, metavar=_NUMBERS)] = ""
    plan: Annotated[bool, option("Find the fewest workers that meet --slo.", _OUTPUT, "--plan")] = False
    share: Annotated[float, option("Of the requests, for --plan.", _OUTPUT, metavar="X", min=0, max=1)] = 0.99
    json_file: Annotated[Path | None, option("Write the figures.", _OUTPUT, "--json", metavar="FILE")] = None
    png_file: Annotated[Path | None, option("Write a chart.", _OUTPUT, "--png", metavar="FILE")] = None


@takes_flags(ReplayFlags)
def replay(
    trace: Annotated[Path, typer.Argument(help="Mooncake's JSON lines, or Azure's .csv.")], *, flags: ReplayFlags
) -> None:
    """Replay a recorded load against simulated workers: which policy, how many workers, how many routers?

    Placement is the routers' own code. A live cluster takes the same file: twostroke bench run --trace FILE.
    """
    from twostroke_cli.bench.figures import parse_slo
    from twostroke_cli.bench.trace import read_trace
    from twostroke_cli.replay.session import ReplaySession, reshaped

    rows = reshaped(read_trace(trace)[: flags.limit], flags.speed, flags.spread)
    session = ReplaySession(rows, cluster_of(flags), flags.policy or ["cost"], parse_slo(flags.slo))
    if flags.plan:
        session.plan(flags.share)
    else:
        session.run()
    session.write(flags.json_file, flags.png_file)


def cluster_of(flags: ReplayFlags) -> Cluster:
    """The cluster that the flags describe.

    Raises:
        CommandError: a flag says nothing of use; the message names it.
    """
    if not flags.prefill + flags.decode:
        raise CommandError("--prefill and --decode: a cluster needs a worker")
    return Cluster(
        prefill=flags.prefill,
        decode=flags.decode,
        routers=flags.routers,
        times=_numbers("--times", flags.times, StepTimes),
        limits=Limits(flags.max_step_tokens, flags.max_running, flags.num_blocks),
        delays=_numbers("--delays", flags.delays, Delays),
        redis_away=_period(flags.redis_away),
    )


def _numbers(flag: str, text: str, kind: type[_Numbers]) -> _Numbers:
    """`step=0.005,token=2e-5` as the fields `step_s` and `token_s`."""
    given = dict(part.partition("=")[::2] for part in text.split(",") if part)
    try:
        return msgspec.convert({f"{name}_s": float(value) for name, value in given.items()}, kind)
    except ValueError as error:  # msgspec's own errors too
        names = ", ".join(name.removesuffix("_s") for name in kind.__struct_fields__)
        raise CommandError(f"{flag} {text}: expected NAME=SECONDS with names of {names} ({error})") from None


def _period(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    begin, _, end = text.partition(":")
    try:
        return float(begin), float(end)
    except ValueError:
        raise CommandError(f"--redis-away {text}: expected FROM:TO in seconds") from None
