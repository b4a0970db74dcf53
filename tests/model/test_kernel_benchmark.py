"""The benchmark of single kernels checks before it times, and says what failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from twostroke_kernels.torch_backend import TorchBackend

from benchmarks.kernel_attention import TINY_HEADS, attention_case
from benchmarks.kernel_case import KernelCase, WrongResult, require_as_good, require_equal
from benchmarks.kernel_dense import LLAMA_DENSE, TINY_DENSE_SHAPE, dense_case
from benchmarks.kernels import CASES, TINY_CASES, line_of, main, measure
from benchmarks.targets import Ceilings

CPU = torch.device("cpu")


class Broken(TorchBackend):
    """Off by a little everywhere."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return super().rms_norm(x, weight, eps) * 1.05

    def decode_attention(self, *args: object, **kwargs: object) -> torch.Tensor:
        return super().decode_attention(*args, **kwargs) + 0.05  # type: ignore[arg-type]


def test_every_tiny_case_leaves_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "kernels.jsonl"
    assert main(["--tiny", "--results", str(results)]) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["case"] for line in lines] == list(TINY_CASES)
    assert all(line["value"] > 0 and line["unit"] == "us" for line in lines)
    assert "failed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["norm/bf16/3", "attention/decode/bf16/b3/c40"])
def test_what_is_wrong_is_not_timed(name: str) -> None:
    kind = name.split("/")[0]
    if kind == "attention":
        case = attention_case(name, Broken(CPU), TINY_HEADS)
    else:
        case = dense_case(name, Broken(CPU), TINY_DENSE_SHAPE)
    with pytest.raises(WrongResult, match="largest error"):
        measure(case, CPU, None)


def test_the_gates_themselves() -> None:
    exact = torch.randn(8, 8, dtype=torch.float64)
    plain = exact.bfloat16()
    require_as_good("same", plain, exact, plain)
    with pytest.raises(WrongResult):
        require_as_good("far", plain + 1, exact, plain)
    with pytest.raises(WrongResult):
        require_as_good("nan", plain * float("nan"), exact, plain)
    require_equal("one of three", torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), may_differ=1)
    with pytest.raises(WrongResult, match="1 of 3"):
        require_equal("one of three", torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))


def test_a_share_is_of_the_nearer_limit() -> None:
    ceilings = Ceilings(copy_bytes_s=1e12, matmul_flops_s=1e14)
    memory = KernelCase("m", (), lambda: None, bytes=1e9, flops=1e9)
    compute = KernelCase("c", (), lambda: None, bytes=1e6, flops=1e12)
    assert memory.limit_s(ceilings) == pytest.approx(1e-3)
    assert compute.limit_s(ceilings) == pytest.approx(1e-2)


def test_lines_say_rates_and_ratios() -> None:
    case = dense_case("linear/bf16/qkv/3", TorchBackend(CPU), TINY_DENSE_SHAPE)
    measurement = measure(case, CPU, Ceilings(1e12, 1e14))
    assert measurement.share_of_limit is not None
    assert measurement.share_of_limit < 1
    assert "of the limit" in line_of(case, measurement)
    assert "x PyTorch's product alone" in line_of(case, measurement)


def test_cases_are_those_of_the_bars() -> None:
    assert {f"attention/prefill/bf16/{length}" for length in (1024, 2048, 8192, 16384)} <= set(CASES)
    assert {"attention/decode/bf16/b256/c1024", "linear/bf16/gate_up/8192", "sampling/top_k_top_p/64"} <= set(CASES)
    assert LLAMA_DENSE.weight("gate_up") == (28672, 4096)


def test_a_pattern_without_a_case_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "conv/*"]) == 2
    assert "no case matches" in capsys.readouterr().err
