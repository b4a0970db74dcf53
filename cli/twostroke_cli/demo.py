"""`twostroke demo`: start a cluster, ask it one question, show where the answer came from, stop it."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass

from twostroke_cli.chat import ask, print_explanation
from twostroke_cli.child import Child
from twostroke_cli.errors import CommandError
from twostroke_cli.plan import ClusterPlan
from twostroke_cli.screen import Screen
from twostroke_cli.up import Interrupted, StopSignals, running_cluster

PARAMS = {"temperature": 0, "max_tokens": 64}


@dataclass
class _Outcome:
    is_answered: bool = False


async def demo(plan: ClusterPlan, question: str, screen: Screen) -> None:
    """One question from start to end; the run's folder goes too, unless something went wrong."""
    signals, started, outcome = StopSignals(), time.monotonic(), _Outcome()
    screen.line(f"starting a cluster of {plan.prefill} prefill and {plan.decode} decode with {plan.model.name}")
    try:
        async with running_cluster(plan, signals, lambda child, text: _told(screen, child, text)) as cluster:
            screen.line(f"up after {time.monotonic() - started:.1f} s; every part is a process of its own:")
            for child in cluster.children:
                where = " ".join(f"{name}={address}" for name, address in child.endpoints.items())
                screen.line(f"  {child.part.id:<10} pid {child.pid:<8} {where}")
            await signals.unless_stopped(_ask(plan, question, screen, outcome))
    except Interrupted:
        raise CommandError("interrupted; everything is stopped") from None
    shutil.rmtree(plan.run_dir, ignore_errors=True)
    screen.line(f"stopped cleanly after {time.monotonic() - started:.1f} s in all")
    if not outcome.is_answered:
        raise CommandError("the answer was empty")


async def _ask(plan: ClusterPlan, question: str, screen: Screen, outcome: _Outcome) -> None:
    screen.line()
    screen.line(f"> {question}")
    answer = await ask(plan.http, question, PARAMS)
    outcome.is_answered = bool(answer.text.strip())
    screen.line()
    print_explanation(answer)


def _told(screen: Screen, child: Child, text: str) -> None:
    """Only what should not happen in a demo is worth a line."""
    if not text.startswith(("started", "ready")):
        screen.line(f"{child.part.id} {text}")
