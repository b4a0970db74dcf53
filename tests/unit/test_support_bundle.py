"""What leaves in a support bundle holds no secret, and is still of use."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from twostroke_cli.bundle import redacted, secret_values, write_bundle

SECRETS = ("s3cr3t-of-alice", "hf_AbCdEfGhIjKlMnOp", "sk-0123456789abcdef", "pa55word", "ZXlKaGJHY2k=")


@pytest.mark.parametrize(
    "line",
    [
        "api_key=s3cr3t-of-alice",
        '{"api-key": "s3cr3t-of-alice", "port": 1}',
        "Authorization: Bearer s3cr3t-of-alice",
        "authorization: basic ZXlKaGJHY2k=",
        "HF_TOKEN=hf_AbCdEfGhIjKlMnOp",
        "using hf_AbCdEfGhIjKlMnOp for the hub",
        "redis://user:pa55word@10.0.0.1:6379/0 is away",
        "OPENAI_API_KEY='sk-0123456789abcdef'",
        '"password" : "pa55word"',
        "TWOSTROKE_API_KEY: s3cr3t-of-alice",
    ],
)
def test_secrets_are_blacked_out(line: str) -> None:
    shown = redacted(line)
    assert not [secret for secret in SECRETS if secret in shown], shown
    assert "***" in shown


def test_what_is_no_secret_stays() -> None:
    explanation = {
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
        "waterfalls": {"second_token": {"total_s": 0.5}, "ttft": None},
        "first_token_worker": "p0",
        "token_worker": "d0",
        "second_token_s": None,
    }
    text = json.dumps(explanation)
    metric = 'twostroke_stage_seconds_sum{stage="transfer",waterfall="second_token"} 0.5\ntwostroke_tokens_total 7'
    address = "worker d0 at 127.0.0.1:9000, http://10.0.0.7:4317"
    assert redacted(text) == text
    assert redacted(metric) == metric
    assert redacted(address) == address


def test_values_of_secret_variables_go_whatever_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOSTROKE_API_KEY", "an-odd-value-42")
    assert redacted("said: an-odd-value-42!", secret_values()) == "said: ***!"


async def test_a_bundle_without_a_cluster_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOSTROKE_API_KEY", "s3cr3t-of-alice")
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "cluster.json").write_text('{"model_dir": "/m", "redis": "redis://u:pa55word@h:1"}')
    (run_dir / "logs" / "router-0.log").write_text(
        "ready\nAuthorization: Bearer s3cr3t-of-alice\nkey s3cr3t-of-alice\n"
    )
    target = tmp_path / "bundle.tar.gz"
    names = await write_bundle("127.0.0.1:1", run_dir, target)
    assert {"versions.json", "cluster.json", "logs/router-0.log", "router/metrics.txt.missing"} <= set(names)
    with tarfile.open(target) as archive:
        content = {
            member.name: archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in archive.getmembers()
        }
    everything = "".join(content.values())
    assert not [secret for secret in SECRETS if secret in everything]
    assert json.loads(content["twostroke-support/versions.json"])["packages"]["twostroke"]
    assert "ready" in content["twostroke-support/logs/router-0.log"]
