"""Options and seeds for every test."""

from __future__ import annotations

import random

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cluster",
        default="local",
        help="where end-to-end tests run: 'local' starts clusters; 'HTTP_ADDRESS,GRPC_ADDRESS' uses one that is there",
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
