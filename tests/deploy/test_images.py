"""The Dockerfile without a container engine: a linter, what it copies, and that chart, script and images agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helm import ROOT, Rendered
from tests.support.helm_values import DEFAULT, SMALL, hub, pool, rendered

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
NO_HOOK = {"preStop": {"exec": {"command": []}}}
TARGETS = ("router", "worker-cpu", "worker-gpu")


def instructions() -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def stage(name: str) -> list[tuple[str, str]]:
    """A stage's instructions, its FROM first."""
    words = instructions()
    first = next(at for at, (word, rest) in enumerate(words) if word == "FROM" and rest.endswith(f" AS {name}"))
    after = (at for at, (word, _) in enumerate(words) if word == "FROM" and at > first)
    return words[first : next(after, len(words))]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: its wheel is for x86-64 Linux")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "nothing is sent but what is named"
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert len(copied) >= 8
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert sent == copied


def test_everything_that_the_wheel_is_built_of_is_copied() -> None:
    copied = " ".join(rest for word, rest in stage("wheel") if word == "COPY")
    project = (ROOT / "pyproject.toml").read_text()
    (packages,) = re.findall(r"wheel\]\npackages = \[(.*?)\]", project, flags=re.DOTALL)
    roots = {path.split("/")[0] for path in re.findall(r'"([^"]+)"', packages)}
    assert roots <= set(copied.split())


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_without_rights(target: str) -> None:
    words = stage(target)
    users = [rest for word, rest in words if word == "USER"]
    context = rendered(DEFAULT).pod("router")["securityContext"]
    assert users == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    assert words[-2][0] == "ENTRYPOINT"
    assert words[-2][1].startswith('["tini", "--", "python", "-m"')


def test_ports_and_paths_are_the_charts() -> None:
    chart = rendered(DEFAULT)
    for target, name in (("router", "router"), ("worker-gpu", "decode"), ("worker-cpu", "decode")):
        (exposed,) = [rest for word, rest in stage(target) if word == "EXPOSE"]
        assert [int(port) for port in exposed.split()] == [
            port["containerPort"] for port in chart.container(name)["ports"]
        ]
    gpu = " ".join(rest for _, rest in stage("worker-gpu"))
    (cache,) = re.findall(r"TRITON_CACHE_DIR=(\S+)", gpu)
    assert cache in chart.mounts("decode")
    copied = chart.init("decode")["copy-kernels"]["command"][2].removesuffix("/.")
    assert f"deploy/kernels {copied}" in gpu


def test_what_the_chart_runs_is_in_the_images() -> None:
    base = " ".join(rest for _, rest in stage("base"))
    charts: list[Rendered] = [rendered(hub()), rendered(pool(device="cpu", preStopSeconds=1))]
    programs = {
        words[0]
        for chart in charts
        for name in ("router", "prefill", "decode")
        for container in (chart.container(name), *chart.init(name).values())
        for words in (container["command"], container.get("lifecycle", NO_HOOK)["preStop"]["exec"]["command"])
        if words
    }
    assert programs == {"tini", "python", "cp", "sleep"}
    assert "install -y --no-install-recommends tini" in base
    assert "PATH=/opt/twostroke/venv/bin" in base


def test_each_target_is_built_and_named_as_the_chart_says(tmp_path: Path) -> None:
    said = build(tmp_path, REGISTRY="registry.test/llm", TAG="1.2", PUSH="1", BUILD_ARGS="--build-arg A=1 --pull")
    expected = []
    for target in TARGETS:
        image = f"registry.test/llm/{target}:1.2"
        options = f"--file deploy/Dockerfile --target {target} --tag {image}"
        expected += [f"build {options} --build-arg A=1 --pull .", f"push {image}"]
    assert said == expected


def test_a_tag_is_the_projects_version_by_default(tmp_path: Path) -> None:
    (line,) = build(tmp_path, TARGETS="router")
    version = Rendered(SMALL).container("router")["image"].rpartition(":")[2]
    assert f"--tag twostroke/router:{version} " in line


def test_without_an_engine_there_is_one_line(tmp_path: Path) -> None:
    for tool in ("sh", "sed", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    done = subprocess.run(
        [tmp_path / "sh", ROOT / "deploy" / "images.sh"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("images: neither docker nor podman found")


def build(folder: Path, **env: str) -> list[str]:
    """What images.sh tells an engine that only writes it down."""
    engine = folder / "engine"
    engine.write_text(f'#!/bin/sh\necho "$*" >> {folder}/said\n')
    engine.chmod(0o755)
    subprocess.run(
        ["/bin/sh", ROOT / "deploy" / "images.sh"],
        env={"PATH": "/usr/bin:/bin", "ENGINE": str(engine), **env},
        capture_output=True,
        timeout=30,
        check=True,
    )
    return (folder / "said").read_text().splitlines()
