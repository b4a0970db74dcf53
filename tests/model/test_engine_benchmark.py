"""The engine's benchmark runs anywhere, measures what its cases say, and only ever appends."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.engine import main
from benchmarks.targets import TARGET_RATIOS, Ceilings, ModelCost, limit_ms, standing
from benchmarks.vllm_peer import _told
from benchmarks.workload import CASES, LLAMA_8B, STEPPED, TINY_CASES, Prompts, Work, measure

pytestmark = pytest.mark.slow

KEYS = {
    *("case", "value", "unit", "peer", "peer_value", "engine", "share_of_limit"),
    *("card", "commit", "torch", "date"),
}
H100 = Ceilings(copy_bytes_s=3.02e12, matmul_flops_s=790e12)


@dataclass
class Told:
    """An engine that takes as long as it is told, run by run."""

    took_s: list[float]
    done: list[Work] = field(default_factory=list)

    def seconds(self, work: Work) -> float:
        self.done.append(work)
        return self.took_s.pop(0)


def test_every_tiny_case_leaves_a_line(tmp_path: Path) -> None:
    results = tmp_path / "results" / "engine.jsonl"
    results.parent.mkdir()
    results.write_text('{"case": "earlier"}\n')
    assert main(["--tiny", "--repeat", "1", "--results", str(results)]) == 0
    earlier, *lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert earlier == {"case": "earlier"}
    assert sorted(line["case"] for line in lines) == sorted(TINY_CASES)
    assert all(set(line) == KEYS and line["value"] > 0 and line["engine"] == "twostroke" for line in lines)
    assert {line["unit"] for line in lines} == {"ms/step", "ms", "output tokens/s", "s"}


def test_patterns_and_names_choose_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "engine.jsonl"
    assert main(["--tiny", "prefill/*", "prefill/bf16/1x8@2", "--repeat", "1", "--results", str(results)]) == 0
    lines = [json.loads(line)["case"] for line in results.read_text().splitlines()]
    assert lines == ["prefill/bf16/2x24", "prefill/bf16/1x8"]
    assert main(["--tiny", "train/*", "--results", str(results)]) == 2
    assert "there are decode/bf16/b2/c40" in capsys.readouterr().err


def test_a_name_may_say_how_often() -> None:
    bench = Told([9.0, 0.3, 0.1, 0.2])
    assert measure("prefill/bf16/1x8@3", bench, 1).value == 200.0
    assert len(bench.done) == 4, "one more to warm up"


def test_the_batch_invariant_mode_stands_beside_the_plain_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "engine.jsonl"
    argv = ["--tiny", "prefill/*", "--batch-invariant", "--repeat", "1", "--results", str(results)]
    assert main(argv) == 0
    plain, invariant = [json.loads(line) for line in results.read_text().splitlines()]
    assert (plain["engine"], plain["peer"]) == ("twostroke", None)
    assert invariant["engine"] == "twostroke --batch-invariant"
    assert (invariant["peer"], invariant["peer_value"]) == ("twostroke", plain["value"])
    assert "of the plain mode" in capsys.readouterr().out


def test_cases_are_the_rows_of_the_targets() -> None:
    assert set(TARGET_RATIOS) == set(STEPPED)
    assert {"decode/bf16/b64/c1024", "prefill/bf16/1x8192", "throughput/bf16/512x512+256", "start/cold"} <= set(CASES)


def test_a_decode_step_is_the_median_of_pairs() -> None:
    # Warm-up, then (first, whole) three times: 128 steps of 10, 30 and 11 ms.
    bench = Told([9.0, 1.0, 2.28, 1.5, 5.34, 1.0, 2.408])
    figure = measure("decode/bf16/b64/c1024", bench, 3)
    assert (figure.value, figure.unit) == (pytest.approx(11.0), "ms/step")
    assert bench.done[0] == Work(32, 1024, 2)
    assert bench.done[1:] == [Work(64, 1024, 1), Work(64, 1024, 129)] * 3


def test_prefill_and_throughput_are_medians_too() -> None:
    prefill = Told([9.0, 0.2, 0.4, 0.3])
    assert measure("prefill/bf16/8x1024", prefill, 3).value == pytest.approx(300)
    assert prefill.done == [Work(8, 1024, 1)] * 4
    crowd = Told([4.0, 2.0, 1.0])
    assert measure("throughput/bf16/512x512+256", crowd, 3).value == pytest.approx(512 * 256 / 2.0)
    with pytest.raises(ValueError, match="no such case"):
        measure("train/bf16/1x1", Told([]), 1)


@pytest.mark.parametrize(
    ("case", "limit"),
    [
        ("decode/bf16/b1/c1024", 5.01),
        ("decode/bf16/b32/c1024", 6.4),
        ("decode/bf16/b64/c1024", 7.8),
        ("decode/bf16/b256/c1024", 16.4),
        ("decode/bf16/b16/c8192", 10.7),
        ("prefill/bf16/1x128", 4.97),
        ("prefill/bf16/1x8192", 167),
    ],
)
def test_limits_are_those_of_the_formula(case: str, limit: float) -> None:
    assert limit_ms(case, ModelCost.of(LLAMA_8B), H100) == pytest.approx(limit, rel=0.01)


def test_throughput_and_starts_have_no_limit() -> None:
    assert limit_ms("throughput/bf16/512x512+256", ModelCost.of(LLAMA_8B), H100) is None
    assert limit_ms("start/cold", ModelCost.of(LLAMA_8B), H100) is None


def test_a_ratio_is_met_below_for_times_and_above_for_rates() -> None:
    assert standing("decode/bf16/b64/c1024", 9.0, "ms/step", 10.0).endswith("(target 0.90, met)")
    assert standing("decode/bf16/b64/c1024", 9.1, "ms/step", 10.0).endswith("(target 0.90, missed)")
    assert standing("throughput/bf16/512x512+256", 106, "output tokens/s", 100).endswith("(target 1.06, met)")
    assert standing("throughput/bf16/512x512+256", 105, "output tokens/s", 100).endswith("(target 1.06, missed)")
    assert standing("start/cold", 20.0, "s", 100.0) == "0.200 of the peer"
    assert standing("start/cold", 20.0, "s", None) == ""


def test_the_same_prompts_in_every_process_and_no_two_alike() -> None:
    ours, peers = Prompts(128256), Prompts(128256)
    drawn = [ours.draw(64) for _ in range(3)]
    assert drawn == [peers.draw(64) for _ in range(3)]
    assert len({tuple(prompt) for prompt in drawn}) == 3


def test_lines_of_the_peers_libraries_are_passed_over() -> None:
    assert _told('{"case": "prefill/bf16/1x128", "value": 10.1, "unit": "ms"}') is not None
    assert _told("INFO loading weights") is None
    assert _told('{"level": "info"}') is None
    assert _told("[1, 2]") is None


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # An empty folder in front of an environment that has no vLLM: the process ends before its first figure.
    argv = ["--tiny", "prefill/*", "--engine", "both", "--vllm-path", str(tmp_path)]
    assert main([*argv, "--results", str(tmp_path / "engine.jsonl")]) == 1
    assert "vLLM ended after 0 of 1 cases" in capsys.readouterr().err
