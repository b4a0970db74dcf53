"""The rules of the house that a linter does not know: sizes, names, layering of the ground floor, proto comments."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_DIRS = ("proto", "kernels", "engine", "services", "cli", "deploy", "docs", "examples", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
BANNED_MODULES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "types", "manager", "managers"}
BANNED_WORDS = re.compile(r"Manager|Handler|Helper|Utils?$")
PICKLE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
KERNELS_MAY_IMPORT = {"torch", "triton", "twostroke_kernels", *sys.stdlib_module_names}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_files() -> list[Path]:
    """Python that people wrote: generated stubs are not ours to shape."""
    files = [path for folder in (*SOURCE_DIRS, "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in (*files, ROOT / "hatch_build.py") if "_pb2" not in path.name]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def functions() -> Iterator[tuple[Path, Function]]:
    for path in source_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, Function):
                yield path, node


def where(path: Path, node: ast.AST | None = None) -> str:
    name = str(path.relative_to(ROOT))
    return f"{name}:{node.lineno}" if node is not None and hasattr(node, "lineno") else name


def imported(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node, node.module


def test_there_is_something_to_check() -> None:
    assert len(source_files()) > 50


def test_no_file_is_too_long() -> None:
    lengths = {where(path): len(path.read_text().splitlines()) for path in source_files()}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    long = {
        where(path, node): (node.end_lineno or 0) - node.lineno + 1
        for path, node in functions()
        if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_every_argument_is_typed() -> None:
    bare = [
        f"{where(path, node)} {node.name}({argument.arg})"
        for path, node in functions()
        if not _is_kernel(node)
        for argument in _arguments(node)
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    assert bare == []


def _is_kernel(node: Function) -> bool:
    """Triton has no annotations for a kernel's arguments: what they are is said by its launcher."""
    return any(re.match(r"(triton|gluon)\.jit\b", ast.unparse(decorator)) for decorator in node.decorator_list)


def _arguments(node: Function) -> list[ast.arg]:
    args = node.args
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *(a for a in (args.vararg, args.kwarg) if a is not None)]


def test_no_module_has_a_name_that_says_nothing() -> None:
    named = [
        where(path) for path in source_files() if path.stem in BANNED_MODULES or path.parent.name in BANNED_MODULES
    ]
    assert named == []


def test_no_class_is_a_manager() -> None:
    named = [
        f"{where(path, node)} {node.name}"
        for path in source_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and BANNED_WORDS.search(node.name)
    ]
    assert named == []


def test_nothing_is_pickled() -> None:
    found = [
        f"{where(path, node)} {name}"
        for path in source_files()
        for node, name in imported(tree_of(path))
        if name.split(".")[0] in PICKLE
    ]
    loads = [
        where(path, node)
        for path in source_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save")
    ]
    assert found + loads == []


def test_kernels_import_torch_triton_and_the_standard_library_alone() -> None:
    found = [
        f"{where(path, node)} {name}"
        for path in sorted((ROOT / "kernels").rglob("*.py"))
        for node, name in imported(tree_of(path))
        if name.split(".")[0] not in KERNELS_MAY_IMPORT
    ]
    assert found == []


def test_nothing_is_left_to_do() -> None:
    marker = re.compile("#.*\\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + ")\\b")
    left = [
        f"{where(path)}:{number}"
        for path in source_files()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if marker.search(line)
    ]
    assert left == []


PROTO_FIELD = re.compile(r"^\s+(?:(?:optional|repeated)\s+)?(?:map<[^>]+>|[\w.]+)\s+\w+\s*=\s*\d+[^;]*;(?P<rest>.*)$")
PROTO_COMMENT = re.compile(r"^\s*// \S")


@pytest.mark.parametrize("path", sorted((ROOT / "proto").rglob("*.proto")), ids=lambda path: path.name)
def test_every_proto_field_has_one_line_of_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    silent, num_fields = [], 0
    for number, line in enumerate(lines, start=1):
        field = PROTO_FIELD.match(line) or re.match(r"^\s+[A-Z][A-Z0-9_]*\s*=\s*\d+;(?P<rest>.*)$", line)
        if field is None:
            continue
        num_fields += 1
        if not PROTO_COMMENT.match(field["rest"]) and not PROTO_COMMENT.match(lines[number - 2]):
            silent.append(f"{path.name}:{number} {line.strip()}")
    assert num_fields > 0
    assert silent == []


@pytest.mark.parametrize(
    "module",
    ["twostroke_router.__main__", "twostroke_prefill.__main__", "twostroke_decode.__main__", "twostroke_cli.__main__"],
)
def test_no_service_and_no_command_loads_torch(module: str) -> None:
    script = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'triton'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
