"""Options and seeds for every test."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

# Read when gRPC is first imported. Its handlers of forks run in a supervisor's child, which forks to set itself up, and
# abort it if an earlier test's channel is still busy in this process.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


_MARKERS = {"service": "servers", "deploy": "servers", "e2e": "alone", "soak": "alone"}
"""Of whole folders: what `make test` runs beside what. The other folders' tests start nothing and wait for nothing."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if marker := _MARKERS.get(item.path.relative_to(tests).parts[0]):
            item.add_marker(marker)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cluster",
        default="local",
        help="where end-to-end tests run: 'local' starts clusters; 'HTTP_ADDRESS,GRPC_ADDRESS' uses one that is there",
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
