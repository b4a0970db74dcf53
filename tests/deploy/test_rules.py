"""The rules, fed by hand with series: each alert fires on its cause, and nothing else does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.support.prometheus import ROOT, RULES, promtool, rules_of

ALERTS = rules_of("alerts.rules.yaml")
RECORDING = rules_of("recording.rules.yaml")
RUNBOOK = ROOT / "docs" / "operations.md"
MINUTES = 80
FLAT = f"x{MINUTES}"

ROUTER = 'namespace="ns",job="twostroke-router",instance="r0"'
PREFILL, DECODE = 'namespace="ns",worker="p0",role="prefill"', 'namespace="ns",worker="d0",role="decode"'


def flat(value: float) -> str:
    return f"{value:g}+0{FLAT}"


def rising(per_minute: float) -> str:
    return f"0+{per_minute:g}{FLAT}"


def later(before: float, after: float, minute: int = MINUTES - 20) -> str:
    """A gauge that changes once."""
    return f"{before:g}+0x{minute} {after:g}+0x{MINUTES - minute}"


def bursting(per_minute: float, minute: int = MINUTES - 20) -> str:
    """A counter that stands still until something happens."""
    return f"0+0x{minute} 0+{per_minute:g}x{MINUTES - minute}"


def requests(**outcomes: str) -> dict[str, str]:
    return {
        f'twostroke_requests_total{{{ROUTER},endpoint="chat",outcome="{key}"}}': each for key, each in outcomes.items()
    }


def latency(metric: str, le: str, good: str) -> dict[str, str]:
    """A histogram of 600 events a minute, of which `good` are at or below `le`."""
    whole = rising(600)
    return {
        f'{metric}_bucket{{{ROUTER},le="{le}"}}': good,
        f'{metric}_bucket{{{ROUTER},le="+Inf"}}': whole,
        f"{metric}_count{{{ROUTER}}}": whole,
    }


def transfer(under_100_ms: float) -> dict[str, str]:
    name = f'twostroke_stage_seconds_bucket{{{ROUTER},waterfall="second_token",stage="transfer",le='
    return {f'{name}"0.1"}}': rising(under_100_ms), f'{name}"1.0"}}': rising(600), f'{name}"+Inf"}}': rising(600)}


def workers(role: str, **states: str) -> dict[str, str]:
    return {f'twostroke_workers{{{ROUTER},role="{role}",state="{state}"}}': each for state, each in states.items()}


def changes(role: str, change: str, values: str) -> dict[str, str]:
    return {f'twostroke_worker_changes_total{{{ROUTER},role="{role}",change="{change}"}}': values}


def dependency(name: str, values: str) -> dict[str, str]:
    return {f'twostroke_dependency_up{{{ROUTER},dependency="{name}"}}': values}


def blocks(worker: str, **states: str) -> dict[str, str]:
    return {f'twostroke_kv_blocks{{{worker},state="{state}"}}': each for state, each in states.items()}


def of_worker(metric: str, worker: str, values: str, more: str = "") -> dict[str, str]:
    return {f"{metric}{{{worker}{more}}}": values}


def reported_twice(series: Mapping[str, str]) -> dict[str, str]:
    """Series of workers come from a router and from the worker itself."""
    twice = {}
    for name, values in series.items():
        is_of_worker = "worker=" in name
        for source in ("r0", "worker") if is_of_worker else ("",):
            twice[name.replace("{", f'{{instance="{source}",', 1) if source else name] = values
    return twice


HEALTHY: dict[str, str] = {
    f"up{{{ROUTER}}}": flat(1),
    f"twostroke_requests_active{{{ROUTER}}}": flat(3),
    f"twostroke_ready_pairs{{{ROUTER}}}": flat(1),
    **requests(stop=rising(600), length=rising(60), cancelled=rising(6), invalid=rising(30), overloaded=flat(0)),
    **latency("twostroke_ttft_seconds", "1.0", rising(598)),
    **latency("twostroke_itl_seconds", "0.1", rising(599)),
    **transfer(600),
    **workers("prefill", ready=flat(1), connecting=flat(0)),
    **workers("decode", ready=flat(1), connecting=flat(0)),
    **changes("prefill", "joined", flat(1)),
    **changes("decode", "lost", flat(2)),
    **changes("decode", "left", bursting(1)),
    **dependency("etcd", flat(1)),
    **dependency("redis", flat(1)),
    **blocks(PREFILL, free=flat(20), cached=flat(50), leased=flat(30), promised=flat(0)),
    **blocks(DECODE, free=flat(0), cached=flat(30), leased=flat(70), promised=flat(10)),
    **of_worker("twostroke_sequences", DECODE, flat(2), ',state="running"'),
    **of_worker("twostroke_sequences", DECODE, flat(6), ',state="waiting"'),
    **of_worker("twostroke_steps_total", DECODE, rising(3000)),
    **of_worker("twostroke_preemptions_total", DECODE, rising(3)),
    **of_worker("twostroke_kv_digest_failures_total", DECODE, flat(1)),
    **of_worker("twostroke_kv_leases_open", DECODE, flat(3)),
    **of_worker("twostroke_kv_transferred_bytes_total", DECODE, rising(1e9)),
    **of_worker("twostroke_prefix_tokens_total", DECODE, rising(100), ',result="hit"'),
    **of_worker("twostroke_prefix_tokens_total", DECODE, rising(300), ',result="miss"'),
    **of_worker("twostroke_kv_faults_total", DECODE, flat(4), ',fault="failed"'),
    **of_worker("twostroke_kv_blocks_quarantined", DECODE, later(0, 8, MINUTES - 5)),
    f'twostroke_placements_total{{{ROUTER},reason="disaggregated"}}': rising(600),
    f'twostroke_telemetry_dropped_total{{{ROUTER},signal="traces"}}': flat(7),
}


@dataclass(frozen=True)
class Case:
    """What changes, and exactly which alerts fire then."""

    name: str
    changed: Mapping[str, str]
    fires: tuple[str, ...] = ()
    gone: tuple[str, ...] = field(default=())
    """Series that are not there, by the start of their names."""

    @property
    def series(self) -> dict[str, str]:
        return {
            name: values
            for name, values in {**HEALTHY, **self.changed}.items()
            if not name.startswith(self.gone or "\0")
        }


SPIKE = f"0+0x{MINUTES - 60} 0+600x3 1800+0x57"
CASES = [
    Case("nothing is wrong", {}),
    Case("a spike of errors an hour ago", requests(internal=SPIKE), ("TwostrokeErrorBurnSlow",)),
    Case(
        "first tokens late, all of them",
        latency("twostroke_ttft_seconds", "1.0", flat(0)),
        ("TwostrokeTtftBurnFast", "TwostrokeTtftBurnSlow"),
    ),
    Case(
        "first tokens late, some of them",
        latency("twostroke_ttft_seconds", "1.0", rising(540)),
        ("TwostrokeTtftBurnSlow",),
    ),
    Case(
        "tokens late, many",
        latency("twostroke_itl_seconds", "0.1", rising(480)),
        ("TwostrokeItlBurnFast", "TwostrokeItlBurnSlow"),
    ),
    Case("tokens late, some", latency("twostroke_itl_seconds", "0.1", rising(588)), ("TwostrokeItlBurnSlow",)),
    Case("requests fail, many", requests(internal=rising(120)), ("TwostrokeErrorBurnFast", "TwostrokeErrorBurnSlow")),
    Case("requests fail, some", requests(deadline=rising(8)), ("TwostrokeErrorBurnSlow",)),
    Case("wrong requests only", requests(invalid=rising(6000)), ()),
    Case("routers gone", {}, ("TwostrokeNoRouter",), gone=("twostroke_", "up")),
    Case("decode pool gone", workers("decode", ready=later(1, 0), connecting=later(0, 1)), ("TwostrokeNoReadyWorker",)),
    Case(
        "prefill pool gone",
        {f"twostroke_ready_pairs{{{ROUTER}}}": later(1, 0), **workers("prefill", ready=later(1, 0))},
        ("TwostrokeNoReadyPair",),
    ),
    Case("pools that do not fit", {f"twostroke_ready_pairs{{{ROUTER}}}": flat(0)}, ("TwostrokeNoReadyPair",)),
    Case(
        "no prefill pool wanted",
        {f"twostroke_ready_pairs{{{ROUTER}}}": flat(0), **workers("prefill", ready=flat(0))},
        (),
    ),
    Case("worker killed", changes("decode", "lost", later(2, 3, MINUTES - 3)), ("TwostrokeWorkerLost",)),
    Case(
        "worker restarts all the time",
        changes("prefill", "restarted", bursting(1)),
        ("TwostrokeWorkerFlapping",),
    ),
    Case("router's port closed", {f"up{{{ROUTER}}}": later(1, 0)}, ("TwostrokeTargetDown",)),
    Case("etcd gone", dependency("etcd", later(1, 0)), ("TwostrokeEtcdUnreachable",)),
    Case("redis gone", dependency("redis", later(1, 0)), ("TwostrokeRedisUnreachable",)),
    Case(
        "refusals",
        requests(overloaded=bursting(60)),
        ("TwostrokeRouterOverloaded",),
    ),
    Case(
        "queue grows",
        of_worker("twostroke_sequences", DECODE, f"0+0x{MINUTES - 30} 0+5x30", ',state="waiting"'),
        ("TwostrokeQueueGrowing",),
    ),
    Case(
        "blocks all taken",
        blocks(DECODE, free=flat(0), cached=later(30, 1), leased=later(70, 99), promised=flat(1)),
        ("TwostrokeKVBlocksExhausted",),
    ),
    Case("preemptions", of_worker("twostroke_preemptions_total", DECODE, rising(60)), ("TwostrokePreemptionStorm",)),
    Case("engine hangs", of_worker("twostroke_steps_total", DECODE, flat(9)), ("TwostrokeEngineStalled",)),
    Case(
        "idle engine",
        {
            **of_worker("twostroke_steps_total", DECODE, flat(9)),
            **of_worker("twostroke_sequences", DECODE, flat(0), ',state="running"'),
        },
    ),
    Case("slow network", transfer(300), ("TwostrokeTransferSlow",)),
    Case(
        "bytes change on the way",
        of_worker("twostroke_kv_digest_failures_total", DECODE, later(1, 2, MINUTES - 5)),
        ("TwostrokeDigestFailures",),
    ),
    Case(
        "hand-offs fail",
        of_worker("twostroke_kv_faults_total", DECODE, bursting(30), ',fault="failed"'),
        ("TwostrokeHandOffsFail",),
    ),
    Case(
        "a peer hangs",
        of_worker("twostroke_kv_blocks_quarantined", DECODE, later(0, 8)),
        ("TwostrokeBlocksQuarantined",),
    ),
    Case("leases lost", of_worker("twostroke_kv_leases_open", DECODE, later(3, 5)), ("TwostrokeLeasesNotReturned",)),
    Case(
        "telemetry dropped",
        {f'twostroke_telemetry_dropped_total{{{ROUTER},signal="traces"}}': bursting(100)},
        ("TwostrokeTelemetryDropped",),
    ),
]


def _as_promtool(case: Case) -> dict[str, object]:
    fired = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(case.fires)]
    expr = 'group by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "name": case.name,
        "interval": "1m",
        "input_series": [{"series": key, "values": values} for key, values in reported_twice(case.series).items()],
        "promql_expr_test": [{"expr": expr, "eval_time": f"{MINUTES - 1}m", "exp_samples": fired}],
    }


def test_every_alert_fires_on_its_cause_and_on_nothing_else(tmp_path: Path) -> None:
    tests = {
        "rule_files": [str(RULES / "recording.rules.yaml"), str(RULES / "alerts.rules.yaml")],
        "evaluation_interval": "2m",
        "tests": [_as_promtool(case) for case in CASES],
    }
    path = tmp_path / "alerts.test.yaml"
    path.write_text(json.dumps(tests))
    assert "SUCCESS" in promtool("test", "rules", path)


def test_the_cases_name_every_alert() -> None:
    assert {alert["alert"] for alert in ALERTS} == {name for case in CASES for name in case.fires}


@pytest.mark.parametrize("file", ["recording.rules.yaml", "alerts.rules.yaml"])
def test_rules_are_valid(file: str) -> None:
    assert "SUCCESS" in promtool("check", "rules", RULES / file)


def test_the_example_configuration_is_valid(tmp_path: Path) -> None:
    """Debian's build knows no Kubernetes discovery: its jobs are checked with a list of none in its place."""
    config = yaml.safe_load((RULES / "prometheus.example.yaml").read_text())
    for job in config["scrape_configs"]:
        if job.pop("kubernetes_sd_configs", None):
            job["static_configs"] = []
    config["rule_files"] = [str(RULES / file) for file in config["rule_files"]]
    path = tmp_path / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    assert "SUCCESS" in promtool("check", "config", path)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_says_what_it_means(alert: dict[str, dict[str, str]]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert ROOT / page == RUNBOOK
    assert anchor in {heading.lower() for heading in re.findall(r"^#+ (\w+)$", RUNBOOK.read_text(), re.MULTILINE)}


def test_operations_has_no_section_for_an_alert_that_is_gone() -> None:
    headings = set(re.findall(r"^#+ (Twostroke\w+)$", RUNBOOK.read_text(), re.MULTILINE))
    assert headings == {alert["alert"] for alert in ALERTS}


def test_no_two_rules_record_the_same() -> None:
    keys = [(rule["record"], json.dumps(rule.get("labels"))) for rule in RECORDING]
    assert len(set(keys)) == len(keys)
