"""The public gRPC API, as grpcurl and as a program with `twostroke[client]` see it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from twostroke_proto.v1 import inference_pb2, types_pb2

from tests.support.cluster import Cluster
from tests.support.inference import connect

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def grpcurl(cluster: Cluster, *arguments: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    binary = shutil.which("grpcurl", path=path)
    assert binary, "grpcurl is in the dev extra"
    done = subprocess.run([binary, "-plaintext", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the packaged grpcurl is an x86-64 program")
def test_grpcurl(cluster: Cluster) -> None:
    assert "twostroke.v1.Inference" in grpcurl(cluster, cluster.grpc, "list")
    assert "rpc Generate" in grpcurl(cluster, cluster.grpc, "describe", "twostroke.v1.Inference")
    body = {"prompt": "The capital of France is", "sampling": {"temperature": 0, "max_tokens": 8}}
    answer = grpcurl(cluster, "-d", json.dumps(body), cluster.grpc, "twostroke.v1.Inference/Generate")
    assert "Paris" in answer
    assert "FINISH_REASON_LENGTH" in answer
    assert "SERVING" in grpcurl(cluster, cluster.grpc, "grpc.health.v1.Health/Check")


def test_example_program(cluster: Cluster) -> None:
    """It imports nothing of ours but the stubs: that `twostroke[client]` is enough for it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "generate_grpc.py"), cluster.grpc, "What is the capital of France?"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    source = (ROOT / "examples" / "generate_grpc.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"__future__", "sys", "argparse", "grpc", "twostroke_proto"}


def test_bad_requests_name_the_field(cluster: Cluster) -> None:
    stub = connect(cluster.grpc)
    for request, field in [
        (inference_pb2.GenerateRequest(prompt="a", sampling=types_pb2.SamplingParams(temperature=-1)), "temperature"),
        (inference_pb2.GenerateRequest(sampling=types_pb2.SamplingParams()), "input"),
        (inference_pb2.GenerateRequest(prompt="a", sampling=types_pb2.SamplingParams(top_p=1.5)), "top_p"),
        (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1 << 30])), "token_ids"),
    ]:
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(request, timeout=20))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert field in refused.value.details()


def test_deadline_is_the_requests(cluster: Cluster) -> None:
    stub = connect(cluster.grpc)
    request = inference_pb2.GenerateRequest(
        prompt="a", sampling=types_pb2.SamplingParams(max_tokens=4000, ignore_eos=True)
    )
    with pytest.raises(grpc.RpcError) as late:
        list(stub.Generate(request, timeout=1))
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_tokenize_and_models(cluster: Cluster) -> None:
    stub = connect(cluster.grpc)
    assert len(stub.Tokenize(inference_pb2.TokenizeRequest(prompt="Hello, world"), timeout=10).token_ids) >= 3
    assert stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10).models[0].max_model_len > 0
