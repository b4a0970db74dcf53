"""Clusters for the end-to-end tests: started by `twostroke up`, shared by the tests of a session where they can be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from twostroke_cli.models import resolve_model

from tests.support.cluster import Cluster, running_cluster
from tests.support.tiny_model import make_tiny_llama

DEMO_MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real model of `make demo`."""
    return Path(resolve_model(DEMO_MODEL))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that answers at once."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(folder, max_position_embeddings=2048)
    return folder


@pytest.fixture(scope="package")
def cluster(
    request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """One prefill and one decode worker on the real model in bf16, or the cluster named by `--cluster HTTP,GRPC`."""
    where = request.config.getoption("--cluster")
    if where != "local":
        http, grpc = where.split(",")
        yield Cluster(http, grpc)
        return
    with running_cluster(tmp_path_factory.mktemp("cluster"), demo_model, workers=2) as running:
        yield running
