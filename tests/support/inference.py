"""A small gRPC client of the public API, for tests that need token ids."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from twostroke_proto.v1 import inference_pb2, inference_pb2_grpc, types_pb2


@dataclass
class Answer:
    """What one choice came to."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: int = 0


def connect(address: str) -> inference_pb2_grpc.InferenceStub:
    """A stub on a plain channel that no proxy setting touches."""
    return inference_pb2_grpc.InferenceStub(grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]))


def generate(
    stub: inference_pb2_grpc.InferenceStub,
    token_ids: Sequence[int],
    sampling: types_pb2.SamplingParams,
    n: int = 1,
    timeout_s: float = 300,
) -> list[Answer]:
    """Runs one request to its end; one answer per choice."""
    answers = [Answer() for _ in range(n)]
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=token_ids), sampling=sampling, n=n)
    for message in stub.Generate(request, timeout=timeout_s):
        answer = answers[message.choice]
        answer.token_ids += [token.id for token in message.tokens]
        answer.text += message.text
        answer.finish = message.finish_reason or answer.finish
    return answers


def generate_all(
    address: str,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[types_pb2.SamplingParams],
    concurrency: int,
) -> list[Answer]:
    """Runs many single-choice requests, `concurrency` at a time; answers in the order of the prompts."""
    stub = connect(address)
    with ThreadPoolExecutor(concurrency) as threads:
        return list(threads.map(lambda pair: generate(stub, pair[0], pair[1])[0], zip(prompts, samplings, strict=True)))
