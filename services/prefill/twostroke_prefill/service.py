"""A prefill worker: an engine that sends KV, and streams to the decode workers it sends to."""

from __future__ import annotations

import sys
from typing import ClassVar

from twostroke_chassis.lifecycle import Lifecycle, run_service
from twostroke_worker.service import Composition, run_worker
from twostroke_worker.settings import WorkerSettings
from twostroke_worker.transfer_relay import SenderRelay

PROG = "twostroke-prefill"
COMPOSITION = Composition(relay=SenderRelay, sends_kv=True)


class PrefillSettings(WorkerSettings):
    """A worker of the prefill pool."""

    role: ClassVar[str] = "prefill"


def main() -> int:
    """Runs the process; returns its exit status."""
    settings = PrefillSettings.load(sys.argv[1:], PROG)

    async def work(lifecycle: Lifecycle) -> None:
        await run_worker(lifecycle, settings, COMPOSITION)

    return run_service(PROG, settings, work)
