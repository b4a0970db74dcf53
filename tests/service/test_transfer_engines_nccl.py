"""A prefill and a decode engine process share one GPU and hand KV over; for NCCL they pretend to be two hosts."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.messages import EngineReady, InboxMessage, PeerMessage, Reserve, StepReport, Submit
from twostroke_engine.request import Request, SamplingParams
from twostroke_engine.transfer.messages import KVDestination

from tests.support.channel_schemes import needs_nixl
from tests.support.engine_process import Child
from tests.support.tiny_model import make_tiny_llama

MAX_TOKENS = 16


class Pair:
    """Two engine processes; their control messages are relayed, their news collected."""

    def __init__(self, model: Path, channel: str) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.ends: list[str] = []
        self.kv_bytes = 0
        self.requests: dict[str, Request] = {}
        hosts = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        self.prefill, self.decode = Child(hosts | {"NCCL_HOSTID": "p"}), Child(hosts | {"NCCL_HOSTID": "d"})
        config = {
            "model_dir": str(model),
            "device": "cuda",
            "dtype": "float32",
            "num_blocks": 128,
            "max_step_tokens": 64,
            "channels": (channel,),
        }
        self.prefill.send(EngineConfig(**config, worker_id="p", worker_epoch=1, sends_kv=True))  # type: ignore[arg-type]
        self.decode.send(EngineConfig(**config, worker_id="d", worker_epoch=2, receives_kv=True))  # type: ignore[arg-type]
        for child in (self.prefill, self.decode):
            ready = child.receive()
            assert isinstance(ready, EngineReady), ready
        self.fingerprint = ready.kv_spec.fingerprint()
        for child, other, peer in ((self.prefill, self.decode, "stream"), (self.decode, self.prefill, "decode:1")):
            threading.Thread(target=self._read, args=(child, other, peer), daemon=True).start()

    def run(self, requests: list[Request], first: type[Reserve] | type[Submit]) -> None:
        self.requests.update({request.id: request for request in requests})
        ends = len(self.ends) + len(requests) * (2 if first is Reserve else 1)
        for request in requests:
            message: InboxMessage = Reserve(request=request, ttl_s=60) if first is Reserve else Submit(request=request)
            self.decode.send(message)
        due_s = time.monotonic() + 60
        while len(self.ends) < ends:
            assert time.monotonic() < due_s, self.ends
            time.sleep(0.01)

    def _read(self, child: Child, other: Child, peer: str) -> None:
        while True:
            try:
                report = child.receive()
            except OSError:
                return  # stopped
            assert isinstance(report, StepReport), report
            for entry in report.peers:
                other.send(PeerMessage(peer=peer, message=entry.message))
            for update in report.requests:
                for delta in update.deltas:
                    self.tokens[update.request_id, delta.choice] += [token.id for token in delta.tokens]
                if grant := update.reserved:
                    destination = KVDestination(
                        worker_id="d",
                        endpoint="decode:1",
                        lease_id=grant.lease_id,
                        epoch=grant.epoch,
                        kv_fingerprint=self.fingerprint,
                        ttl_s=grant.ttl_s,
                    )
                    self.prefill.send(Submit(request=self.requests[update.request_id], destination=destination))
                if update.end:
                    self.kv_bytes += update.end.facts.kv_bytes
                    self.ends.append(update.end.message)


def make_request(name: str, number: int) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    prompt = tuple((number * 31 + at) % 200 + 3 for at in range(9 + 23 * number))
    return Request(id=f"{name}{number}", token_ids=prompt, sampling=sampling)


@pytest.mark.gpu
@pytest.mark.parametrize("channel", ["cuda_ipc", "collective", "shm", "tcp", pytest.param("nixl", marks=needs_nixl)])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")
def test_split_answers_are_colocated_answers(tmp_path: Path, channel: str) -> None:
    pair = Pair(make_tiny_llama(tmp_path), channel)
    try:
        pair.run([make_request("s", number) for number in range(8)], Reserve)
        pair.run([make_request("c", number) for number in range(8)], Submit)
        assert set(pair.ends) == {""}
        assert pair.kv_bytes > 0
        for number in range(8):
            assert len(pair.tokens[f"s{number}", 0]) == MAX_TOKENS
            assert pair.tokens[f"s{number}", 0] == pair.tokens[f"c{number}", 0]
    finally:
        pair.prefill.stop()
        pair.decode.stop()
