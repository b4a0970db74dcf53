"""Generates text over gRPC; needs only `pip install twostroke[client]`.

python examples/generate_grpc.py 127.0.0.1:8001 "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import sys

import grpc
from twostroke_proto.v1 import inference_pb2, inference_pb2_grpc, types_pb2


def main() -> int:
    """Asks one question and writes the answer as it comes."""
    parser = argparse.ArgumentParser(description="Ask a Twostroke router one question over gRPC.")
    parser.add_argument("address", help="HOST:PORT of the router's gRPC API")
    parser.add_argument("question")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds; the call's deadline is the request's")
    arguments = parser.parse_args()

    message = inference_pb2.ChatMessage(role="user", content=arguments.question)
    request = inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatMessages(messages=[message]),
        sampling=types_pb2.SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens),
    )
    # The address names the router itself: a proxy of the environment is not asked.
    with grpc.insecure_channel(arguments.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        try:
            for response in stub.Generate(request, timeout=arguments.timeout):
                print(response.text, end="", flush=True)
                if response.HasField("usage"):
                    print(f"\n({response.usage.prompt_tokens} tokens in, {response.usage.completion_tokens} out)")
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
