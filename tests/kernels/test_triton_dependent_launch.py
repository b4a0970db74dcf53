"""Programmatic dependent launch: kernels that start early must not show it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import twostroke_kernels.gpu
from torch import Tensor
from twostroke_kernels.backend import PagedBatch, RotaryTable, Rotation, RowNorm

from tests.support.triton_device import DEVICE, REPEATS, gpu

from twostroke_kernels.gpu import dependent_launch  # isort: skip
from twostroke_kernels.triton_backend import TritonBackend  # isort: skip

FOLDER = Path(twostroke_kernels.gpu.__file__).parent
WRITES = ("tl.store", "tl.atomic", ".store(")


def kernels() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Those that are launched so: they take `PDL` and are no part of another."""
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.FunctionDef)
                and "PDL" in [a.arg for a in node.args.args]
                and len(node.args.args) > 1
            ):
                yield f"{path.stem}.{node.name}", node


KERNELS = dict(kernels())


def test_a_device_that_does_not_know_it_goes_without() -> None:
    assert dependent_launch.dependent(torch.device("cpu")) == {"PDL": False}


def test_every_kernel_of_a_decode_step_is_launched_so() -> None:
    wanted = {
        "gemv.gemv_rows",
        "skinny.skinny_tile",
        "rms_norm.norm_rows",
        "activation.silu_mul_rows",
        "rotary.rotate_heads",
        "decode_attention.decode_split",
        "decode_attention.decode_reduce",
    }
    assert wanted <= set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_every_program_waits_before_it_writes(name: str) -> None:
    """Before the wait comes no early end and no write; somewhere it releases the next kernel."""
    body = [ast.unparse(node) for node in KERNELS[name].body]
    waits = [index for index, text in enumerate(body) if text == "await_earlier(PDL)"]
    assert len(waits) == 1, "it waits at the top level, once"
    before = "\n".join(body[: waits[0]])
    assert not any(write in before for write in WRITES)
    assert "return" not in before
    assert any("release_later" in text for text in body)


@pytest.fixture(autouse=True)
def _poison_empty() -> None:
    """Instead of the one that fills new tensors: a filling kernel would keep ours apart."""


class Step:
    """Two layers of a decoder, as a model asks a backend for them."""

    def __init__(self, rows: int) -> None:
        rng = torch.Generator(DEVICE).manual_seed(rows)
        self.backend, self.rows = TritonBackend(DEVICE), rows
        self.start = self._random(rng, rows, 1024)
        self.hidden = torch.empty_like(self.start)
        self.norm = RowNorm(self._random(rng, 1024).abs(), 1e-5)
        sizes = {"qkv": (768, 1024), "o": (1024, 512), "gate_up": (8192, 1024), "down": (1024, 4096)}
        self.layers = [{name: self._random(rng, *s, size=0.03) for name, s in sizes.items()} for _ in range(2)]
        self.head = self._random(rng, 2000, 1024, size=0.03)
        self.pool = self._random(rng, 6 * rows, 2, 2, 64, 1, 128)
        lengths = torch.full((rows,), 333, device=DEVICE)
        tables = torch.randperm(6 * rows, device=DEVICE, generator=rng).view(rows, 6)
        self.batch = PagedBatch(tables, torch.arange(rows + 1, device=DEVICE), lengths, 1, 2048)
        angles = torch.rand(400, 64, device=DEVICE, generator=rng)
        self.rotation = Rotation(RotaryTable(angles.cos(), angles.sin()), None)
        self.slots = tables[:, 5] * 64 + 332 % 64
        self.logits = torch.empty(rows, 2000, device=DEVICE)

    @staticmethod
    def _random(rng: torch.Generator, *shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, device=DEVICE, generator=rng)).bfloat16()

    def __call__(self) -> None:
        backend, norm, hidden = self.backend, self.norm, self.hidden
        hidden.copy_(self.start)
        for index, layer in enumerate(self.layers):
            kv, qkv = self.pool[:, index], backend.norm_linear(hidden, norm, layer["qkv"])
            q = backend.rotate_and_write_kv(qkv, self.batch.context_lens - 1, self.rotation, kv, self.slots)
            attended = backend.decode_attention(q, kv, self.batch, 0.09)
            backend.add_linear(hidden, attended.flatten(1), layer["o"])
            backend.add_linear(hidden, backend.norm_gated_linear(hidden, norm, layer["gate_up"]), layer["down"])
        backend.norm_logits(hidden, norm, self.head, self.logits)

    def bits(self) -> tuple[Tensor, Tensor]:
        """All that a step leaves."""
        return self.logits.clone(), self.pool.clone()


@gpu
@pytest.mark.parametrize("rows", [1, 2, 8, 17, 64, 100])
def test_a_step_has_the_same_bits_with_and_without_in_a_graph_and_out_of_it(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    step = Step(rows)
    with monkeypatch.context() as patch:
        patch.setattr(dependent_launch, "has_dependent_launch", lambda device: False)
        step()
        plain = step.bits()
    torch.cuda.synchronize()
    step()  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for compute in (step, graph.replay):
        for _ in range(REPEATS):
            step.logits.fill_(float("nan"))
            compute()
            assert all(torch.equal(got, wanted) for got, wanted in zip(step.bits(), plain, strict=True))
