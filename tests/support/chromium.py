"""A headless Chromium: one that is installed, or Debian's, unpacked into `.run/cache` without root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.cluster import wait_until

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".run" / "cache" / "chromium"
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = ("chromium-common", "chromium-headless-shell", "fonts-inter")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-port=0",
    # Loopback alone: a page that asks for anything else gets an error, and the test sees the request.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class NoChromium(Exception):
    """There is none on this machine, and none can be fetched; says why."""


@dataclass(frozen=True)
class Chromium:
    """How to start one."""

    binary: str
    env: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[str]:
        """A browser with a fresh profile; yields the URL of its DevTools socket."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            where = Path(profile) / "DevToolsActivePort"
            command = [self.binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
            with (Path(profile) / "log").open("wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **self.env})

            def listens() -> bool:
                assert process.poll() is None, (Path(profile) / "log").read_text(errors="replace")
                return where.exists() and where.read_text().count("\n") > 0

            try:
                wait_until(listens, 30, "Chromium listens")
                port, path = where.read_text().splitlines()[:2]
                yield f"ws://127.0.0.1:{port}{path}"
            finally:
                process.terminate()
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def find_chromium() -> Chromium:
    """The one that `CHROMIUM` names, the unpacked one, one on PATH, or else a fetched one."""
    if named := os.environ.get("CHROMIUM"):
        return Chromium(named)
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    return Chromium(installed) if installed and not CACHE.exists() else fetched_chromium()


def fetched_chromium() -> Chromium:
    """Debian's, with a font of its own: it draws the same on every machine.

    Raises:
        NoChromium: there is no way to fetch it here.
    """
    if not CACHE.exists():
        _fetch()
    libraries = [*CACHE.glob("usr/lib/*-linux-gnu*"), *CACHE.glob("usr/lib/*-linux-gnu*/pulseaudio")]
    env = {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "XDG_DATA_HOME": str(CACHE / "usr/share")}
    return Chromium(str(CACHE / "usr/lib/chromium/chromium-headless-shell"), env)


def _fetch() -> None:
    """Downloads what apt would install and unpacks it; of several that do, the first one's is kept."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise NoChromium("no Chromium on PATH, and no apt-get or dpkg-deb to fetch one with")
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as name:
        folder = Path(name)
        # A list of its own: the system's may be old, and only root may renew it.
        lists = [f"-oDir::State::lists={folder / 'lists'}", f"-oDir::Cache={folder / 'cache'}", "-oAPT::Sandbox::User="]
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "cache" / "archives" / "partial").mkdir(parents=True)
        _apt(folder, *lists, "update")
        plan = _apt(folder, *lists, "install", "--simulate", "--no-install-recommends", *PACKAGES)
        missing = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
        wanted = sorted({*PACKAGES, *missing})
        _apt(folder, *lists, "download", *wanted)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)
        try:
            (folder / "root").rename(CACHE)
        except OSError as error:
            if not CACHE.exists():
                raise NoChromium(f"cannot keep the fetched Chromium: {error}") from error


def _apt(folder: Path, *arguments: str) -> str:
    command = ["apt-get", "-q", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        raise NoChromium("no Chromium on PATH, and apt-get takes too long") from None
    if done.returncode:
        raise NoChromium(f"no Chromium on PATH, and apt-get cannot fetch one: {done.stderr.strip()[-300:]}")
    return done.stdout
