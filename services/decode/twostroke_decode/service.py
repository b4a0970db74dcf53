"""A decode worker: an engine that receives KV, and the Transfer service for the prefill workers that send it."""

from __future__ import annotations

import sys
from typing import ClassVar

from twostroke_chassis.lifecycle import Lifecycle, run_service
from twostroke_worker.service import Composition, run_worker
from twostroke_worker.settings import WorkerSettings
from twostroke_worker.transfer_relay import ReceiverRelay

PROG = "twostroke-decode"
COMPOSITION = Composition(relay=ReceiverRelay, receives_kv=True, services=("twostroke.v1.Transfer",))


class DecodeSettings(WorkerSettings):
    """A worker of the decode pool."""

    role: ClassVar[str] = "decode"


def main() -> int:
    """Runs the process; returns its exit status."""
    settings = DecodeSettings.load(sys.argv[1:], PROG)

    async def work(lifecycle: Lifecycle) -> None:
        await run_worker(lifecycle, settings, COMPOSITION)

    return run_service(PROG, settings, work)
