"""KV channels between two processes of this machine: GB/s by segment size, host memory to host memory.

    python -m benchmarks.channels                       # shm, nixl if it is installed, collective (gloo) and tcp
    python -m benchmarks.channels shm tcp --kib 1024
    python -m benchmarks.channels --tiny                # any machine, in seconds

Segments lie in more memory than caches hold, as KV does. Channels take turns within each repeat, so that whatever else
the machine does meets all of them; a value is the median, and tcp of the same run stands beside the others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from twostroke_engine.transfer.channel import BlockListener, BlockWriter, ChannelFactory, KVChannel
from twostroke_engine.transfer.schemes import channel_factory, possible_names, scheme_names

from benchmarks.record import ROOT, Measurement, append

RESULTS = ROOT / "benchmarks" / "results" / "channels.jsonl"
SIZES_KIB = (64, 128, 256, 1024, 8192, 32768)
TIMEOUT_S = 30.0
PEER = "tcp"


@dataclass(frozen=True)
class Volume:
    """How much memory segments lie in, and how much is moved in one repeat."""

    pool_bytes: int
    moved_bytes: int

    def segments(self, num_bytes: int) -> list[Tensor]:
        """Memory of its own for each segment, touched."""
        count = max(2, self.pool_bytes // num_bytes)
        return [torch.full((num_bytes,), number % 251, dtype=torch.uint8) for number in range(count)]

    def turns(self, num_bytes: int) -> int:
        """Segments of one repeat."""
        return max(4, self.moved_bytes // num_bytes)


VOLUME = Volume(pool_bytes=128 << 20, moved_bytes=1 << 30)
TINY_VOLUME = Volume(pool_bytes=1 << 20, moved_bytes=4 << 20)


class Sender:
    """The other process: it sends what it is told to send."""

    def __init__(self, name: str, volume: Volume) -> None:
        flags = [name, "--sender", "--volume", str(volume.pool_bytes), str(volume.moved_bytes)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.channels", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.name = name
        ours = factory(name)
        self._listeners = ours.listen()
        listener = self._listeners.choose(ours.abilities)
        assert not isinstance(listener, BlockListener), "a host has none"
        self.tell(listener.endpoint("pair"))
        self.channel: KVChannel = listener.accept("pair")

    def tell(self, word: object) -> None:
        """One line."""
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)

    def wait(self) -> None:
        """Until it is about to send."""
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"the sender of {self.name} has ended")

    def end(self) -> None:
        """Closes the pair, then the process ends."""
        self.channel.close()
        self._listeners.close()
        self._process.communicate()


def factory(name: str) -> ChannelFactory:
    """One scheme on this host."""
    return channel_factory(torch.device("cpu"), "127.0.0.1", TIMEOUT_S, [name])


def send(name: str, volume: Volume) -> None:
    """The sender's process: an endpoint, then a segment size for each repeat, a line each."""
    channel = factory(name).connect(sys.stdin.readline().strip(), "pair")
    assert not isinstance(channel, BlockWriter), "a host has none"
    for line in sys.stdin:
        num_bytes = int(line)
        segments = volume.segments(num_bytes)
        print("ready", flush=True)
        for turn in range(1 + volume.turns(num_bytes)):
            channel.send(segments[turn % len(segments)])


def receive(sender: Sender, num_bytes: int, volume: Volume) -> float:
    """One repeat, in GB/s; the first segment does not count.

    Raises:
        RuntimeError: what came is not what was sent.
    """
    segments = volume.segments(num_bytes)
    sender.tell(num_bytes)
    sender.wait()
    turns = volume.turns(num_bytes)
    sender.channel.receive(segments[0])
    begun_s = time.perf_counter()
    for turn in range(1, 1 + turns):
        sender.channel.receive(segments[turn % len(segments)])
    took_s = time.perf_counter() - begun_s
    last = turns % len(segments)
    if not bool((segments[last] == last % 251).all()):
        raise RuntimeError(f"{sender.name} did not bring what was sent")
    return turns * num_bytes / took_s / 1e9


def measure(senders: Sequence[Sender], num_bytes: int, volume: Volume, repeat: int) -> list[Measurement]:
    """Every channel at one segment size."""
    rates: dict[str, list[float]] = {sender.name: [] for sender in senders}
    for _ in range(repeat):
        for sender in senders:
            rates[sender.name].append(receive(sender, num_bytes, volume))
    values = {name: round(median(found), 3) for name, found in rates.items()}
    return [
        Measurement(
            f"channel/{name}/{num_bytes >> 10}KiB",
            value,
            "GB/s",
            peer=PEER if PEER in values and name != PEER else None,
            peer_value=values.get(PEER) if name != PEER else None,
        )
        for name, value in values.items()
    ]


def run(arguments: argparse.Namespace, volume: Volume) -> None:
    """Each size, printed and appended as it comes."""
    torch.set_num_threads(1)
    senders = [Sender(name, volume) for name in scheme_names("cpu", arguments.channels or possible_names("cpu"))]
    try:
        for kib in arguments.kib:
            for measurement in measure(senders, kib << 10, volume, arguments.repeat):
                ratio = f"  {measurement.value / measurement.peer_value:.2f} x tcp" if measurement.peer_value else ""
                print(f"{measurement.case:32} {measurement.value:8.3f} GB/s{ratio}", flush=True)
                append(measurement, arguments.results, "cpu")
    finally:
        for sender in senders:
            sender.end()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.channels", description=__doc__.split("\n")[0])
    parser.add_argument("channels", nargs="*", metavar="NAME", help="shm, nixl, collective, tcp (default: all)")
    parser.add_argument("--kib", type=int, nargs="+", default=SIZES_KIB, help="segment sizes")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="little memory, one small size, two repeats")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to")
    parser.add_argument("--sender", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--volume", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.kib, arguments.repeat = (64,), 2
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen channels."""
    arguments = parse(argv)
    if arguments.sender:
        torch.set_num_threads(1)
        send(arguments.channels[0], Volume(*arguments.volume))
    else:
        run(arguments, TINY_VOLUME if arguments.tiny else VOLUME)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
