"""What the images hold, without a container engine: `python -m tests.deploy.image_venvs [TARGET...]`.

For each target of deploy/Dockerfile the wheel is built of the files that are copied there, and a virtual environment is
made with the extra that is installed there. Every program of the image must start in it. Then the chart's CPU example
runs with the router of one and the workers of the other, and answers. Takes minutes and some gigabytes of disk.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.deploy.test_images import instructions, stage
from tests.support.chart_processes import example_release
from tests.support.helm import ROOT
from tests.support.tiny_model import make_tiny_llama

PROGRAMS = {
    "router": ("twostroke_router", "twostroke_cli.fetch"),
    "worker-cpu": ("twostroke_prefill", "twostroke_decode"),
    "worker-gpu": ("twostroke_prefill", "twostroke_decode"),
}
MUST_IMPORT = {
    "router": "huggingface_hub",
    "worker-cpu": "twostroke_engine.process",
    "worker-gpu": "twostroke_engine.process, twostroke_kernels.triton_backend, nixl_cu12",
}
MUST_NOT_HOLD = {"router": {"torch", "transformers"}, "worker-cpu": {"transformers"}, "worker-gpu": {"transformers"}}


def run(*argv: str | Path, cwd: Path) -> str:
    """Runs a command; its output, or an error with its last lines."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(word) for word in argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, argv))}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """The wheel of what stage `wheel` copies, and of nothing else."""
    source = folder / "source"
    source.mkdir()
    for word, rest in stage("wheel"):
        for name in rest.split()[:-1] if word == "COPY" else ():
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*_pb2*"))
            else:
                shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    return next(folder.glob("twostroke-*.whl"))


def make_venv(folder: Path, wheel: Path, target: str) -> Path:
    """A virtual environment with the extra of a target; its interpreter. torch is the one that pip finds for a CPU."""
    installs = " ".join(rest for word, rest in stage(f"{target}-packages") if word == "RUN")
    extra = re.findall(r"\*\.whl\)\[([\w,]+)\]", installs)[0]
    run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", folder / target, cwd=folder)
    python = folder / target / "bin" / "python"
    pip = (python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
    run(*pip, f"twostroke[{extra}] @ {wheel.as_uri()}", cwd=folder)
    return python


def check(python: Path, target: str, folder: Path) -> None:
    """Every program of an image starts, and it holds nothing that it shall not."""
    for program in PROGRAMS[target]:
        assert "--help" in run(python, "-P", "-m", program, "--help", cwd=folder), program
    run(python, "-P", "-c", f"import {MUST_IMPORT[target]}", cwd=folder)
    listed = run(python, "-m", "pip", "list", "--format=freeze", cwd=folder).lower().splitlines()
    names = {line.partition("==")[0] for line in listed}
    assert not names & MUST_NOT_HOLD[target], names & MUST_NOT_HOLD[target]
    size = sum(path.stat().st_size for path in (folder / target).rglob("*") if path.is_file())
    print(f"{target}: {len(names)} packages, {size / 1e6:,.0f} MB; {', '.join(PROGRAMS[target])} start", flush=True)


def run_release(folder: Path, pythons: dict[str, Path]) -> None:
    """The chart's CPU example with these interpreters answers a question."""
    make_tiny_llama(folder / "model")
    keys = folder / "keys"
    keys.write_text("tester:k3y\n")
    pods = example_release(folder, keys)
    pods.pythons = pythons
    try:
        for name in ("etcd", "redis", "prefill", "decode", "router"):
            pods.start(name)
        pods.wait(lambda: pods.ask("/ready").is_success, 120, "the release is ready")
        answer = pods.ask("/v1/completions", {"prompt": "the quick brown fox", "max_tokens": 8, "ignore_eos": True})
        assert answer.json()["usage"]["completion_tokens"] == 8, answer.text
    finally:
        statuses = pods.stop()
    print(f"a release of these: 8 tokens over both pools, exit statuses {statuses}", flush=True)


def main(targets: list[str]) -> None:
    """Checks the targets; those of the Dockerfile by default."""
    known = [rest.rpartition(" ")[2] for word, rest in instructions() if word == "FROM"]
    chosen = targets or [name for name in known if name in PROGRAMS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        pythons = {target: make_venv(folder, wheel, target) for target in chosen}
        for target, python in pythons.items():
            check(python, target, folder)
        if {"router", "worker-cpu"} <= set(pythons):
            worker = pythons["worker-cpu"]
            run_release(folder, {"router": pythons["router"], "prefill": worker, "decode": worker})


if __name__ == "__main__":
    main(sys.argv[1:])
