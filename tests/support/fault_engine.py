"""Engine processes of which one can be killed and another made in milliseconds, with channels that go wrong.

`python -m tests.support.fault_engine FD` imports torch and the engine once, and forks an engine process for each byte
that comes over FD together with three files: the engine's socket, a pipe for what was injected, and its log. The answer
is the new process's number. Nothing is left when FD's other end is gone.

The engine is the real one, put together by `twostroke_engine.process`; its KV is compared from outside: both sides tell
a hash of each prompt's KV, on prefill's side as it was computed, on decode's when it is adopted, and when the request
has ended.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import hashlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from twostroke_engine import process
from twostroke_engine.config import EngineConfig
from twostroke_engine.engine import Engine
from twostroke_engine.kv.spec import KVSpec
from twostroke_engine.messages import PeerMessage, RequestUpdate
from twostroke_engine.request import Request, RequestFacts
from twostroke_engine.runner.model_runner import RunnerBuild
from twostroke_engine.transfer import send_pair
from twostroke_engine.transfer.channel import BlockWriter, ChannelFactory, KVChannel
from twostroke_engine.transfer.context import TransferContext
from twostroke_engine.transfer.cuda_ipc import CudaIpcScheme
from twostroke_engine.transfer.end import ChunkOfHandOff, DecodeHost, KVSink, PrefillHost
from twostroke_engine.transfer.messages import FirstToken, KVDestination, ReceiverMessage, SenderMessage
from twostroke_engine.transfer.outlet import Outlet
from twostroke_engine.transfer.plan import SegmentShape
from twostroke_engine.transfer.receiver import KVReceiver
from twostroke_engine.transfer.sender import KVSender

from tests.support.block_ends import HostDriver
from tests.support.fault_blocks import FaultyOutlet, FaultyWriter
from tests.support.fault_channel import FaultyFactory, Injector

FORK, FORK_SHARED = b"f", b"s"
"""An engine; one whose pool peers can write to."""
PID_BYTES = 4
STALL_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


def hash_of(pool: Tensor, block_ids: Sequence[int], num_tokens: int) -> str:
    """Of a prompt's KV, token by token, whatever the size of the blocks it lies in."""
    blocks = pool[list(block_ids)]  # [block, layer, k|v, token, head, dim]
    tokens = blocks.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)[:num_tokens]
    return hashlib.blake2b(tokens.contiguous().view(torch.uint8).cpu().numpy().tobytes(), digest_size=12).hexdigest()


class CheckedEngine(Engine):
    """Tells a hash of each prompt's KV when it is adopted and when its request has ended well."""

    def __init__(
        self, config: EngineConfig, spec: KVSpec, num_blocks: int, runner: Any, eos: Sequence[int], clock: Any
    ) -> None:
        super().__init__(config, spec, num_blocks, runner, eos, clock)
        self._kv_pool: Tensor = runner.kv_pool
        self._adopted: dict[str, tuple[tuple[int, ...], int]] = {}

    def adopt(
        self, request: Request, block_ids: tuple[int, ...], first: tuple[FirstToken, ...], facts: RequestFacts
    ) -> None:
        value = hash_of(self._kv_pool, block_ids, request.num_prompt_tokens)
        _state.injector.tell_hash("adopted", request.id, value)
        if request.n == 1:  # the blocks of several choices are not all kept to the end of the last one
            self._adopted[request.id] = (block_ids, request.num_prompt_tokens)
        super().adopt(request, block_ids, first, facts)

    def take_updates(self) -> tuple[RequestUpdate, ...]:
        updates = super().take_updates()
        for update in updates:
            if update.end is None or update.request_id not in self._adopted:
                continue
            block_ids, num_tokens = self._adopted.pop(update.request_id)
            # Released in this very turn at the earliest, and given to no one since; what was preempted moved.
            if update.end.error is None and not update.end.facts.preemptions:
                _state.injector.tell_hash("kept", update.request_id, hash_of(self._kv_pool, block_ids, num_tokens))
        return updates


