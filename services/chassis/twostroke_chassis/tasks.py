"""Background tasks of a service: a failure is told at once, and an end is an end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

_log = logging.getLogger(__name__)


def start_task(work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """Runs `work` in the background; should it fail, the log has the traceback at once, not when it is collected."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(_tell_failure)
    return task


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancels a task and returns when it has ended, however it did."""
    while not task.done():
        # Again and again: under Python 3.11 `asyncio.wait_for`, which redis-py calls, may swallow a cancellation.
        task.cancel()
        await asyncio.wait([task], timeout=0.2)


def _tell_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s failed", task.get_name(), exc_info=error)
