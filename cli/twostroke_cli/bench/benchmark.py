"""A whole benchmark: every round on every target in turn, and what follows from all of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec.structs import replace

from twostroke_cli.bench.arrivals import Closed, describe
from twostroke_cli.bench.comparison import compare
from twostroke_cli.bench.crew import send
from twostroke_cli.bench.figures import Summary, parse_slo, summarize
from twostroke_cli.bench.flags import Flags, arrivals_of, check_prompts, form_of, limits_of, prompts_of
from twostroke_cli.bench.job import Job
from twostroke_cli.bench.lengths import Length
from twostroke_cli.bench.outcome import Outcome, Run
from twostroke_cli.bench.prompts import Synthetic
from twostroke_cli.bench.result import Measured, Result, client_facts
from twostroke_cli.bench.targets import Target, access_by, check_names, model_at, serving
from twostroke_cli.bench.waterfall import Explanation, explanations_of, mean_waterfalls

WARM_UP_CLIENTS = 4
WARM_UP_LEN = Length("fixed", 64, 64)
WARM_UP_TOKENS = Length("fixed", 16, 16)


class Progress(Protocol):
    """Told how a benchmark goes on."""

    def begin(self, title: str, total: int | None, seconds: float | None) -> None:
        """A load begins: so many requests, or for so long."""
        ...

    def on_outcome(self, outcome: Outcome) -> None:
        """A request has ended."""
        ...


@dataclass
class _Found:
    runs: list[Run] = field(default_factory=list)
    model: str = ""
    url: str = ""
    explanations: list[Explanation] = field(default_factory=list)


class Benchmark:
    """One benchmark of one or several targets."""

    def __init__(self, targets: Sequence[Target], flags: Flags, rounds: int, wait_s: float) -> None:
        check_names(targets)
        self._targets = targets
        self._flags = flags
        self._rounds = rounds
        self._wait_s = wait_s
        self._slo = parse_slo(flags.slo)
        self._access = access_by(flags.api_key_env)
        spec = prompts_of(flags)
        num_requests, duration_s = limits_of(flags, check_prompts(spec, flags))
        self._job = Job(
            url="",
            key_variable=self._access.key_variable,
            form=form_of(flags, flags.model),
            prompts=spec,
            arrivals=arrivals_of(flags),
            num_requests=num_requests,
            duration_s=duration_s,
            timeout_s=flags.timeout,
            deadline_s=flags.deadline,
            seed=flags.seed,
        )

    def run(self, progress: Progress) -> Result:
        """Measures; the targets take turns, each round begins with another one."""
        found = {target.name: _Found() for target in self._targets}
        for number in range(self._rounds):
            turn = number % len(self._targets)
            for target in (*self._targets[turn:], *self._targets[:turn]):
                with serving(target, self._wait_s) as url:
                    self._measure(target, url, number, found[target.name], progress)
        return self._result(found)

    def _measure(self, target: Target, url: str, number: int, found: _Found, progress: Progress) -> None:
        model = model_at(url, self._access, self._flags.model)
        job = replace(
            self._job,
            url=url,
            form=replace(self._job.form, model=model),
            seed=self._flags.seed + number,
            id_prefix=f"bench-{secrets.token_hex(4)}",
        )
        self._warm_up(job, target)
        title = f"{target.name}, round {number + 1} of {self._rounds}" if self._rounds > 1 else target.name
        progress.begin(title, job.num_requests, job.duration_s)
        found.runs.append(send(job, self._flags.processes, target.name, number, progress.on_outcome))
        found.model, found.url = model, url
        if self._flags.explain:
            answered = sum(not outcome.error for outcome in found.runs[-1].outcomes)
            found.explanations += explanations_of(url, self._access.headers, job.id_prefix, answered)

    def _warm_up(self, job: Job, target: Target) -> None:
        """Made-up prompts of their own: nothing of what is measured is in a cache afterwards."""
        if self._flags.warm_up:
            spec = Synthetic(WARM_UP_LEN, WARM_UP_TOKENS)
            arrivals = Closed(min(WARM_UP_CLIENTS, self._flags.warm_up))
            more = {"num_requests": self._flags.warm_up, "duration_s": None, "id_prefix": f"warm-{job.id_prefix}"}
            warm = replace(job, prompts=spec, arrivals=arrivals, seed=time.time_ns(), **more)
            send(warm, 1, target.name, 0, _ignore)

    def _summary(self, name: str, found: _Found) -> Summary:
        summary = summarize(name, found.runs, self._slo)
        if not self._flags.explain or found.explanations:
            return summary
        return replace(summary, warnings=[*summary.warnings, "the server does not explain its requests: no waterfalls"])

    def _result(self, found: dict[str, _Found]) -> Result:
        runs = {name: sorted(each.runs, key=lambda run: run.round) for name, each in found.items()}
        base, *others = runs.values()
        first = next(iter(found.values()))
        return Result(
            written_unix_s=round(time.time(), 3),
            client=client_facts(),
            load=describe(self._job.arrivals),
            job=replace(self._job, url=first.url, form=replace(self._job.form, model=first.model)),
            warm_up=self._flags.warm_up,
            processes=self._flags.processes,
            targets=[
                Measured(target.name, found[target.name].url, found[target.name].model, target.flags)
                for target in self._targets
            ],
            summaries=[self._summary(name, each) for name, each in found.items()],
            comparisons=[compare(base, each, self._slo) for each in others],
            waterfalls={name: stages for name, each in found.items() if (stages := mean_waterfalls(each.explanations))},
            runs=[run for each in runs.values() for run in each],
        )


def _ignore(outcome: Outcome) -> None:
    """Of a warm-up nothing is kept."""