class CheckedSender(KVSender):
    """Tells a hash of each prompt's KV when it is computed."""

    def __init__(self, context: TransferContext, host: PrefillHost, wake: Callable[[], None]) -> None:
        super().__init__(context, host, wake)
        self._kv_pool = context.pool
        self._requests: dict[int, Request] = {}
        self._blocks: dict[int, tuple[int, ...]] = {}

    def begin(self, request: Request, destination: KVDestination) -> int:
        sink_id = super().begin(request, destination)
        self._requests[sink_id] = request
        return sink_id

    def step_sink(self, chunks: Sequence[ChunkOfHandOff]) -> KVSink:
        self._blocks.update({chunk.sink_id: chunk.block_ids for chunk in chunks})
        return super().step_sink(chunks)

    def prompt_computed(self, sink_id: int, first: tuple[FirstToken, ...]) -> None:
        request = self._requests.pop(sink_id)
        value = hash_of(self._kv_pool, self._blocks.pop(sink_id), request.num_prompt_tokens)
        _state.injector.tell_hash("computed", request.id, value)
        super().prompt_computed(sink_id, first)

    def deliver_to(self, deliver: Callable[[PeerMessage], None]) -> None:
        def noted(entry: PeerMessage) -> None:
            _state.injector.note_said(entry.message)
            deliver(entry)

        super().deliver_to(noted)


class CheckedReceiver(KVReceiver):
    """Lets the injector know which announcements came."""

    def __init__(self, context: TransferContext, host: DecodeHost, wake: Callable[[], None]) -> None:
        super().__init__(dataclasses.replace(context, stall_timeout_s=STALL_TIMEOUT_S), host, wake)

    def receive(self, peer: str, message: SenderMessage | ReceiverMessage) -> None:
        _state.injector.note_heard(peer, message)
        super().receive(peer, message)


class _State:
    injector: Injector


_state = _State()


def _share_the_pool(parts: Any) -> None:
    """Peers map the pool and write to it, as over CUDA IPC; a file without a name stands in for CUDA's memory."""
    builds: Any = RunnerBuild
    make_pool, driver = builds.pool, HostDriver()

    def pool(build: RunnerBuild, num_blocks: int) -> Tensor:
        return driver.shared(make_pool(build, num_blocks))

    def make_channels(device: torch.device, host: str, timeout_s: float, names: Any, pool: Tensor) -> ChannelFactory:
        return ChannelFactory([CudaIpcScheme(pool, driver, timeout_s)])

    builds.pool, parts.channel_factory = pool, make_channels


def _run_engine(kind: bytes, connection: socket.socket, report_fd: int) -> None:
    """In the new process: the real one's parts, put together as ever, but for those that are wrapped."""

    def report(line: str) -> None:
        os.write(report_fd, f"{line}\n".encode())

    _state.injector = Injector(report)
    parts: Any = process
    if kind == FORK_SHARED:
        _share_the_pool(parts)
    make_channels = parts.channel_factory
    parts.channel_factory = lambda *told, **more: FaultyFactory(make_channels(*told, **more), _state.injector)
    make_outlet = send_pair.outlet_of

    def outlet_of(context: TransferContext, shape: SegmentShape, channel: KVChannel | BlockWriter) -> Outlet:
        if not isinstance(channel, BlockWriter):
            return make_outlet(context, shape, channel)
        writer = FaultyWriter(channel)
        return FaultyOutlet(make_outlet(context, shape, writer), writer, _state.injector)

    outlets: Any = send_pair
    outlets.outlet_of = outlet_of
    parts.Engine, parts.KVSender, parts.KVReceiver = CheckedEngine, CheckedSender, CheckedReceiver
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    code = process.serve(connection)
    logging.shutdown()
    os._exit(code)


def main() -> None:
    """Forks until the other end is gone."""
    asked = socket.socket(fileno=int(sys.argv[1]))
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead leave nothing
    own_pid = os.getpid()
    gc.collect()
    gc.freeze()  # or each collection of a child's would look at, and so copy, what all have in common
    while True:
        data, files, _, _ = socket.recv_fds(asked, len(FORK), 3)
        if not data:
            os._exit(0)
        pid = os.fork()
        if not pid:
            # A stopped process hears of nothing: it has to be ended with the one that made it.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != own_pid:
                os._exit(1)
            asked.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(files[2], sys.stderr.fileno())
            _run_engine(data, socket.socket(fileno=files[0]), files[1])
        for file in files:
            os.close(file)
        asked.sendall(pid.to_bytes(PID_BYTES, "little"))


if __name__ == "__main__":
    main()
