"""`Outgoing`: control messages on their way to peers, in the order in which they were made, from any thread."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from twostroke_engine.messages import PeerMessage
from twostroke_engine.transfer.messages import ReceiverMessage, SenderMessage


class Outgoing:
    """Gathers messages for `take`, or hands each to a `deliver` that was set."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = Lock()
        self._messages: list[PeerMessage] = []
        self._deliver: Callable[[PeerMessage], None] = self._gather

    def say(self, peer: str, message: SenderMessage | ReceiverMessage) -> None:
        """Any thread. The lock spans the delivery: two threads' messages must not overtake each other on the way."""
        with self._lock:
            self._deliver(PeerMessage(peer=peer, message=message))

    def take(self) -> list[PeerMessage]:
        """Empties the gathered messages."""
        with self._lock:
            taken, self._messages = self._messages, []
        return taken

    def deliver_to(self, deliver: Callable[[PeerMessage], None]) -> None:
        """Hands over what was gathered, and from now on each message as it is made."""
        with self._lock:
            for message in self._messages:
                deliver(message)
            self._messages = []
            self._deliver = deliver

    def _gather(self, message: PeerMessage) -> None:
        self._messages.append(message)
        self._wake()
