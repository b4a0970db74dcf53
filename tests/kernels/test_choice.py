"""Which device gets which backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from twostroke_kernels.choice import choose_backend, runs_triton
from twostroke_kernels.invariant_torch import InvariantTorchBackend
from twostroke_kernels.torch_backend import TorchBackend

CUDA = torch.device("cuda")


def test_a_cpu_takes_the_plain_path_and_imports_no_triton() -> None:
    assert type(choose_backend(torch.device("cpu"))) is TorchBackend
    assert type(choose_backend(torch.device("cpu"), batch_invariant=True)) is InvariantTorchBackend
    code = "import sys, torch; from twostroke_kernels.choice import choose_backend as choose\n"
    code += "choose(torch.device('cpu')); choose(torch.device('cpu'), True)\n"
    code += "assert not [name for name in sys.modules if 'twostroke_kernels.gpu' in name]"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((7, 0), None, False),
        ((7, 5), None, False),
        ((8, 0), None, True),
        ((9, 0), None, True),
        ((12, 0), None, True),
        ((9, 4), "7.0", False),
    ],
)
def test_only_nvidia_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, expected: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert runs_triton(CUDA) is expected


def test_without_triton_nothing_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("twostroke_kernels.choice.find_spec", lambda name: None)
    assert not runs_triton(CUDA)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")
def test_this_card() -> None:
    expected = "TritonBackend" if torch.cuda.get_device_capability() >= (8, 0) else "TorchBackend"
    assert type(choose_backend(CUDA)).__name__ == expected
    assert type(choose_backend(CUDA, batch_invariant=True)).__name__ == f"Invariant{expected}"
