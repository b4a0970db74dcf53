"""axe-core, which finds what keeps people from using a page; fetched from npm once."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

from tests.support.browser import Page

PACKAGE = "axe-core@4.14.1"
CACHE = Path(__file__).resolve().parents[2] / ".run" / "cache" / PACKAGE
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


class NoAxe(Exception):
    """It cannot be fetched here; says why."""


def axe_script() -> str:
    """Its source."""
    script = CACHE / "axe.min.js"
    if not script.exists():
        _fetch(script)
    return script.read_text()


def _fetch(script: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise NoAxe("no npm to fetch axe-core with")
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", str(CACHE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=CACHE)
    except subprocess.TimeoutExpired:
        raise NoAxe("npm takes too long to fetch axe-core") from None
    if done.returncode:
        raise NoAxe(f"npm cannot fetch axe-core: {done.stderr.strip()[-300:]}")
    with tarfile.open(CACHE / done.stdout.split()[-1]) as archive:
        source = archive.extractfile("package/axe.min.js")
        assert source is not None
        script.write_bytes(source.read())


def violations(page: Page, script: str) -> list[str]:
    """What axe finds wrong with a page as it is now, a line for each rule and place."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(script + ";true")
    run = f"axe.run({{runOnly: {json.dumps(TAGS)}}})"
    found = page.evaluate(
        f"{run}.then(r => r.violations.flatMap(v => v.nodes.map(n => [v.id, n.target.join(' '), n.failureSummary])))"
    )
    return [": ".join(each) for each in found]
