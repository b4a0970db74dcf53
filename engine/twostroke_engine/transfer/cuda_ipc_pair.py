"""Both ends of a `cuda_ipc` pair: the sender writes into granted blocks, and is fenced before they are used again.

What the two say goes over the pair's own socket, apart from the control stream: the receiver offers its pool, grants
leases and takes them back; the sender acknowledges each lease that was taken back, and says at the end that it has
unmapped the pool. Each side has a thread that hears, so an acknowledgement waits for no one's segment, and a sender
whose engine is busy still lets go.

A lease that was taken back while its writer is silent stays pinned. Three things prove that the writer has let go: its
acknowledgement, its word that the pool is unmapped, or the end of its process, of which the kernel tells. The end of
the socket is none of them: a dying process may close it before its GPU work has ended.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock, Thread

import msgspec
import torch

from twostroke_engine.transfer.channel import NOT_GRANTED, ChannelError
from twostroke_engine.transfer.cuda_ipc_driver import ExportedPool, MappedPool
from twostroke_engine.transfer.peer_process import ProcessName, ProcessWatch
from twostroke_engine.transfer.word_socket import WordSocket
from twostroke_engine.transfer.writer_fence import LeaseKey, WriterFence

log = logging.getLogger(__name__)

MAX_REMEMBERED = 4096
"""Leases that were taken back and whose late segments are still known to be that."""


class Greeting(msgspec.Struct, frozen=True, tag="greeting"):
    """The sender: who writes."""

    process: ProcessName


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """The receiver: its pool; or, in `refused`, why there is none for this sender."""

    pool: ExportedPool | None = None
    refused: str = ""


class Mapped(msgspec.Struct, frozen=True, tag="mapped"):
    """The sender: it has mapped the pool."""


class Grant(msgspec.Struct, frozen=True, tag="grant"):
    """The receiver: these blocks may be written to."""

    lease_id: str
    epoch: int
    block_ids: tuple[int, ...]


class TakeBack(msgspec.Struct, frozen=True, tag="take_back"):
    """The receiver: they may not any more; to be acknowledged."""

    lease_id: str
    epoch: int


class LetGo(msgspec.Struct, frozen=True, tag="let_go"):
    """The sender: nothing of it writes to the lease's blocks any more."""

    lease_id: str
    epoch: int


class Unmapped(msgspec.Struct, frozen=True, tag="unmapped"):
    """The sender's last word: it cannot write to any block any more."""


Word = Greeting | Offer | Mapped | Grant | TakeBack | LetGo | Unmapped
_DECODER = msgspec.msgpack.Decoder(Word)


def say(link: WordSocket, word: Word) -> None:
    """Sends a word.

    Raises:
        ChannelError: as for `WordSocket.say`.
    """
    link.say(msgspec.msgpack.encode(word))


def hear(link: WordSocket, timeout_s: float | None = None) -> Word | None:
    """The next word; None at the end of the socket, and at the first thing that is no word.

    Raises:
        ChannelError: none came in time.
    """
    data = link.hear(timeout_s)
    try:
        return None if data is None else _DECODER.decode(data)
    except msgspec.DecodeError:
        return None


