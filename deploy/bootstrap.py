"""Builds `.venv`: a fitting torch, the pinned packages, the generated protos. Runs before anything is installed.

Standard library only. What was done is stamped in `.venv/stamp.json`, so that a second run costs nothing.
`TORCH_INDEX` names the index that torch comes from; its value `pypi` means pip's own default index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "stamp.json"
VENV_PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"
PROTO_DIR = ROOT / "proto" / "twostroke_proto" / "v1"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD_TOOLS = ("hatchling", "grpcio-tools", "mypy-protobuf")


def fail(message: str) -> NoReturn:
    """Ends setup with one line."""
    sys.exit(f"setup: {message}")


def say(message: str) -> None:
    """Prints one line of progress."""
    print(f"setup: {message}", flush=True)


def run(*argv: str | Path) -> None:
    """Runs one command of setup; its failure is setup's."""
    try:
        subprocess.run([str(part) for part in argv], cwd=ROOT, check=True)
    except subprocess.CalledProcessError as error:
        fail(f"{' '.join(str(part) for part in argv)} failed with status {error.returncode}")


def pip(*argv: str | Path) -> None:
    """Runs the virtual env's pip, quietly but for errors and its progress bars."""
    run(VENV_PYTHON, "-m", "pip", "--disable-pip-version-check", *argv)


def digest(paths: Iterable[Path]) -> str:
    """Names the contents of files."""
    found = hashlib.blake2b(digest_size=16)
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def wanted_stamp() -> dict[str, str]:
    """What the stamp says when `.venv` is as the sources ask."""
    return {
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "root": str(ROOT),
        "packages": digest(ROOT / name for name in ("pyproject.toml", "constraints.txt", "hatch_build.py")),
        "protos": digest(sorted(PROTO_DIR.glob("*.proto"))),
    }


def read_stamp() -> dict[str, str]:
    """What the stamp says; empty if there is none."""
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return {}


def protos_are_generated() -> bool:
    """Whether every .proto has its Python beside it."""
    return all(path.with_name(f"{path.stem}_pb2_grpc.py").exists() for path in PROTO_DIR.glob("*.proto"))


def make_venv() -> None:
    """A fresh `.venv` for the interpreter that runs this."""
    base = getattr(sys, "_base_executable", sys.executable)
    say(f"virtual env .venv with {base} ({sys.version.split()[0]})")
    run(base, "-m", "venv", "--clear", VENV)


# ---- torch -----------------------------------------------------------------------------------------------------------


def has_nvidia_device() -> bool:
    """Whether a driver for an NVIDIA GPU is up."""
    signs = ("/dev/nvidia0", "/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")
    return any(Path(sign).exists() for sign in signs)


def head_bytes(url: str) -> int:
    """The size of what lies at a URL; 0 if it cannot be told."""
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=15) as answer:
            return int(answer.headers.get("Content-Length") or 0)
    except (OSError, ValueError):
        return 0


def megabytes(num_bytes: int) -> str:
    """A size in words."""
    return f"{num_bytes / 1e6:,.0f} MB"


def resolve(*requirement: str) -> list[str]:
    """URLs that pip would install for a requirement from its configured sources; empty if it finds none."""
    argv = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "--quiet"]
    argv += ["--ignore-installed", "--report", "-", *requirement]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, check=False)
    if done.returncode:
        return []
    return [item["download_info"]["url"] for item in json.loads(done.stdout)["install"]]


def wheel_on_index(index: str, version: str) -> tuple[bool, str]:
    """Whether an index answers, and the URL of its torch wheel for this interpreter, if one is seen."""
    import platform
    import urllib.parse
    import urllib.request

    listing = f"{index.rstrip('/')}/torch/"
    try:
        with urllib.request.urlopen(listing, timeout=15) as answer:
            text = answer.read().decode(errors="replace")
    except (OSError, ValueError):
        return False, ""
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    for href in re.findall(r'href="([^"#]+)', text):
        name = urllib.parse.unquote(href.rsplit("/", 1)[-1])
        if re.match(rf"torch-{re.escape(version)}(\+cpu)?-{tag}-{tag}-", name) and platform.machine() in name:
            return True, urllib.parse.urljoin(listing, href)
    return True, ""


