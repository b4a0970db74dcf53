"""`collective://HOST:PORT`: a two-rank torch.distributed group per pair, gloo on a host and NCCL on GPUs.

Groups are built directly, without `init_process_group`, so a process may be in any number of them and lose any of them.
The receiver hosts one `TCPStore`; PrefixStore(pair_id) keeps pairs apart. The sender is rank 0, the receiver rank 1.
Building a group blocks until both sides came, so pair threads do it. gloo reports a dead peer within milliseconds; a
silent one by the operation's time-out. Either breaks this pair only.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore, Work
from torch.distributed import ProcessGroupGloo

from twostroke_engine.transfer.channel import ChannelError, KVChannel

SENDER_RANK, RECEIVER_RANK = 0, 1

_NCCL_ENVIRONMENT = {
    # Without it a wait returns at launch, and what follows hangs on the GPU when the peer dies.
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    # An error or time-out cleans the communicator up and is raised to the pair's thread; the default ends the process.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    # The monitor ends the process if its watchdog is slow; our own time-outs watch the pair.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


class _Group(Protocol):
    """What a pair needs of a process group."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...


class CollectiveChannel:
    """One rank of a pair."""

    def __init__(self, group: _Group, rank: int, timeout: timedelta) -> None:
        self._group: _Group | None = group
        self._peer_rank = 1 - rank
        self._timeout = timeout

    def send(self, payload: Tensor) -> None:
        """One message, one operation."""
        group = self._alive()
        self._finish(lambda: group.send([payload], self._peer_rank, 0))

    def receive(self, payload: Tensor) -> None:
        """The peer has announced that it sends."""
        group = self._alive()
        self._finish(lambda: group.recv([payload], self._peer_rank, 0))

    def close(self) -> None:
        """Dropping the last reference closes the sockets, which the peer sees at once."""
        self._group = None

    def _alive(self) -> _Group:
        group = self._group
        if group is None:
            raise ChannelError("the pair is closed")
        return group

    def _finish(self, operation: Callable[[], Work]) -> None:
        try:
            operation().wait(self._timeout)
        except RuntimeError as error:  # torch raises subclasses for its back ends, and plain ones for gloo
            self.close()
            raise ChannelError(first_line(error)) from error


class GlooChannel(CollectiveChannel):
    """One rank of a pair on hosts: each message goes behind its length. Gloo takes a shorter message for a whole one,
    and ends the process at a longer one, from a thread of its own."""

    def __init__(self, group: _Group, rank: int, timeout: timedelta) -> None:
        super().__init__(group, rank, timeout)
        self._length = torch.zeros(1, dtype=torch.int64)

    def send(self, payload: Tensor) -> None:
        """Two operations."""
        self._length[0] = payload.numel()
        super().send(self._length)
        super().send(payload)

    def receive(self, payload: Tensor) -> None:
        """After any other length nothing that follows could be trusted."""
        super().receive(self._length)
        if (length := int(self._length)) != payload.numel():
            self.close()
            raise ChannelError(f"{payload.numel()} bytes were announced, {length} came")
        super().receive(payload)


class CollectiveListener:
    """The store at which this process's senders meet it."""

    def __init__(self, scheme: CollectiveScheme, host: str, timeout: timedelta) -> None:
        self._scheme = scheme
        # Bound here because TCPStore by itself listens on every interface.
        listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listening.getsockname()[1]
        self._store: TCPStore | None = TCPStore(
            host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        self._endpoint = f"collective://{host}:{port}"

    def endpoint(self, pair_id: str) -> str:
        """The store's address; pairs are kept apart by their ids."""
        return self._endpoint

    def accept(self, pair_id: str) -> KVChannel:
        """Meets a sender through an own connection: one client of a store serialises its threads."""
        return self._scheme.join(self._endpoint, pair_id, RECEIVER_RANK)

    def close(self) -> None:
        """Stops the store."""
        self._store = None


class CollectiveScheme:
    """Builds groups for one device."""

    name = "collective"

    def __init__(self, device: torch.device, host: str, timeout_s: float) -> None:
        self._device = device
        self._host = host
        self._timeout = timedelta(seconds=timeout_s)
        is_cuda = device.type == "cuda"
        self._build = self._nccl_group if is_cuda else self._gloo_group
        self._channel = CollectiveChannel if is_cuda else GlooChannel
        self.ability = "collective:nccl" if is_cuda else "collective:gloo"

    def listen(self) -> CollectiveListener:
        """Hosts a store."""
        return CollectiveListener(self, self._host, self._timeout)

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        """Meets the receiver at its store."""
        return self.join(endpoint, pair_id, SENDER_RANK)

    def join(self, endpoint: str, pair_id: str, rank: int) -> KVChannel:
        """Builds this side of the pair.

        Raises:
            ChannelError: the other side did not come, or the group could not be built.
        """
        host, port = _host_and_port(endpoint)
        try:
            client = TCPStore(host, port, None, False, self._timeout, wait_for_workers=False)
            store = PrefixStore(pair_id, client)
            # A group's own rendezvous takes several time-outs where the other side is missing; this one takes one.
            store.set(f"here{rank}", "")
            store.wait([f"here{1 - rank}"], self._timeout)
            group = self._build(store, rank)
        except RuntimeError as error:
            raise ChannelError(f"no pair at {endpoint}: {first_line(error)}") from error
        channel = self._channel(group, rank, self._timeout)
        self._greet(channel, rank)
        return channel

    def _gloo_group(self, store: Store, rank: int) -> _Group:
        # torch's stubs lag behind: they know neither these options nor the constructor that takes them.
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._host)]
        options._timeout = self._timeout
        options._threads = 1
        group: _Group = gloo(store, rank, 2, options)
        return group

    def _nccl_group(self, store: Store, rank: int) -> _Group:
        for name, value in _NCCL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(self._device)
        # Imported here because a CPU build of torch has none.
        nccl: Any = importlib.import_module("torch.distributed").ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timedelta(days=1)  # the watchdog's; operations have their own
        group: _Group = nccl(store, rank, 2, options)
        return group

    def _greet(self, channel: KVChannel, rank: int) -> None:
        """One byte, because NCCL builds its communicator in the first operation: here, outside the device's turns."""
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        channel.send(byte) if rank == SENDER_RANK else channel.receive(byte)


def first_line(error: Exception) -> str:
    """An error's first line, cut to what fits in a message to a peer."""
    return str(error).split("\n", 1)[0][:200] or type(error).__name__


def _host_and_port(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("collective://").rpartition(":")
    if not host or not port.isdigit():
        raise ChannelError(f"not a collective endpoint: {endpoint!r}")
    return host, int(port)
