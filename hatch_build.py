"""Hatch build hook: generates Python from the .proto files, on install and on wheel build."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
PROTO_ROOT = ROOT / "proto"


def generate(proto_root: Path = PROTO_ROOT) -> list[Path]:
    """Runs protoc over every .proto under `proto_root`; returns the files it wrote."""
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(proto_root.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    scripts = Path(sys.executable).parent
    plugins = [name for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc") if (scripts / name).exists()]
    code = protoc.main(
        [
            "protoc",
            f"-I{proto_root}",
            f"-I{well_known}",
            *(f"--plugin={name}={scripts / name}" for name in plugins),
            f"--python_out={proto_root}",
            f"--grpc_python_out={proto_root}",
            f"--mypy_out=quiet:{proto_root}",
            f"--mypy_grpc_out=quiet:{proto_root}",
            *(str(source) for source in sources),
        ]
    )
    if code:
        raise RuntimeError(f"protoc failed with status {code} on {[s.name for s in sources]}")
    return sorted(path for path in proto_root.rglob("*_pb2*") if path.suffix in {".py", ".pyi"})


class ProtoBuildHook(BuildHookInterface[Any]):
    """Generates the stubs before hatchling collects files (they are git-ignored artifacts)."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build of any kind."""
        build_data["artifacts"].extend(str(path.relative_to(ROOT)) for path in generate())


if __name__ == "__main__":
    generate()
