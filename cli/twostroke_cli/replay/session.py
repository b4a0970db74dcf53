"""One call of `twostroke replay`: the replays that it makes, and what it says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import msgspec
from rich.console import Console
from twostroke_router.placement import POLICIES

from twostroke_cli.bench.trace import Row
from twostroke_cli.errors import CommandError
from twostroke_cli.replay.cluster import Cluster, Outcome
from twostroke_cli.replay.figures import Figures, figures_of, ideal_hit_share
from twostroke_cli.replay.planning import Plan
from twostroke_cli.replay.show import show_table, write_chart
from twostroke_cli.replay.simulation import Simulation


def reshaped(rows: Sequence[Row], speed: float, is_spread: bool) -> list[Row]:
    """The same requests `speed` times as fast; spread: those of one moment part the time until the next one evenly."""
    moments = [list(some) for _, some in groupby(rows, key=lambda row: row.at_s)]
    times: list[float] = []
    for some, following in pairwise([*moments, moments[-1]]):
        step_s = (following[0].at_s - some[0].at_s) / len(some) if is_spread else 0.0
        times += [some[0].at_s + place * step_s for place in range(len(some))]
    begin_s = rows[0].at_s
    return [msgspec.structs.replace(row, at_s=(at_s - begin_s) / speed) for row, at_s in zip(rows, times, strict=True)]


class ReplaySession:
    """Replays a trace under each policy, or on clusters of many sizes."""

    def __init__(self, rows: Sequence[Row], cluster: Cluster, policies: Sequence[str], slo: dict[str, float]) -> None:
        for name in policies:
            if name not in POLICIES:
                raise CommandError(f"--policy {name}: expected one of {', '.join(POLICIES)}")
        self._rows, self._cluster, self._policies, self._slo = rows, cluster, policies, slo
        self._found: list[Figures] = []
        self._outcomes: dict[str, Sequence[Outcome]] = {}
        self._ideal = ideal_hit_share(rows, cluster.limits.block_len)

    def run(self) -> None:
        """One replay a policy, and a table of them."""
        for policy in self._policies:
            self._found.append(self._replay(policy, self._cluster.prefill, self._cluster.decode))
        show_table(self._found, self._ideal, Console())

    def plan(self, share: float) -> None:
        """The fewest workers that meet the objectives, and every cluster that was tried on the way.

        Raises:
            CommandError: there are no objectives, or several policies.
        """
        if not self._slo or len(self._policies) > 1:
            raise CommandError("--plan needs --slo, and one --policy at most")
        plan = Plan(lambda prefill, decode: self._replay(self._policies[0], prefill, decode), share)
        best = plan.fewest()
        self._found = sorted(plan.tried.values(), key=lambda each: (each.prefill + each.decode, each.prefill))
        show_table(self._found, self._ideal, Console())
        parts = f"{best.prefill} prefill and {best.decode} decode workers" if best.prefill else f"{best.decode} workers"
        print(f"{100 * share:g} % of the requests in time: {parts} ({100 * (best.goodput or 0):.1f} %)")

    def write(self, json_file: Path | None, png_file: Path | None) -> None:
        """The figures as JSON, and a chart of the replays."""
        if json_file is not None:
            json_file.write_bytes(
                msgspec.json.format(msgspec.json.encode({"ideal": self._ideal, "found": self._found}))
            )
        if png_file is not None:
            write_chart(self._outcomes, png_file)

    def _replay(self, policy: str, prefill: int, decode: int) -> Figures:
        cluster = replace(self._cluster, prefill=prefill, decode=decode)
        outcomes = Simulation(self._rows, cluster, POLICIES[policy]).run()
        self._outcomes[f"{policy}, {prefill}P{decode}D"] = outcomes
        return figures_of(policy, (prefill, decode, cluster.routers), outcomes, self._slo)