class CudaIpcWriter:
    """The sender's side: a `BlockWriter`."""

    def __init__(self, pair_id: str, link: WordSocket, mapped: MappedPool, timeout_s: float) -> None:
        self.pool = mapped.pool
        self._num_blocks = mapped.pool.shape[0]
        self._link = link
        self._unmap = mapped.close
        self._timeout_s = timeout_s
        self._changed = Condition(Lock())
        self._grants: dict[LeaseKey, tuple[int, ...] | None] = {}
        """None: taken back."""
        self._is_over = False
        Thread(target=self._run, name=f"kv-ipc-writer-{pair_id}", daemon=True).start()

    @contextmanager
    def writing(self, lease_id: str, epoch: int) -> Iterator[tuple[int, ...] | None]:
        """Yields the lease's blocks, or None; a grant is not taken back before the context has been left."""
        key = (lease_id, epoch)
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or key in self._grants, self._timeout_s)
            if self._is_over:
                raise ChannelError("the pair is closed")
            if key not in self._grants:
                raise ChannelError(f"Timed out after {self._timeout_s:g} s: no grant came")
            yield self._grants[key]

    def close(self) -> None:
        """Any thread: the pair's own thread unmaps, once no one writes."""
        self._link.stop_hearing()

    def _run(self) -> None:
        try:
            while isinstance(word := hear(self._link), Grant | TakeBack):
                self._take(word)
        except ChannelError as error:
            log.info("a cuda_ipc pair ends: %s", error)
        finally:
            self._end()

    def _take(self, word: Grant | TakeBack) -> None:
        key = (word.lease_id, word.epoch)
        if isinstance(word, Grant):
            if not all(NOT_GRANTED <= block_id < self._num_blocks for block_id in word.block_ids):
                raise ChannelError("a grant of blocks that the receiver does not have")
            with self._changed:
                self._grants[key] = word.block_ids
                self._changed.notify_all()
            return
        with self._changed:  # which waits for a write under way
            self._grants.pop(key, None)
            self._grants[key] = None
            self._forget_old()
        say(self._link, LetGo(*key))

    def _forget_old(self) -> None:
        old = [key for key, blocks in self._grants.items() if blocks is None][:-MAX_REMEMBERED]
        for key in old:
            del self._grants[key]

    def _end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
            self.pool = torch.empty(0)  # no tensor outlives the mapping
            try:
                self._unmap()
            except ChannelError as error:
                # Then this process stays able to write, and says nothing: the receiver waits for its end.
                log.warning("a receiver's pool stays mapped: %s", error)
                self._link.close()
                return
        with contextlib.suppress(ChannelError):
            say(self._link, Unmapped())
        self._link.close()


class CudaIpcTarget:
    """The receiver's side: a `BlockTarget`."""

    def __init__(self, pair_id: str, link: WordSocket, watch: ProcessWatch, fenced: Callable[[str, int], None]) -> None:
        """Owns socket and watch."""
        self._pair_id = pair_id
        self._link = link
        self._watch = watch
        self._fenced = fenced
        self._lock = Lock()
        self._fence = WriterFence()
        Thread(target=self._run, name=f"kv-ipc-target-{pair_id}", daemon=True).start()

    def grant(self, lease_id: str, epoch: int, block_ids: tuple[int, ...]) -> None:
        """Tells the writer."""
        with self._lock:
            if self._fence.is_over:
                raise ChannelError("the peer has closed the pair")
            self._fence.grant((lease_id, epoch))
        say(self._link, Grant(lease_id, epoch, block_ids))

    def end(self, lease_id: str, epoch: int, *, is_acknowledged: bool) -> bool:
        """Tells the writer, in every case: it need not remember the lease."""
        with self._lock:
            has_let_go = self._fence.end((lease_id, epoch), is_acknowledged=is_acknowledged)
        with contextlib.suppress(ChannelError):  # a broken pair is fenced by what its thread hears or sees
            say(self._link, TakeBack(lease_id, epoch))
        return has_let_go

    def close(self) -> None:
        """Any thread: the writer sees it, unmaps, and says so; the thread goes on until then."""
        self._link.stop_saying()

    def _run(self) -> None:
        word: Word | None = None
        with contextlib.suppress(ChannelError):
            while isinstance(word := hear(self._link), LetGo):
                self._acknowledged((word.lease_id, word.epoch))
        if not isinstance(word, Unmapped):
            self._wait_for_death()
        self._link.close()
        self._watch.close()
        with self._lock:
            ended = self._fence.over()
        for key in ended:
            self._fenced(*key)

    def _acknowledged(self, key: LeaseKey) -> None:
        with self._lock:
            was_awaited = self._fence.acknowledged(key)
        if was_awaited:
            self._fenced(*key)

    def _wait_for_death(self) -> None:
        """What the writer was granted stays pinned for as long as this takes."""
        self._link.stop_saying()
        with self._lock:
            num_pinned = self._fence.num_ending
        log.info("pair %s: the writer has gone without a word, %d leases wait for its end", self._pair_id, num_pinned)
        self._watch.wait()
