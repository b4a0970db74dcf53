"""`cuda_ipc://NAME/TOKEN`: the sender's GPU writes straight into granted blocks of the receiver's pool.

For two GPU workers of one host: the receiver lets the sender map its pool, and the push kernel copies, converts and
digests in one pass. Two workers can do that if they run under one kernel, in one network namespace (the socket's name
is an abstract one) and in one PID namespace (so that the kernel can tell the receiver when the sender has ended), which
two pods do not by default; and if the sender can reach the receiver's GPU. All of it is in the ability.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import torch
from torch import Tensor
from twostroke_kernels.choice import runs_triton

from twostroke_engine.transfer.channel import BlockTarget, BlockWriter, ChannelError, ChannelUnusable
from twostroke_engine.transfer.cuda_ipc_driver import (
    CudaDriver,
    ExportedPool,
    MappedPool,
    MemoryDriver,
    check_exported,
    reachable_devices,
)
from twostroke_engine.transfer.cuda_ipc_pair import (
    CudaIpcTarget,
    CudaIpcWriter,
    Greeting,
    Mapped,
    Offer,
    hear,
    say,
)
from twostroke_engine.transfer.peer_process import own_process, watch
from twostroke_engine.transfer.rendezvous import Rendezvous, greeting, listen_by_name
from twostroke_engine.transfer.shm import place
from twostroke_engine.transfer.word_socket import WordSocket


class CudaIpcListener:
    """The receiver's name."""

    def __init__(self, exported: ExportedPool, timeout_s: float) -> None:
        self._exported = exported
        self._timeout_s = timeout_s
        self._name, listening = listen_by_name("twostroke-ipc")
        self._rendezvous = Rendezvous(listening, timeout_s)
        self.close = self._rendezvous.close

    def endpoint(self, pair_id: str) -> str:
        """Name and token of the pair."""
        return f"cuda_ipc://{self._name}/{self._rendezvous.token(pair_id)}"

    def accept_writer(self, pair_id: str, fenced: Callable[[str, int], None]) -> BlockTarget:
        """Meets the sender, offers it the pool once its end can be watched, and waits until it has mapped it."""
        link = WordSocket(self._rendezvous.accept(pair_id).detach(), self._timeout_s)
        try:
            first = hear(link, self._timeout_s)
            found = watch(first.process) if isinstance(first, Greeting) else None
            if found is None:
                say(link, Offer(refused="its process cannot be watched from here"))
                raise ChannelError("the sender's process cannot be watched from here")
            say(link, Offer(self._exported))
            if not isinstance(hear(link, self._timeout_s), Mapped):
                found.close()
                raise ChannelError("the sender could not map the pool")
        except ChannelError as error:
            link.close()
            raise ChannelError(f"no pair: {error}") from error
        return CudaIpcTarget(pair_id, link, found, fenced)


class CudaIpcScheme:
    """Two GPU workers of one host."""

    name = "cuda_ipc"

    def __init__(self, pool: Tensor, driver: MemoryDriver, timeout_s: float) -> None:
        """For a KV pool that stays where it is until the process ends.

        Raises:
            ChannelError: the pool cannot be shared, or this process not be watched.
        """
        self._pool = pool
        self._driver = driver
        self._timeout_s = timeout_s
        self._exported = driver.export(pool)
        self.ability = _ability(self._exported.device)

    def listen(self) -> CudaIpcListener:
        """Listens at a new name."""
        return CudaIpcListener(self._exported, self._timeout_s)

    def connect(self, endpoint: str, pair_id: str) -> BlockWriter:
        """Connects, and maps the receiver's pool."""
        name, _, token = endpoint.removeprefix("cuda_ipc://").partition("/")
        hello = greeting(pair_id, token)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._timeout_s)
        try:
            connection.connect(f"\0{name}")
            connection.sendall(hello)
        except OSError as error:
            connection.close()
            raise ChannelError(f"no pair at {name}: {error.strerror or error}") from error
        link = WordSocket(connection, self._timeout_s)
        try:
            mapped = self._map(link)
        except ChannelError:
            link.close()
            raise
        writer = CudaIpcWriter(pair_id, link, mapped, self._timeout_s)
        try:
            say(link, Mapped())
        except ChannelError:
            writer.close()
            raise
        return writer

    def _map(self, link: WordSocket) -> MappedPool:
        say(link, Greeting(own_process()))
        offer = hear(link, self._timeout_s)
        if not isinstance(offer, Offer):
            raise ChannelError("the receiver has closed the pair")
        if offer.pool is None:
            raise ChannelUnusable(f"the receiver refuses: {offer.refused}")
        check_exported(offer.pool, self._pool)
        try:
            return self._driver.map(offer.pool)
        except ChannelError as error:
            raise ChannelUnusable(str(error)) from error


def cuda_ipc_scheme(pool: Tensor, timeout_s: float) -> CudaIpcScheme:
    """The scheme of a pool on a GPU.

    Raises:
        ChannelError: as for `CudaIpcScheme`.
    """
    return CudaIpcScheme(pool, CudaDriver(pool.device), timeout_s)


def reachable_abilities(device: torch.device) -> tuple[str, ...]:
    """Abilities of receivers on this host's other GPUs that a sender on this one can write to: by our own kernels, as
    PyTorch's operations keep to one device."""
    return tuple(_ability(uuid) for uuid in reachable_devices(device)) if runs_triton(device) else ()


def _ability(uuid: str) -> str:
    where, process = place(), own_process()
    if not (where and process.place):
        raise ChannelError("this system has no abstract sockets, or no /proc")
    return f"cuda_ipc:{where}.{process.pid_namespace}.{uuid}"
