"""The process of `prefill_process` from its parent's side: what it is told, and what it said."""

from __future__ import annotations

import os
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import msgspec
from twostroke_engine.messages import PeerMessage

from tests.support.prefill_process import FromPrefill, RunPrompt, to_line

_ROOT = Path(__file__).parents[2]


class PrefillProcess:
    """The other process, and what it said. `arguments` are those of `prefill_process`: a channel, and a device."""

    def __init__(self, *arguments: str) -> None:
        self.said: SimpleQueue[FromPrefill] = SimpleQueue()
        paths = [_ROOT, _ROOT / "engine", _ROOT / "kernels"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.prefill_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        )
        Thread(target=self._read, daemon=True).start()

    def tell(self, message: PeerMessage | RunPrompt) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(to_line(message))
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # killed

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        decoder: msgspec.msgpack.Decoder[FromPrefill] = msgspec.msgpack.Decoder(FromPrefill)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.put(decoder.decode(b64decode(line)))
