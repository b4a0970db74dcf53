"""A service process from its start to its end: signals, readiness, logging, and one-line errors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from twostroke_chassis.backoff import Backoff
from twostroke_chassis.logs import formatter
from twostroke_chassis.loop_clock import ServiceLoop
from twostroke_chassis.settings import ServiceSettings, split_host_port

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Libraries that tell at INFO or WARNING what this project's own lines say already.
_QUIET = {
    "asyncio": logging.WARNING,
    "etcd3aio": logging.ERROR,
    "grpc": logging.WARNING,
    "httpx": logging.WARNING,
    "opentelemetry.exporter": logging.CRITICAL,
    "uvicorn.access": logging.WARNING,
}


class FatalError(Exception):
    """Ends the process; its message is the one line its user sees."""


class StartError(FatalError):
    """The service cannot start."""


class Lifecycle:
    """What a service's main function sees of its process."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.drain = asyncio.Event()
        """Set by SIGTERM or SIGINT once the service is ready; before that a signal cancels the start."""
        self._is_ready = False
        self._failure: BaseException | None = None
        self._main: asyncio.Task[None] | None = None
        self._spawned: set[asyncio.Task[Any]] = set()

    @property
    def is_ready(self) -> bool:
        """Whether `ready` was called."""
        return self._is_ready

    def ready(self, endpoints: Mapping[str, str]) -> None:
        """The service is up: writes the ready file (see `--ready-file`), atomically.

        What it has made until now stays as long as it runs, so the garbage collector need not look at it again: a full
        collection stops every stream.
        """
        gc.collect()
        gc.freeze()
        self._is_ready = True
        _log.info("ready: %s", " ".join(f"{name}={address}" for name, address in endpoints.items()))
        if self.settings.ready_file is not None:
            content = {
                "role": self.settings.role,
                "id": self.settings.id,
                "pid": os.getpid(),
                "endpoints": dict(endpoints),
            }
            write_atomically(self.settings.ready_file, json.dumps(content) + "\n")

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Runs `work` beside main; if it fails, the service ends with that error."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._spawned.add(task)
        task.add_done_callback(self._on_spawned_done)
        return task

    async def run(self, main: Callable[[Lifecycle], Awaitable[None]]) -> None:
        """Runs `main` under this process's signals."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        self._main = loop.create_task(_as_coroutine(main(self)), name="main")
        try:
            await self._main
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            if not self.drain.is_set():
                raise

    def _on_signal(self, number: signal.Signals) -> None:
        _log.info("%s: %s", number.name, "draining" if self._is_ready else "stopping before the start was complete")
        self.drain.set()
        if not self._is_ready and self._main is not None:
            self._main.cancel()

    def _on_spawned_done(self, task: asyncio.Task[Any]) -> None:
        self._spawned.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        self._failure = task.exception()
        if self._main is not None:
            self._main.cancel()


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work


def run_service(prog: str, settings: ServiceSettings, main: Callable[[Lifecycle], Awaitable[None]]) -> int:
    """Runs a service to its end and returns its exit status: 0 after a drain, 1 after a fatal error."""
    configure_logging(settings)
    try:
        if settings.ready_file is not None:
            _remove(settings.ready_file)
        with asyncio.Runner(loop_factory=ServiceLoop) as runner:
            runner.run(_run(settings, main))
    except FatalError as error:
        return _fail(prog, str(error))
    except KeyboardInterrupt:  # before or after the time in which signals are ours
        return 0
    except Exception as error:  # noqa: BLE001 - the process's boundary: nothing above could report it
        _log.critical("unexpected error", exc_info=error)
        return _fail(prog, f"stopped by an unexpected {type(error).__name__}: {error} (traceback in the log above)")
    finally:
        if settings.ready_file is not None:
            with contextlib.suppress(StartError):
                _remove(settings.ready_file)
    return 0


async def _run(settings: ServiceSettings, main: Callable[[Lifecycle], Awaitable[None]]) -> None:
    await Lifecycle(settings).run(main)


def _fail(prog: str, message: str) -> int:
    sys.stderr.write(f"{prog}: {' '.join(message.split())}\n")
    sys.stderr.flush()
    return 1


def _remove(path: Path) -> None:
    """Removes a ready file: one that is left from an earlier process would be a lie."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StartError(f"--ready-file {path}: {error.strerror}") from None


def write_atomically(path: Path, content: str) -> None:
    """Writes a file so that a reader sees all of it or none; the folder must exist."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(content)
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise StartError(f"cannot write {path}: {error.strerror}") from None


async def wait_for(
    what: str,
    attempt: Callable[[], Awaitable[_T]],
    seconds: float,
    retry_on: tuple[type[BaseException], ...] = (OSError, TimeoutError),
) -> _T:
    """Calls `attempt` until it does not raise one of `retry_on`; `StartError` naming `what` after `seconds`."""
    backoff = Backoff()
    deadline = time.monotonic() + seconds
    told = False
    while True:
        try:
            return await attempt()
        except retry_on as error:
            left_s = deadline - time.monotonic()
            reason = " ".join(str(error).split()) or type(error).__name__
            if left_s <= 0:
                raise StartError(f"{what} did not answer within {seconds:g} s (--wait): {reason}") from None
            _log.log(logging.DEBUG if told else logging.INFO, "waiting for %s: %s", what, reason)
            told = True
            await asyncio.sleep(min(backoff.next_s(), left_s))


def listen(address: str, flag: str) -> socket.socket:
    """A bound TCP socket, or `StartError` naming the flag. The address is this process's alone."""
    host, port = split_host_port(address)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # asyncio sets TCP_NODELAY only on sockets whose protocol is named; without it an answer in two writes waits
        # 40 ms for the client's delayed acknowledgement.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        raise cannot_listen(address, flag, error) from None
    return bound


def cannot_listen(address: str, flag: str, error: OSError) -> StartError:
    """The one line for an address that cannot be bound."""
    if error.errno == errno.EADDRINUSE:
        return StartError(f"{flag} {address}: the port is in use by another process")
    return StartError(f"{flag} {address}: cannot listen: {error.strerror or error}")


def configure_logging(settings: ServiceSettings) -> None:
    """Sends this process's log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(settings.log_format, settings.role, settings.id))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
