"""Settings from flags, environment and defaults; every bad value is one line that names where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from twostroke_chassis.settings import HostPort, ServiceSettings, join_host_port, split_host_port


class DemoSettings(ServiceSettings):
    """A service of the tests."""

    role: ClassVar[str] = "demo"

    model_dir: Path = Field(description="folder of the model")
    http: HostPort = Field("127.0.0.1:8000", description="where to listen")
    max_body_bytes: int = Field(1 << 20, ge=1, description="largest request body")
    keep: bool = Field(True, description="keep things")
    num_blocks: int | None = Field(None, gt=0, description="KV blocks")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ID", "CLUSTER", "ETCD", "REDIS", "HTTP", "MODEL_DIR", "NUM_BLOCKS"):
        monkeypatch.delenv(f"TWOSTROKE_{name}", raising=False)


def load(*argv: str) -> DemoSettings:
    return DemoSettings.load(argv, "twostroke-demo")


def test_flags_win_over_environment_and_environment_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOSTROKE_MODEL_DIR", "/env")
    monkeypatch.setenv("TWOSTROKE_CLUSTER", "env")
    monkeypatch.setenv("TWOSTROKE_NUM_BLOCKS", "")
    settings = load("--cluster", "flag", "--no-keep", "--max-body-bytes=7", "--ready-file", "/tmp/r")
    assert (settings.model_dir, settings.cluster, settings.keep) == (Path("/env"), "flag", False)
    assert (settings.max_body_bytes, settings.ready_file, settings.num_blocks) == (7, Path("/tmp/r"), None)
    assert (settings.etcd, settings.redis, settings.wait) == ("http://127.0.0.1:2379", "redis://127.0.0.1:6379", 60)


def test_an_id_is_drawn_once_and_names_the_role() -> None:
    first, second = load("--model-dir", "x"), load("--model-dir", "x")
    assert first.id.startswith("demo-")
    assert first.id == first.id != second.id
    assert load("--model-dir", "x", "--id", "d0").id == "d0"


@pytest.mark.parametrize(
    ("argv", "status", "line"),
    [
        (["--http", "nowhere"], 1, "--http: expected HOST:PORT, got 'nowhere'"),
        (["--http=:80"], 1, "--http: expected HOST:PORT, got ':80'"),
        (["--http", "h:65536"], 1, "--http: expected a port from 0 to 65535, got '65536'"),
        (["--http", "::1:80"], 1, "--http: an IPv6 address needs brackets, as in [::1]:80"),
        (["--etcd", "127.0.0.1:2379"], 1, "--etcd: expected http://HOST:PORT, got '127.0.0.1:2379'"),
        (["--etcd", "http://a:1/v3"], 1, "--etcd: expected http://HOST:PORT and nothing more, got 'http://a:1/v3'"),
        (["--redis", "http://a:1"], 1, "--redis: expected redis://HOST:PORT or rediss://HOST:PORT, got 'http://a:1'"),
        (["--max-body-bytes", "many"], 1, "--max-body-bytes: Input should be a valid integer"),
        (["--max-body-bytes", "0"], 1, "--max-body-bytes: Input should be greater than or equal to 1"),
        (["--wait", "-1"], 1, "--wait: Input should be greater than or equal to 0"),
        (["--wait", "nan"], 1, "--wait: Input should be a finite number"),
        (["--id", "a/b"], 1, "--id: expected letters, digits"),
        (["--cluster", "a*"], 1, "--cluster: expected letters, digits"),
        (["--log-level", "loud"], 1, "--log-level: Input should be 'debug', 'info', 'warning' or 'error'"),
        (["--colour"], 2, "unrecognized arguments: --colour (see twostroke-demo --help)"),
        (["stray"], 2, "unrecognized arguments: stray"),
        (["--http"], 2, "argument --http: expected one argument"),
        (["--ht", "h:1"], 2, "unrecognized arguments: --ht h:1"),
    ],
)
def test_what_is_wrong_is_one_line(argv: list[str], status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("--model-dir", "x", *argv)
    assert ended.value.code == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"twostroke-demo: {line}")
    assert err.count("\n") == 1


def test_a_missing_flag_and_a_bad_variable_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        load()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "twostroke-demo: --model-dir is required (see twostroke-demo --help)\n"
    monkeypatch.setenv("TWOSTROKE_HTTP", "bad")
    with pytest.raises(SystemExit):
        load("--model-dir", "x")
    assert capsys.readouterr().err == "twostroke-demo: TWOSTROKE_HTTP: expected HOST:PORT, got 'bad'\n"
    assert load("--model-dir", "x", "--http", "h:1").http == "h:1"


def test_passwords_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("--model-dir", "x", "--redis", "redis://user:hunter2@/0")
    assert "hunter2" not in capsys.readouterr().err


def test_help_lists_every_flag_in_kebab_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--id", "--cluster", "--etcd", "--redis", "--wait", "--ready-file", "--log-level", "--max-body-bytes"):
        assert flag in text
    assert "largest request body" in text
    assert "_" not in text.replace("__", "").split("options:")[0]


HOSTS = st.one_of(st.ip_addresses().map(str), st.from_regex(r"[a-z][a-z0-9-]{0,10}x", fullmatch=True))


@given(host=HOSTS, port=st.integers(0, 65535))
def test_host_and_port_round_trip(host: str, port: int) -> None:
    assert split_host_port(join_host_port(host, port)) == (host, port)
