"""A prefill worker's transfer end in a process of its own; control messages go over its standard streams.

One line per message: base64 of msgpack. Lines to here: what the receiver says, or a `RunPrompt`.
"""

from __future__ import annotations

import sys
from base64 import b64decode, b64encode
from threading import Thread
from time import sleep

import msgspec
import torch
from twostroke_engine.messages import LeaseGrant, PeerMessage
from twostroke_engine.transfer.end import HandOffOutcome
from twostroke_engine.transfer.messages import FirstToken

from tests.support.channel_schemes import make_scheme
from tests.support.transfer_ends import DECODE, Sending, make_request


class RunPrompt(msgspec.Struct, tag="run"):
    """Prefill a prompt of these tokens in chunks, and push it into the lease; pause before the last layers."""

    request_id: str
    token_ids: tuple[int, ...]
    grant: LeaseGrant
    chunk: int
    pause_s: float = 0.0


class Outcome(msgspec.Struct, tag="outcome"):
    """A hand-off closed."""

    request_id: str
    error: str
    kv_bytes: int


ToPrefill = PeerMessage | RunPrompt
FromPrefill = PeerMessage | Outcome


def to_line(message: ToPrefill | FromPrefill) -> bytes:
    return b64encode(msgspec.msgpack.encode(message)) + b"\n"


def _read(sending: Sending) -> None:
    decoder: msgspec.msgpack.Decoder[ToPrefill] = msgspec.msgpack.Decoder(ToPrefill)
    for line in sys.stdin.buffer:
        message = decoder.decode(b64decode(line))
        if isinstance(message, PeerMessage):
            sending.sender.receive(DECODE, message.message)
        else:
            Thread(target=_run, args=(sending, message), daemon=True).start()


def _run(sending: Sending, run: RunPrompt) -> None:
    prompt = sending.begin(make_request(run.request_id, run.token_ids), run.grant)
    while prompt.num_left:
        prompt.chunk(run.chunk, lambda layer: sleep(run.pause_s))
    prompt.finish((FirstToken(0, 5),))


def main() -> None:
    """Runs until it is killed; the first argument names the channel."""
    torch.set_num_threads(1)
    sending = Sending(make_scheme(sys.argv[1], 10.0), timeout_s=10.0)

    def say(message: FromPrefill) -> None:
        sys.stdout.buffer.write(to_line(message))
        sys.stdout.buffer.flush()

    def closed(outcome: HandOffOutcome) -> None:
        say(Outcome(outcome.request_id, outcome.error, outcome.kv_bytes))

    sending.host.hand_off_closed = closed  # type: ignore[method-assign]
    sending.sender.deliver_to(say)
    Thread(target=_read, args=(sending,), daemon=True).start()
    while True:
        sleep(0.005)
        sending.sender.poll(0.0)


if __name__ == "__main__":
    main()
