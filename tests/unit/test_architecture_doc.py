"""docs/architecture.md speaks of things that exist.

Convention: a reference to code is one code span, `package.module` or `package.module:qualname` (a function, class,
`Class.method`, or constant), and begins with the name of one of our packages. Every package under the source roots,
sub-packages included, is named at least once.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "architecture.md"
REFERENCE = re.compile(r"`(twostroke_\w+(?:\.\w+)*)(?::([\w.]+))?(?:\(\))?`")
SOURCE_ROOTS = (ROOT / "proto", ROOT / "kernels", ROOT / "engine", *sorted((ROOT / "services").iterdir()), ROOT / "cli")


def packages() -> dict[str, Path]:
    """Every package of ours, by dotted name."""
    found = {}
    for root in SOURCE_ROOTS:
        for init in sorted(root.glob("twostroke_*/**/__init__.py")):
            found[".".join(init.parent.relative_to(root).parts)] = init.parent
    return found


def source_of(dotted: str) -> Path | None:
    """The file of a module or package, None if there is none."""
    for root in SOURCE_ROOTS:
        path = root.joinpath(*dotted.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.exists():
                return candidate
    return None


def defines(body: list[ast.stmt], qualname: str) -> bool:
    """Whether a function, class or name is defined there, methods and fields of classes included."""
    first, _, rest = qualname.partition(".")
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == first:
            return not rest
        if isinstance(node, ast.ClassDef) and node.name == first:
            return not rest or defines(node.body, rest)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if not rest and any(isinstance(target, ast.Name) and target.id == first for target in targets):
                return True
    return False


def references() -> list[tuple[str, str]]:
    return [(match[1], match[2] or "") for match in REFERENCE.finditer(DOCUMENT.read_text())]


def test_the_checker_knows_what_exists() -> None:
    tree = ast.parse("class A:\n    x: int = 0\n    async def f(self): ...\nB = 1\ndef g(): ...\n")
    assert all(defines(tree.body, name) for name in ("A", "A.x", "A.f", "B", "g"))
    assert not any(defines(tree.body, name) for name in ("C", "A.y", "A.f.z", "B.x", "g.f", "x"))
    assert source_of("twostroke_engine.request") is not None
    assert source_of("twostroke_engine.no_such_module") is None
    assert "twostroke_engine.kv" in packages()


def test_every_package_is_named() -> None:
    named = {module for module, _ in references()}
    # naming a module does not name its package: each package gets a sentence of its own
    assert sorted(set(packages()) - named) == []


def test_every_name_exists() -> None:
    found = references()
    assert len(found) >= 20, "the path of a request names the function at each step"
    wrong = []
    for module, qualname in found:
        source = source_of(module)
        if source is None:
            wrong.append(f"{module}: no such module")
        elif qualname and not defines(ast.parse(source.read_text()).body, qualname):
            wrong.append(f"{module}:{qualname}: {source.relative_to(ROOT)} does not define it")
    assert wrong == []
