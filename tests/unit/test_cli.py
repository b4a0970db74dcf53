"""The command line: what it offers, what it refuses and how, and what it makes of a router's answers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from twostroke_cli import client, models, pull
from twostroke_cli.__main__ import app
from twostroke_cli.chat import explanation_table
from twostroke_cli.errors import CommandError
from twostroke_cli.plan import ClusterPlan, parts_of
from twostroke_cli.ports import claim, claim_or_any, split_address
from twostroke_cli.screen import Screen
from twostroke_cli.status import in_bytes, worker_row
from twostroke_cli.up_flags import as_words
from typer.testing import CliRunner

COMMANDS = ["up", "demo", "pull", "chat", "ask", "status"]


def make_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def make_plan(folder: Path, **changes: object) -> ClusterPlan:
    model = models.ModelFolder(folder, "tiny")
    return ClusterPlan(model=model, http="127.0.0.1:8000", grpc="127.0.0.1:8001", run_dir=folder, **changes)  # type: ignore[arg-type]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "twostroke_cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# ---- what it offers --------------------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert [name for name in COMMANDS if name not in shown.output] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "Usage" in shown.output


def test_up_offers_what_the_issue_asks_for() -> None:
    shown = CliRunner().invoke(app, ["up", "--help"], env={"COLUMNS": "200"}).output
    wanted = "--prefill --decode --model --device --dtype --http --grpc --run-dir --etcd --redis --wait --no-restart"
    assert [flag for flag in wanted.split() if flag not in shown] == []


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["up", "--prefill", "-1"], "--prefill"),
        (["up", "--decode", "0"], "--decode"),
        (["up", "--no-such-flag"], "--no-such-flag"),
        (["fly"], "fly"),
        (["ask"], "question"),
    ],
)
def test_wrong_usage_names_the_argument(argv: list[str], named: str) -> None:
    refused = CliRunner().invoke(app, argv, env={"COLUMNS": "200"})
    assert refused.exit_code == 2
    assert named in refused.output


def test_an_error_is_one_line_and_status_1(tmp_path: Path) -> None:
    for argv in (["up", "--model", str(tmp_path / "nowhere")], ["status", "--http", "127.0.0.1:9"], ["pull", "gpt-9"]):
        done = run(*argv)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("twostroke: ")
        assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CommandError, match=f"--http {address}: the port is in use"):
            claim(address, "--http")
        other = claim_or_any(address, "--http")
        assert other != address
        done = run(
            "up", "--model", str(make_model(tmp_path / "m")), "--http", address, "--run-dir", str(tmp_path / "r")
        )
    assert done.returncode == 1
    assert address in done.stderr
    assert not (tmp_path / "r").exists(), "nothing was started"


@pytest.mark.parametrize("address", ["8000", "localhost", ":8000", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:x"])
def test_a_wrong_address_names_the_flag(address: str) -> None:
    with pytest.raises(CommandError, match="--grpc"):
        split_address(address, "--grpc")


# ---- models ----------------------------------------------------------------------------------------------------------


def test_a_local_folder_is_a_model(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "mine")
    assert models.resolve_model(str(folder)) == models.ModelFolder(folder.resolve(), "mine")


def test_a_folder_that_is_no_checkpoint_says_why(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "mine")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CommandError, match="holds no"):
        models.resolve_model(str(folder))
    assert models.resolve_model(str(folder), needs_weights=False).name == "mine", "weights are to be drawn"
    (folder / "config.json").write_text("{")
    with pytest.raises(CommandError, match="not JSON"):
        models.resolve_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CommandError, match="cannot read"):
        models.resolve_model(str(folder))


def test_the_hub_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CommandError, match="--model some/model@v1: ") as refused:
        models.resolve_model("some/model@v1", lambda text: None)
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_the_pinned_ones_are_refused(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"other weights")
    with pytest.raises(CommandError, match="sha256"):
        pull._check(gguf, pull.KNOWN_MODELS["smollm2-135m-instruct"])


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_the_default_plan_is_five_processes(tmp_path: Path) -> None:
    parts = parts_of(make_plan(tmp_path))
    assert [part.id for part in parts] == ["etcd", "redis", "router-0", "prefill-0", "decode-0"]
    router, prefill = parts[2], parts[3]
    assert router.argv[router.argv.index("--http") + 1] == "127.0.0.1:8000"
    assert prefill.argv[prefill.argv.index("--etcd") + 1] == router.argv[router.argv.index("--etcd") + 1]


def test_servers_that_run_already_are_not_started(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, etcd="http://10.0.0.1:2379", redis="redis://10.0.0.2:6379", prefill=0, decode=2)
    parts = parts_of(plan)
    assert [part.id for part in parts] == ["router-0", "decode-0", "decode-1"]
    assert all("http://10.0.0.1:2379" in part.argv and "redis://10.0.0.2:6379" in part.argv for part in parts)


def test_flags_are_passed_on_if_given() -> None:
    assert as_words(block_size=16, num_blocks=None, dtype="float32") == ("--block-size", "16", "--dtype", "float32")
    assert as_words(batch_invariant=True, threads=1) == ("--batch-invariant", "--threads", "1")
    assert as_words(batch_invariant=False, channels="") == ()


# ---- what a router answers -------------------------------------------------------------------------------------------


async def lines(*events: object, done: bool = True) -> AsyncIterator[str]:
    for event in events:
        yield f"data: {json.dumps(event)}"
        yield ""
    if done:
        yield "data: [DONE]"


def delta(text: str, finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


async def test_a_stream_is_shown_as_it_comes_and_collected() -> None:
    shown: list[str] = []
    last = {"choices": [], "usage": {"prompt_tokens": 3}, "twostroke": {"kv_bytes": 7}}
    answer = await client._collect(lines(delta("Par"), delta("is", "stop"), last), shown.append)
    assert shown == ["Par", "is"]
    assert answer == client.Answer("Paris", "stop", {"prompt_tokens": 3}, {"kv_bytes": 7})


async def test_a_stream_that_breaks_off_is_an_error() -> None:
    with pytest.raises(CommandError, match="broke off"):
        await client._collect(lines(delta("Par"), done=False), lambda text: None)
    with pytest.raises(CommandError, match="no room"):
        await client._collect(lines(delta("Par"), {"error": {"message": "no room"}}), lambda text: None)


def test_the_explanation_names_where_it_ran() -> None:
    facts = {"prefill_worker": "prefill-0", "decode_worker": "decode-1", "kv_bytes": 2_000_000, "ttft_s": 0.25}
    table = explanation_table(client.Answer("x", "stop", {"prompt_tokens": 3, "completion_tokens": 1}, facts))
    cells = [cell for column in table.columns for cell in column.cells]
    assert {"prefill-0", "decode-1", "250.0 ms", "2.0 MB in 0 segments"} <= set(cells)


def test_a_worker_is_one_row() -> None:
    worker = {"id": "decode-0", "state": "ready", "load": {"running": 2}, "blocks": {"free": 5}, "hit_rate": 0.5}
    row = worker_row(worker)
    assert row[:3] == ["decode-0", "ready", "2"]
    assert "50 %" in row


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (999, "999 B"), (1_500, "1.5 KB"), (2.5e12, "2.5 TB")])
def test_bytes_for_people(count: float, words: str) -> None:
    assert in_bytes(count) == words


def test_the_screen_is_plain_where_it_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(sys.stdout)
    screen.status("busy")
    screen.line("up")
    assert capsys.readouterr().out == "up\n"