def install_torch(requirement: str) -> None:
    """Puts torch in: what the index in TORCH_INDEX has, else a local wheel, else PyTorch's CPU index, else pip's."""
    chosen = os.environ.get("TORCH_INDEX", "")
    index = chosen or ("pypi" if has_nvidia_device() or sys.platform == "darwin" else CPU_INDEX)
    local = "" if chosen else next(iter(resolve("--no-deps", requirement)), "")
    if local.startswith("file:") or "+cpu" in local or "%2Bcpu" in local:
        say(f"{requirement}: a wheel that pip was given, in {local.rpartition('/')[0]}")
        pip("install", "-qq", "-c", CONSTRAINTS, requirement)
    elif index == "pypi" or not install_torch_from(index, requirement):
        if chosen not in ("", "pypi"):
            fail(f"TORCH_INDEX={index} does not answer")
        size = sum(head_bytes(url) for url in resolve(requirement))
        say(f"{requirement} and what it needs: {megabytes(size) if size else 'about 3 GB'} to download")
        pip("install", "-c", CONSTRAINTS, requirement)


def install_torch_from(index: str, requirement: str) -> bool:
    """Puts torch in from an index that holds torch; False if the index does not answer."""
    answers, url = wheel_on_index(index, requirement.partition("==")[2])
    if not answers:
        say(f"warning: {index} does not answer; pip's default index has a torch with the CUDA parts, which is large")
        return False
    size = head_bytes(url) if url else 0
    say(f"{requirement} from {index}: {megabytes(size) if size else 'about 190 MB'} to download")
    # Only torch itself from there: what it needs comes from the default index, under the constraints.
    pip("install", "--no-deps", "--index-url", index, requirement)
    return True


def pinned_torch() -> str:
    """The torch requirement in constraints.txt."""
    match = re.search(r"^torch==[\w.]+$", CONSTRAINTS.read_text(), flags=re.MULTILINE)
    return match.group() if match else fail("constraints.txt pins no torch")


def has_torch(requirement: str) -> bool:
    """Whether the virtual env holds that torch already."""
    argv = [str(VENV_PYTHON), "-I", "-c", "from importlib.metadata import version; print(version('torch'))"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("+")[0] == requirement.partition("==")[2]


# ---- all of it -------------------------------------------------------------------------------------------------------


def install_packages() -> None:
    """torch first, by itself; then the rest, pinned; the project last, editable, built with the pinned tools."""
    requirement = pinned_torch()
    if not has_torch(requirement):
        install_torch(requirement)
    say("packages of constraints.txt")
    pip("install", "-qq", "-c", CONSTRAINTS, *BUILD_TOOLS)
    pip("install", "-qq", "-c", CONSTRAINTS, "--no-build-isolation", "-e", ".[dev]")


def is_usable(stamp: dict[str, str], wanted: dict[str, str]) -> bool:
    """Whether `.venv` can be kept: made here, for this version of Python, and its interpreter runs."""
    if any(stamp.get(key) != wanted[key] for key in ("root", "python")):
        return False
    if sys.prefix == str(VENV):
        return True
    return VENV_PYTHON.exists() and subprocess.run([VENV_PYTHON, "-I", "-c", ""], check=False).returncode == 0


def write_stamp(stamp: dict[str, str]) -> None:
    """Says what `.venv` holds now."""
    STAMP.write_text(json.dumps(stamp, indent=1) + "\n")


def main() -> None:
    """Brings `.venv` to what the sources ask, doing only what is missing."""
    wanted, stamp = wanted_stamp(), read_stamp()
    usable = is_usable(stamp, wanted)
    if usable and stamp == wanted and protos_are_generated():
        return
    if not usable:
        make_venv()
    write_stamp({key: wanted[key] for key in ("root", "python")})  # of an interrupted setup, only this is true
    if not usable or stamp.get("packages") != wanted["packages"]:
        install_packages()  # generates the protos too
    else:
        say("protos")
        run(VENV_PYTHON, "hatch_build.py")
    write_stamp(wanted)
    say(f"done; .venv has Python {wanted['python']}")


if __name__ == "__main__":
    main()
