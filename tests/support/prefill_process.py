"""A prefill worker's transfer end in a process of its own; control messages go over its standard streams.

One line per message: base64 of msgpack. Lines to here: what the receiver says, or a `RunPrompt`.
"""

from __future__ import annotations

import sys
from base64 import b64decode, b64encode
from threading import Thread
from time import sleep
from typing import Any

import msgspec
import torch
from torch import Tensor
from twostroke_engine.messages import LeaseGrant, PeerMessage
from twostroke_engine.transfer.end import HandOffOutcome
from twostroke_engine.transfer.messages import FirstToken
from twostroke_kernels.backend import Backend
from twostroke_kernels.choice import choose_backend

from tests.support.block_ends import make_block_sending
from tests.support.channel_schemes import make_scheme
from tests.support.transfer_ends import DECODE, Sending, make_request


class RunPrompt(msgspec.Struct, tag="run"):
    """Prefill a prompt of these tokens in chunks, and push it into the lease; pause before each layer, and before each
    write to the receiver's blocks if that is how they get there."""

    request_id: str
    token_ids: tuple[int, ...]
    grant: LeaseGrant
    chunk: int
    pause_s: float = 0.0


class UnhurriedBackend:
    """Another back end, which takes a while before it writes to others' blocks: long enough to be stopped in it."""

    def __init__(self, inner: Backend) -> None:
        self.pause_s = 0.0
        self._inner = inner

    def push_kv(self, *arguments: Any) -> Tensor:
        sleep(self.pause_s)
        return self._inner.push_kv(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Outcome(msgspec.Struct, tag="outcome"):
    """A hand-off closed."""

    request_id: str
    error: str
    kv_bytes: int


ToPrefill = PeerMessage | RunPrompt
FromPrefill = PeerMessage | Outcome


def to_line(message: ToPrefill | FromPrefill) -> bytes:
    return b64encode(msgspec.msgpack.encode(message)) + b"\n"


def _read(sending: Sending, backend: UnhurriedBackend) -> None:
    decoder: msgspec.msgpack.Decoder[ToPrefill] = msgspec.msgpack.Decoder(ToPrefill)
    for line in sys.stdin.buffer:
        message = decoder.decode(b64decode(line))
        if isinstance(message, PeerMessage):
            sending.sender.receive(DECODE, message.message)
        else:
            backend.pause_s = message.pause_s
            Thread(target=_run, args=(sending, message), daemon=True).start()


def _run(sending: Sending, run: RunPrompt) -> None:
    prompt = sending.begin(make_request(run.request_id, run.token_ids), run.grant)
    while prompt.num_left:
        prompt.chunk(run.chunk, lambda layer: sleep(run.pause_s))
    prompt.finish((FirstToken(0, 5),))


def main() -> None:
    """Runs until it is killed; the first argument names the channel, the second the device."""
    torch.set_num_threads(1)
    name, device = sys.argv[1], torch.device(sys.argv[2] if len(sys.argv) > 2 else "cpu")
    backend = UnhurriedBackend(choose_backend(device))
    if name == "cuda_ipc":
        sending = make_block_sending(device, timeout_s=10.0, backend=backend)
    else:
        sending = Sending(make_scheme(name, 10.0), timeout_s=10.0)

    def say(message: FromPrefill) -> None:
        sys.stdout.buffer.write(to_line(message))
        sys.stdout.buffer.flush()

    def closed(outcome: HandOffOutcome) -> None:
        say(Outcome(outcome.request_id, outcome.error, outcome.kv_bytes))

    sending.host.hand_off_closed = closed  # type: ignore[method-assign]
    sending.sender.deliver_to(say)
    Thread(target=_read, args=(sending, backend), daemon=True).start()
    while True:
        sleep(0.005)
        sending.sender.poll(0.0)


if __name__ == "__main__":
    main()
