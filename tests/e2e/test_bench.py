"""`twostroke bench` as its user runs it: against a scripted server that misbehaves, and against real clusters."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from twostroke_cli.__main__ import app
from typer.testing import CliRunner

from tests.support.cluster import ONE_THREAD, Cluster
from tests.support.openai_server import OpenAIServer, Reply, openai_server

pytestmark = pytest.mark.e2e


def bench(*argv: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "twostroke_cli", "bench", *argv]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **ONE_THREAD, "COLUMNS": "160"},
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def result_of(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first target's summary, and its outcomes."""
    content = json.loads(file.read_text())
    return content["summaries"][0], content["runs"][0]["outcomes"]


def load(server: OpenAIServer, file: Path, *argv: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """In this process, which is quicker; its clients are processes of their own all the same."""
    done = CliRunner().invoke(app, ["bench", "run", "--url", server.url, "--warm-up", "0", "--json", str(file), *argv])
    assert done.exit_code == 0, done.output
    return result_of(file)


# ---- a scripted server -----------------------------------------------------------------------------------------------


async def troubled(reply: Reply) -> None:
    """Each number has a fate of its own."""
    if reply.number == 1:
        await reply.whole(429, {"error": {"message": "no room"}})
    elif reply.number == 2:
        await reply.begin()
        await reply.piece(" half")
        reply.writer.close()
    elif reply.number == 3:
        await reply.begin()
        await reply.event({"error": {"message": "engine died"}})
        await reply.end(1, 0)
    elif reply.number == 4:
        await reply.begin()
        await reply.piece(" slow")
        await asyncio.sleep(30)
    elif reply.number == 5:
        await reply.whole(400, {"error": {"message": "too long"}})
    elif reply.number == 6:
        reply.writer.write(b"nonsense\r\n\r\n")
        reply.writer.close()
    else:
        await reply.answer()


def test_every_kind_of_failure_is_told_apart_and_none_is_a_success(tmp_path: Path) -> None:
    with openai_server(troubled) as server:
        flags = ("--concurrency", "10", "--requests", "10", "--deadline", "3", "--slo", "ttft=2.9")
        summary, outcomes = load(server, tmp_path / "r.json", *flags)
    errors = {
        "refused": 1,
        "broken off": 1,
        "error event": 1,
        "deadline": 1,
        "HTTP 400": 1,
        "bad answer": 1,
    }
    assert summary["errors"] == errors
    assert (summary["requests"], summary["answered"]) == (10, 4)
    assert summary["goodput"]["met"] == 4
    assert summary["goodput"]["share"] == 0.4
    answered = [outcome for outcome in outcomes if "error" not in outcome]
    assert all(outcome["completion_tokens"] == 3 and len(outcome["gaps_s"]) == 2 for outcome in answered)
    assert [outcome["message"] for outcome in outcomes if outcome.get("error") == "refused"] == ["no room"]


def test_an_open_loop_waits_for_nobody_and_hides_no_queue(tmp_path: Path) -> None:
    turn = asyncio.Lock()

    async def one_at_a_time(reply: Reply) -> None:
        async with turn:
            await asyncio.sleep(0.1)
            await reply.answer(pieces=2, gap_s=0.0)

    with openai_server(one_at_a_time) as server:
        flags = ("--rate", "100", "--arrivals", "constant", "--requests", "10")
        summary, outcomes = load(server, tmp_path / "open.json", *flags)
        closed, _ = load(server, tmp_path / "closed.json", "--concurrency", "1", "--requests", "10")
        replies = list(server.asked)
    assert [outcome["due_at_s"] for outcome in outcomes] == pytest.approx([number / 100 for number in range(10)])
    assert max(outcome["sent_at_s"] for outcome in outcomes) < 0.9, "sent while none was answered"
    # Ten at once through a server that takes one each tenth of a second: the queue is in the latencies.
    assert summary["ttft_s"]["most"] > 0.85
    assert summary["ttft_s"]["most"] > 2 * closed["ttft_s"]["p50"]
    assert summary["lateness_s"]["count"] == 10
    assert replies[0].body["messages"] == replies[10].body["messages"], "a seed asks the same, however it is sent"


def test_many_processes_send_each_request_once_by_the_schedule(tmp_path: Path) -> None:
    with openai_server(Reply.answer) as server:
        form = ("--vocab-size", "9", "--endpoint", "completions")
        flags = ("--rate", "inf", "--requests", "41", "--processes", "3", *form)
        _, outcomes = load(server, tmp_path / "r.json", *flags)
        assert sorted(reply.number for reply in server.asked) == list(range(41))
        assert all(reply.path == "/v1/completions" and max(reply.body["prompt"]) < 9 for reply in server.asked)
    assert [outcome["number"] for outcome in outcomes] == list(range(41))
    assert all(outcome["sent_at_s"] >= outcome["due_at_s"] for outcome in outcomes)


def test_connections_are_kept_and_one_that_was_closed_is_replaced(tmp_path: Path) -> None:
    async def closes_every_fourth(reply: Reply) -> None:
        await reply.answer(pieces=1)
        if reply.number % 4 == 3:
            reply.writer.close()

    with openai_server(closes_every_fourth) as server:
        summary, _ = load(server, tmp_path / "r.json", "--concurrency", "1", "--requests", "12")
        assert summary["answered"] == 12
        assert server.connections == 1 + 3, "one that lists the models, one for each four requests"


def test_an_answer_may_end_with_its_connection(tmp_path: Path) -> None:
    async def until_the_end(reply: Reply) -> None:
        events = 'data: {"choices": [{"delta": {"content": "a"}}]}\n\n' * 2 + "data: [DONE]\n\n"
        reply.writer.write(f"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{events}".encode())
        reply.writer.close()

    with openai_server(until_the_end) as server:
        summary, _ = load(server, tmp_path / "r.json", "--requests", "2")
    assert (summary["answered"], summary["completion_tokens"], summary["token_source"]) == (2, 4, "pieces")


def test_the_key_goes_into_the_header_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_KEY", "s3cret")
    with openai_server(Reply.answer) as server:
        summary, _ = load(server, tmp_path / "r.json", "--requests", "2", "--api-key-env", "BENCH_KEY", "--explain")
        assert {reply.headers["authorization"] for reply in server.asked} == {"Bearer s3cret"}
    assert "the server does not explain its requests: no waterfalls" in summary["warnings"]
    assert "s3cret" not in (tmp_path / "r.json").read_text()
    assert '"BENCH_KEY"' in (tmp_path / "r.json").read_text()


def test_a_duration_ends_both_kinds_of_loop(tmp_path: Path) -> None:
    with openai_server(Reply.answer) as server:
        for number, flags in enumerate((("--concurrency", "3"), ("--rate", "60"))):
            _, outcomes = load(server, tmp_path / f"{number}.json", "--duration", "1", *flags)
            assert len(outcomes) >= 3
            assert all(outcome["due_at_s"] < 1 and "error" not in outcome for outcome in outcomes)


def test_whole_answers_have_no_first_token(tmp_path: Path) -> None:
    async def whole(reply: Reply) -> None:
        assert "stream" not in reply.body
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        await reply.whole(200, {"choices": [{"message": {"content": "a b c"}}], "usage": usage})

    with openai_server(whole) as server:
        summary, _ = load(server, tmp_path / "r.json", "--no-stream", "--requests", "3")
    assert (summary["ttft_s"], summary["itl_s"], summary["completion_tokens"]) == (None, None, 9)
    assert summary["e2e_s"]["count"] == 3


def test_nobody_there_is_one_line() -> None:
    done = bench("run", "--url", "http://127.0.0.1:9", status=1)
    assert done.stderr.startswith("twostroke: http://127.0.0.1:9/v1: ")
    assert done.stderr.count("\n") == 1
    flags = ("--model", "m", "--requests", "2", "--warm-up", "0")
    failed = CliRunner().invoke(app, ["bench", "run", "--url", "http://127.0.0.1:9", *flags])
    assert "no connection" in failed.output
    assert str(failed.exception) == "no request was answered"


# ---- real clusters ---------------------------------------------------------------------------------------------------


def test_a_real_cluster_is_measured_and_explained(cluster: Cluster, tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"))
    flags = ("--concurrency", "2", "--requests", "6", "--prompt-len", "20..40", "--max-tokens", "6", "--warm-up", "1")
    done = bench("run", "--url", cluster.url, "--explain", "--ignore-eos", "--prefix-share", "0.5", *flags, *files)
    summary, outcomes = result_of(tmp_path / "r.json")
    assert summary["answered"] == 6
    assert (summary["completion_tokens"], summary["token_source"]) == (36, "usage")
    assert summary["prompt_tokens"] > 6 * 20
    assert all(0 < outcome["ttft_s"] <= outcome["e2e_s"] for outcome in outcomes)
    waterfalls = next(iter(json.loads((tmp_path / "r.json").read_text())["waterfalls"].values()))
    ttft = next(waterfall for waterfall in waterfalls if waterfall["name"] == "ttft")
    assert ttft["requests"] == 6
    assert sum(stage["seconds"] for stage in ttft["stages"]) == pytest.approx(ttft["total_s"], abs=1e-4)
    assert 0 < ttft["total_s"] <= summary["ttft_s"]["mean"], "the router knows no more than its client"
    assert "prefill_compute" in done.stdout
    assert "prefill_compute" in (tmp_path / "r.html").read_text()


def test_two_kinds_of_cluster_are_compared_and_nothing_is_left(tiny_model: Path, tmp_path: Path) -> None:
    shared = f"--model {tiny_model} --threads 1"
    spawn = (
        "--spawn",
        f"colocated:{shared} --prefill 0 --decode 1",
        "--spawn",
        f"split:{shared} --prefill 1 --decode 1",
    )
    flags = ("--rounds", "1", "--requests", "8", "--concurrency", "4", "--prompt-len", "8", "--max-tokens", "4")
    begin_unix_s = time.time()
    done = bench("compare", *spawn, *flags, "--ignore-eos", "--json", str(tmp_path / "r.json"))
    content = json.loads((tmp_path / "r.json").read_text())
    assert [summary["answered"] for summary in content["summaries"]] == [8, 8]
    (comparison,) = content["comparisons"]
    assert (comparison["base"], comparison["target"], comparison["rounds"]) == ("colocated", "split", 1)
    assert {"TTFT p50", "ITL p50", "output tokens/s"} <= {ratio["figure"] for ratio in comparison["ratios"]}
    assert "split over colocated (1 round)" in done.stdout
    assert content["targets"][1]["flags"].endswith("--prefill 1 --decode 1")
    colocated, split = content["runs"]
    assert begin_unix_s < colocated["begin_unix_s"] < split["begin_unix_s"]
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tiny_model) not in listed, "no process of the clusters is left"


def test_a_cluster_that_cannot_start_says_why(tmp_path: Path) -> None:
    done = bench("run", "--spawn", f"--model {tmp_path}", status=1)
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr
    refused = bench("run", "--spawn", "--http 127.0.0.1:1", status=1)
    assert refused.stderr == "twostroke: --spawn --http 127.0.0.1:1: the benchmark chooses --http itself\n"
