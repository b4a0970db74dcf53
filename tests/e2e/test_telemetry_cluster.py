"""Real clusters at an OTLP receiver: every request one whole trace, wherever it ran and however it ended."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.cluster import Cluster, running_cluster, wait_until
from tests.support.otlp_receiver import OtlpReceiver, Span

pytestmark = pytest.mark.e2e

KEY = "k-of-alice-0123"
ALICE = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_METRIC_EXPORT_INTERVAL", "500")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        yield receiver


@pytest.fixture(scope="module")
def split(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, receiver: OtlpReceiver) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("split")
    (folder / "keys").write_text(f"alice:{KEY}\n")
    flags = ["--api-keys-file", str(folder / "keys"), "--otlp-endpoint", receiver.grpc, "--log-format", "json"]
    with running_cluster(folder / "run", tiny_model, *flags, workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def colocated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, receiver: OtlpReceiver) -> Iterator[Cluster]:
    flags = ["--prefill", "0", "--otlp-endpoint", receiver.http, "--otlp-protocol", "http/protobuf"]
    with running_cluster(tmp_path_factory.mktemp("colocated"), tiny_model, *flags, workers=1) as cluster:
        yield cluster


def complete(cluster: Cluster, request_id: str, **more: Any) -> httpx.Response:
    body = {"prompt": "the dog could do nothing more", "max_tokens": 8, "ignore_eos": True, "temperature": 0, **more}
    headers = {"X-Request-Id": request_id, **ALICE}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=30, trust_env=False)


def cancelled(cluster: Cluster, request_id: str) -> None:
    """A client that goes away when it has seen a first piece."""
    body = {"prompt": "the dog", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    headers = {"X-Request-Id": request_id, **ALICE}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, headers=headers, trust_env=False) as stream:
        next(stream.iter_lines())


def explained(cluster: Cluster, request_id: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def is_there() -> bool:
        response = httpx.get(f"{cluster.url}/requests/{request_id}", headers=ALICE, trust_env=False)
        found.update(response.json() if response.status_code == 200 else {})
        return response.status_code == 200

    wait_until(is_there, 20, f"request {request_id} is explained")
    return found


def whole_trace(receiver: OtlpReceiver, trace_id: str, names: set[str]) -> dict[str, Span]:
    """The spans of a trace by name, once all of these are there; every one hangs on the root."""
    receiver.until(lambda: names <= {span.name for span in receiver.trace(trace_id)}, 30, f"{names}")
    spans = receiver.trace(trace_id)
    assert sorted(names) == sorted(span.name for span in spans)
    (root,) = [span for span in spans if not span.parent_id]
    assert root.name == "text_completion tiny" or root.name.startswith("text_completion ")
    assert all(span.parent_id == root.span_id for span in spans if span is not root)
    return {span.name.partition(" ")[0]: span for span in spans}


def names_of(cluster: Cluster, *children: str) -> set[str]:
    model = httpx.get(f"{cluster.url}/v1/models", headers=ALICE, trust_env=False).json()["data"][0]["id"]
    return {f"text_completion {model}", *children}


def test_prefill_transfer_and_decode_hang_on_the_routers_span(split: Cluster, receiver: OtlpReceiver) -> None:
    assert complete(split, "whole").status_code == 200
    found = explained(split, "whole")
    names = names_of(split, "admission", "placement", "reserve", "prefill", "transfer", "decode")
    spans = whole_trace(receiver, found["trace_id"], names)
    assert spans["prefill"].service == spans["transfer"].service == found["first_token_worker"] == "prefill-0"
    assert spans["decode"].service == found["token_worker"] == "decode-0"
    assert spans["prefill"].events == ["prefill_queued", "prefill_started", "prefill_finished", "first_token"]
    assert spans["transfer"].events == ["transfer_opened", "transfer_committed", "finished"]
    assert spans["decode"].events[-2:] == ["decode_started", "finished"]
    assert spans["transfer"].attributes["twostroke.kv.segments"] > 0
    stages = [stage["stage"] for stage in found["waterfalls"]["ttft"]["stages"]]
    assert stages[:5] == ["admission", "placement", "reserve", "prefill_queue", "prefill_compute"]
    if second := found["waterfalls"]["second_token"]:
        wanted = ["transfer", "decode_admission", "first_step", "unattributed"]
        assert [stage["stage"] for stage in second["stages"]] == wanted
    total = sum(stage["seconds"] for stage in found["waterfalls"]["ttft"]["stages"])
    assert total == pytest.approx(found["ttft_s"])


def test_a_colocated_request_has_prefill_and_decode_on_one_worker(colocated: Cluster, receiver: OtlpReceiver) -> None:
    assert complete(colocated, "alone").status_code == 200
    found = explained(colocated, "alone")
    spans = whole_trace(receiver, found["trace_id"], names_of(colocated, "admission", "placement", "prefill", "decode"))
    assert spans["prefill"].service == spans["decode"].service == "decode-0"
    assert abs(spans["prefill"].end_ns - spans["decode"].start_ns) < 1_000_000, "two offsets of the wall clock"
    stages = [stage["stage"] for stage in found["waterfalls"]["ttft"]["stages"]]
    assert "reserve" not in stages
    second = found["waterfalls"]["second_token"]
    assert second is None or [stage["stage"] for stage in second["stages"]] == ["first_step", "unattributed"]


def test_cancelled_requests_are_whole_too(split: Cluster, colocated: Cluster, receiver: OtlpReceiver) -> None:
    for cluster, children in (
        (split, ("admission", "placement", "reserve", "prefill", "transfer", "decode")),
        (colocated, ("admission", "placement", "prefill", "decode")),
    ):
        cancelled(cluster, "gone")
        found = explained(cluster, "gone")
        assert found["outcome"] == "cancelled"
        spans = whole_trace(receiver, found["trace_id"], names_of(cluster, *children))
        assert "cancelled" in spans["decode"].events
        assert not spans["decode"].is_error
        assert found["waterfalls"]["ttft"] is not None


def test_a_failed_request_is_whole_too(split: Cluster, receiver: OtlpReceiver) -> None:
    """The decode worker dies in the middle of an answer."""
    body = {"prompt": "the dog", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    headers = {"X-Request-Id": "broken", **ALICE}
    (worker,) = split.processes("decode")
    with httpx.stream("POST", f"{split.url}/v1/completions", json=body, headers=headers, trust_env=False) as stream:
        lines = stream.iter_lines()
        next(lines)
        subprocess.run(["kill", "-9", str(worker["pid"])], check=True)
        with contextlib.suppress(httpx.HTTPError):
            assert [line for line in lines if '"error"' in line]
    found = explained(split, "broken")
    assert found["outcome"] == "unavailable"
    # The dead worker's span died with it; what lives is whole.
    names = names_of(split, "admission", "placement", "reserve", "prefill", "transfer")
    spans = whole_trace(receiver, found["trace_id"], names)
    assert spans["text_completion"].is_error
    assert not receiver.orphans()
    wait_until(lambda: split.ready() and len(split.workers()) == 2, 30, "the decode worker is back")


def test_workers_serve_metrics_of_their_own_and_send_them(split: Cluster, receiver: OtlpReceiver) -> None:
    for role in ("prefill", "decode"):
        wait_until(lambda role=role: bool(split.processes(role)[0]["endpoints"]), 30, f"{role} is ready")  # type: ignore[misc]
        (worker,) = split.processes(role)
        text = httpx.get(f"http://{worker['endpoints']['metrics']}/metrics", trust_env=False).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        labels = families["twostroke_kv_blocks"].samples[0].labels
        assert (labels["worker"], labels["role"]) == (worker["id"], role)
        assert "vllm:num_requests_waiting" in families
        receiver.until(
            lambda worker=worker: any(  # type: ignore[misc]
                point.service == worker["id"] for point in receiver.points.get("twostroke_kv_blocks", ())
            ),
            30,
            f"metrics of {worker['id']}",
        )


def command(*words: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "twostroke_cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "", "COLUMNS": "100", "TWOSTROKE_API_KEY": key},
        check=False,
    )


def test_explain_shows_both_waterfalls(split: Cluster) -> None:
    assert complete(split, "shown").status_code == 200
    explained(split, "shown")
    shown = command("explain", "shown", "--http", split.http)
    assert shown.returncode == 0, shown.stderr
    for word in ("to the first token", "prefill_compute", "unattributed", "prefill on prefill-0, decode on decode-0"):
        assert word in " ".join(shown.stdout.split())
    as_json = command("explain", "shown", "--json", "--http", split.http)
    assert json.loads(as_json.stdout)["request_id"] == "shown"
    missing = command("explain", "never-asked", "--http", split.http)
    assert missing.returncode == 1
    assert "'never-asked' is not known" in missing.stderr


def test_a_support_bundle_holds_what_helps_and_no_key(split: Cluster, tmp_path: Path) -> None:
    assert split.run_dir is not None
    complete(split, "bundled")
    explained(split, "bundled")
    target = tmp_path / "bundle.tar.gz"
    done = command("support-bundle", str(target), "--http", split.http, "--run-dir", str(split.run_dir))
    assert done.returncode == 0, done.stderr
    with tarfile.open(target) as archive:
        content = {
            member.name.removeprefix("twostroke-support/"): archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in archive.getmembers()
        }
    assert {"versions.json", "cluster.json", "logs/router-0.log", "router/metrics.txt"} <= set(content)
    requests = json.loads(content["router/requests.json"])["requests"]
    assert "bundled" in {request["request_id"] for request in requests}
    assert json.loads(content["router/cluster.json"])["workers"]
    assert "twostroke_stage_seconds_bucket" in content["router/metrics.txt"]
    assert KEY not in "".join(content.values())
    first = json.loads(content["logs/router-0.log"].splitlines()[0])
    assert first["role"] == "router"
    assert time.time() - json.loads(content["versions.json"])["taken_unix_s"] < 600
