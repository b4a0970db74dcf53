"""The documents hang together: links lead somewhere, every page is listed, both READMEs show the same code."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path

import pytest

from docs.generate import VARIABLES, references
from tests.support.documents import ROOT, RUNNABLE, anchors, blocks, documents, links

README, README_ZH = ROOT / "README.md", ROOT / "README.zh-CN.md"
NAMES = [str(path.relative_to(ROOT)) for path in documents()]


def broken_links(document: Path) -> list[str]:
    """Targets that are not there: a file of the tree, or a heading of one."""
    broken = []
    for target in links(document):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    return broken


def test_the_checker_finds_what_is_broken(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# One `two`\n## One, two!\n```sh\n# no heading\n```\n")
    page.write_text("# Here\n[a](other.md#one-two) [b](other.md#no-heading) [c](gone.md) [d](#here) [e](#there)\n")
    assert broken_links(page) == ["other.md#no-heading", "gone.md", "#there"]
    assert anchors(other) == {"one-two", "one-two-1"}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(ROOT / name) == []


def test_the_index_names_every_page() -> None:
    linked = {(ROOT / "docs" / target.partition("#")[0]).resolve() for target in links(ROOT / "docs" / "index.md")}
    pages = {path for path in documents() if path.parent in (ROOT / "docs", ROOT / "docs" / "reference")}
    assert {str(page.relative_to(ROOT)) for page in pages - linked} == {"docs/index.md"}


def test_the_readmes_show_the_same_code() -> None:
    english, chinese = (
        [(each.language, each.words, each.text) for each in blocks(path)] for path in (README, README_ZH)
    )
    assert english
    assert chinese == english


def test_the_readmes_link_the_same_pages() -> None:
    """Each in its own order; only the link to the other language differs."""
    english, chinese = (set(links(path)) - {README.name, README_ZH.name} for path in (README, README_ZH))
    assert chinese == english


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 250


def test_every_fence_is_closed_and_its_words_are_known() -> None:
    wrong = [str(path.relative_to(ROOT)) for path in documents() if path.read_text().count("\n```") % 2]
    known = {"gpu", RUNNABLE}
    for path in documents():
        wrong += [
            each.name for each in blocks(path) if {word.partition("=")[0] for word in each.words} - {*known, "shows"}
        ]
    assert wrong == []


def test_variables_of_the_reference_are_read_somewhere() -> None:
    """Those that a library of ours reads by itself are known by their names alone."""
    of_libraries = {"HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OTEL_*", "TRITON_CACHE_DIR"}
    names = {name for names in VARIABLES for name in names.split(", ")} - of_libraries
    folders = ("services", "cli", "deploy")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".sh"}]
    text = "".join(path.read_text() for path in sources)
    assert sorted(name for name in names if name not in text) == []


def test_proofs_are_there() -> None:
    """A code span that names tests, as arguments of `make test`, chooses some."""
    wrong = []
    for path in documents():
        for name, word in re.findall(r"`(tests/[\w/.-]+)(?: -k (\w+))?`", path.read_text()):
            source = ROOT / name
            tests = re.findall(r"def (test_\w+)", source.read_text()) if source.is_file() else []
            if not list(ROOT.glob(name)) or (word and not any(word in test for test in tests)):
                wrong.append(f"{path.relative_to(ROOT)}: {name} {word}")
    assert wrong == []


def test_the_licence_is_the_one_that_is_named() -> None:
    """The text of Apache-2.0 as apache.org has it, and its name wherever one is asked for."""
    apache = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == apache
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == {"text": "Apache-2.0"}
    assert json.loads((ROOT / "examples" / "node" / "package.json").read_text())["license"] == "Apache-2.0"


def test_flags_that_are_named_exist() -> None:
    """In code spans that begin with one: flags of ours, or of the programs in benchmarks and tests/soak."""
    flag = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])")
    programs = [path for name in ("benchmarks", "tests/soak") for path in (ROOT / name).rglob("*.py")]
    known = {name for text in references().values() for name in flag.findall(text)}
    known |= {name for path in programs for name in flag.findall(path.read_text())}
    known |= {"--build-arg"}  # of docker
    spans = [(path, span) for path in documents() for span in re.findall(r"`(--[^`\n]*)`", path.read_text())]
    assert len(spans) > 50
    wrong = [f"{path.relative_to(ROOT)}: {span}" for path, span in spans if set(flag.findall(span)) - known]
    assert wrong == []
