"""Proof that a process has ended: the only thing beside its own word that frees memory which it could still write to.

A process is named by the boot of its kernel, its PID namespace, its number and its start, which no later process
repeats. The kernel itself says when it has ended (a pidfd, or /proc); by then its files are closed and with them its
mappings.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

import msgspec

_LOOK_S = 0.05


class ProcessName(msgspec.Struct, frozen=True, array_like=True):
    """A process of some host."""

    boot: str
    """Boot id of the kernel; empty where there is none to read."""
    pid_namespace: int
    pid: int
    started: int
    """Clock ticks from the boot to its start."""

    @property
    def place(self) -> str:
        """Equal for two processes if, and only if, each can watch the other; empty if neither ever can."""
        return f"{self.boot}.{self.pid_namespace}" if self.boot else ""


def own_process() -> ProcessName:
    """This process; without a boot id where the system has no /proc to look others up in."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        return ProcessName(boot, namespace, os.getpid(), _stat(os.getpid())[1])
    except OSError:
        return ProcessName("", 0, os.getpid(), 0)


class ProcessWatch:
    """Knows whether one process lives."""

    def __init__(self, name: ProcessName, descriptor: int) -> None:
        """Owns the pidfd; -1 where the system gives none, and /proc is looked at again and again."""
        self._name = name
        self._descriptor = descriptor
        self._is_dead = False

    def is_dead(self) -> bool:
        """Whether it has ended; True for ever after."""
        if not self._is_dead:
            self._is_dead = not _lives(self._name) if self._descriptor < 0 else self._has_ended(0)
        return self._is_dead

    def wait(self) -> None:
        """Until it has ended."""
        while not self.is_dead():
            if self._descriptor < 0:
                time.sleep(_LOOK_S)
            else:
                self._has_ended(None)

    def close(self) -> None:
        """No more questions; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _has_ended(self, timeout_ms: int | None) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(timeout_ms))


def watch(name: ProcessName) -> ProcessWatch | None:
    """Watches a process of this host and PID namespace; None for any other, of which nothing can be known."""
    if not name.boot or name.place != own_process().place:
        return None
    try:
        descriptor = os.pidfd_open(name.pid)
    except (OSError, AttributeError):  # ended, or a system that has no pidfds: /proc knows
        return ProcessWatch(name, -1)
    if _lives(name):
        return ProcessWatch(name, descriptor)
    os.close(descriptor)  # a later process may have its number
    return ProcessWatch(name, -1)


def _lives(name: ProcessName) -> bool:
    try:
        state, started = _stat(name.pid)
        # Its first thread may have ended, and others go on.
        is_over = state in "ZX" and len(os.listdir(f"/proc/{name.pid}/task")) < 2
    except OSError:
        return False
    return started == name.started and not is_over


def _stat(pid: int) -> tuple[str, int]:
    """State and start of a process."""
    after_name = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return after_name[0], int(after_name[19])
