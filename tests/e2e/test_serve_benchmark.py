"""The benchmark of served requests: a real cluster, whole streams, and figures that follow from their times."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from twostroke_cli.bench.outcome import Outcome
from twostroke_cli.bench.servers import running

from benchmarks.model_folder import write_model_folder
from benchmarks.serve import gaps_s, main, output_rate, percentile, streams_of
from benchmarks.servers import ServerOptions, Target, our_server
from benchmarks.workload import TINY, Work

pytestmark = pytest.mark.e2e


def test_a_tiny_load_leaves_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "serve.jsonl"
    assert main(["--tiny", "--clients", "2", "--results", str(results)]) == 0
    lines = {line["case"]: line for line in map(json.loads, results.read_text().splitlines())}
    assert set(lines) >= {"serve/throughput/6x20+8"}
    assert set(lines) <= {"serve/throughput/6x20+8", "serve/itl_p50/2x20+128", "serve/itl_p99/2x20+128"}
    assert all(line["value"] > 0 and line["engine"] == "twostroke" for line in lines.values())
    assert "output tokens/s" in capsys.readouterr().out


def test_streams_carry_every_token_and_a_refusal_is_an_error(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", TINY)
    subject = our_server(ServerOptions(folder, "cpu", tmp_path, max_model_len=256))
    with running(subject.server, 90):
        streams = streams_of(subject.target, Work(3, 30, 12), TINY["vocab_size"], 2, seed=1)
        assert [stream.num_tokens for stream in streams] == [12] * 3
        assert all(1 <= len(stream.piece_times_s) <= 12 for stream in streams)
        assert all(stream.sent_at_s < stream.piece_times_s[0] for stream in streams)
        with pytest.raises(RuntimeError, match="context length is 256"):
            streams_of(subject.target, Work(1, 300, 12), TINY["vocab_size"], 1, seed=1)
        with pytest.raises(RuntimeError, match="404"):
            streams_of(Target(subject.target.url, "nobody"), Work(1, 3, 4), TINY["vocab_size"], 1, seed=1)


def test_a_server_that_ends_is_an_error_with_its_last_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--flags", "--block-size 7", "--results", str(tmp_path / "serve.jsonl")]) == 1
    assert "block" in capsys.readouterr().err


def stream(sent_at_s: float, *events_s: float) -> Outcome:
    gaps = [later - earlier for earlier, later in pairwise(events_s)]
    return Outcome(
        0, 0.0, sent_at_s, ttft_s=events_s[0], gaps_s=gaps, completion_tokens=len(events_s), num_pieces=len(events_s)
    )


def test_figures_follow_from_times() -> None:
    early = stream(0.0, 1.0, 2.0, 3.0, 5.0, 6.0)
    late = stream(0.5, 2.0, 3.5, 5.5, 8.0)
    assert output_rate([early, late]) == pytest.approx(9 / 8)
    # From 2.0, when both stream, to 6.0, when the first ends.
    assert gaps_s([early, late]) == [1.0, 1.0, 1.5, 2.0, 2.0]
    assert gaps_s([early, stream(0.0, 7.0, 8.0)]) == []
    assert percentile(list(range(100)), 0.99) == 99
    assert percentile([1.0], 0.5) == 1.0


def test_every_id_of_the_model_has_text(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, TINY)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == TINY["vocab_size"]
    assert all(tokenizer.decode([number]) for number in range(TINY["vocab_size"]))
    assert tokenizer.decode([300, 301]) == " w205 w206"
