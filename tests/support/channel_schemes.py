"""The channel schemes by name, and pairs of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from twostroke_engine.transfer.channel import ChannelListener, ChannelScheme, KVChannel
from twostroke_engine.transfer.collective import CollectiveScheme
from twostroke_engine.transfer.loopback import LoopbackScheme
from twostroke_engine.transfer.nixl import NixlScheme
from twostroke_engine.transfer.nixl_agent import package_name
from twostroke_engine.transfer.shm import ShmScheme
from twostroke_engine.transfer.tcp import TcpScheme

NETWORKED = ("collective", "tcp", "shm")
"""Channels between processes."""
needs_nixl = pytest.mark.skipif(not package_name(), reason="NIXL is not installed: it has wheels for Linux alone")


def make_scheme(name: str, timeout_s: float) -> ChannelScheme:
    match name:
        case "loopback":
            return LoopbackScheme(timeout_s)
        case "tcp":
            return TcpScheme("127.0.0.1", timeout_s)
        case "shm":
            return ShmScheme(timeout_s)
        case "nixl":
            return NixlScheme(torch.device("cpu"), "127.0.0.1", timeout_s)
    return CollectiveScheme(torch.device("cpu"), "127.0.0.1", timeout_s)


def join(scheme: ChannelScheme, listener: ChannelListener, pair_id: str) -> tuple[KVChannel, KVChannel]:
    """Both sides of a pair in this process: sender, receiver."""
    with ThreadPoolExecutor(1) as pool:
        sender = pool.submit(scheme.connect, listener.endpoint(pair_id), pair_id)
        receiver = listener.accept(pair_id)
        return sender.result(), receiver
