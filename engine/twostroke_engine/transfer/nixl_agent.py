"""`NixlAgent`: this process's agent of NIXL, which writes into other processes' memory over UCX.

One agent serves every pair of a process: making one takes half a second. NIXL's own progress thread would keep a core
busy all day, so there is none: whoever waits for something calls `progress`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from threading import Lock
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from twostroke_engine.transfer.channel import ChannelError

_BACKEND = "UCX"
_TAG_BYTES = 8


def package_name() -> str:
    """The NIXL that is installed: the one for this torch's CUDA if there is one, else any; empty if there is none."""
    major = (torch.version.cuda or "12").partition(".")[0]
    names = (f"nixl_cu{major}", "nixl_cu12", "nixl_cu13")
    is_linux = platform.system() == "Linux"
    return next((name for name in names if is_linux and importlib.util.find_spec(name) is not None), "")


def release() -> str:
    """Version of the installed NIXL as far as two agents must agree on it, such as `1.5`."""
    return ".".join(version(package_name()).split(".")[:2])


class NixlAgent:
    """Registers memory, knows peers, writes to theirs. Any thread may call; calls do not wait for one another long."""

    def __init__(self, device: torch.device) -> None:
        """For memory of one device.

        Raises:
            ChannelError: NIXL is not installed, or cannot be used on this system.
        """
        self._failures: tuple[type[Exception], ...] = (OSError, RuntimeError)
        api = self._load()
        self.memory_type = "VRAM" if device.type == "cuda" else "DRAM"
        self._device_index = device.index or 0
        self._lock = Lock()
        self._peers: dict[str, int] = {}
        self._arrived: dict[bytes, list[bytes]] = {}
        with self._calls("no agent"):
            config = api.nixl_agent_config(
                enable_prog_thread=False, backends=[_BACKEND], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
            )
            self._agent: Any = api.nixl_agent(f"twostroke-{uuid4().hex}", config)
        if _BACKEND not in self._agent.backends:
            raise ChannelError(f"NIXL has no {_BACKEND} here")

    # ---- memory --------------------------------------------------------------------------------------------------

    def register(self, memory: Tensor) -> Any:
        """Makes memory known to the fabric; the result is for `describe` and `forget`."""
        with self._calls("memory cannot be registered"):
            return self._agent.register_memory(memory, backends=[_BACKEND])

    def describe(self, registered: Any) -> bytes:
        """What a peer must be told to write to this memory: it and no other."""
        with self._calls("memory cannot be described"):
            return bytes(self._agent.get_partial_agent_metadata(registered, True, [_BACKEND]))

    def forget(self, registered: Any) -> None:
        """The memory is no peer's any more."""
        with self._calls("memory cannot be given back"):
            self._agent.deregister_memory(registered, backends=[_BACKEND])

    # ---- peers ---------------------------------------------------------------------------------------------------

    def join(self, described: bytes) -> str:
        """Takes in a peer's description, and begins to connect; the peer's name. To be left as often as joined."""
        with self._calls("the peer's description is not one"), self._lock:
            name = self._agent.add_remote_agent(described)
            name = name.decode() if isinstance(name, bytes) else str(name)
            self._peers[name] = self._peers.get(name, 0) + 1
        try:
            with self._calls("the peer cannot be reached"), self._lock:
                self._agent.make_connection(name, [_BACKEND])
        except ChannelError:
            self.leave(name)
            raise
        return name

    def leave(self, name: str) -> None:
        """The peer is of no use any more, unless another pair has joined it."""
        with self._calls("the peer cannot be left"), self._lock:
            self._peers[name] -= 1
            if not self._peers[name]:
                del self._peers[name]
                self._agent.remove_remote_agent(name)

    # ---- writes --------------------------------------------------------------------------------------------------

    def write(self, peer: str, source: Tensor, address: int, device_index: int, notice: bytes) -> Any:
        """Begins to write memory to a peer's; the notice follows the bytes. The result is for `is_done` and `drop`."""
        size = source.numel()
        with self._calls("a write cannot begin"):
            ours = self._agent.get_xfer_descs([(source.data_ptr(), size, self._device_index)], self.memory_type)
            theirs = self._agent.get_xfer_descs([(address, size, device_index)], self.memory_type)
            handle = self._agent.initialize_xfer("WRITE", ours, theirs, peer, notice, [_BACKEND])
            if self._agent.transfer(handle) == "ERR":
                raise ChannelError("a write failed")
            return handle

    def is_done(self, handle: Any) -> bool:
        """Whether a write has ended.

        Raises:
            ChannelError: it has failed.
        """
        with self._calls("a write failed"):
            state = self._agent.check_xfer_state(handle)
        if state == "ERR":
            raise ChannelError("a write failed")
        return bool(state == "DONE")

    def drop(self, handle: Any) -> bool:
        """Releases a write, cancelling what has not ended; False if it may still be under way."""
        try:
            handle.release()
        except self._failures:
            return False
        return True

    # ---- notices -------------------------------------------------------------------------------------------------

    def expect(self, tag: bytes) -> None:
        """Keeps notices that begin with this tag, for `heard`."""
        with self._lock:
            self._arrived[tag] = []

    def ignore(self, tag: bytes) -> None:
        """Notices with this tag are no one's."""
        with self._lock:
            self._arrived.pop(tag, None)

    def heard(self, tag: bytes) -> list[bytes]:
        """What has come under a tag since the last look, less the tag itself."""
        with self._lock:
            found = self._arrived.get(tag, [])
            if found:
                self._arrived[tag] = []
            return found

    def progress(self) -> None:
        """Lets UCX work for a moment, and sorts the notices that came."""
        with self._calls("the fabric failed"), self._lock:
            for notices in self._agent.get_new_notifs([_BACKEND]).values():
                for notice in notices:
                    found = self._arrived.get(notice[:_TAG_BYTES])
                    if found is not None:
                        found.append(notice[_TAG_BYTES:])

    def _load(self) -> Any:
        name = package_name()
        if not name:
            raise ChannelError("NIXL is not installed (the extra twostroke[rdma])")
        shows_errors = logging.raiseExceptions
        with self._calls("it cannot be loaded", ImportError):
            api = importlib.import_module(name)
            bindings = importlib.import_module(f"{name}._bindings")
        logging.raiseExceptions = shows_errors  # the package sets it, and a handler of its own that writes to stdout
        log = logging.getLogger("nixl")
        log.handlers.clear()
        log.propagate = True
        log.setLevel(logging.WARNING)
        found = [kind for kind in vars(bindings).values() if isinstance(kind, type) and issubclass(kind, Exception)]
        self._failures = (*self._failures, *found)
        return api

    @contextmanager
    def _calls(self, what: str, *more: type[Exception]) -> Iterator[None]:
        try:
            yield
        except (*self._failures, *more) as error:
            raise ChannelError(f"NIXL: {what}: {str(error) or type(error).__name__}") from error
