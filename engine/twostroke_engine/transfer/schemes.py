"""Which channels an engine has: what its device and system can do, best first, and what of it the user wants."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twostroke_engine.model.config import ModelError
from twostroke_engine.transfer.channel import ChannelFactory, ChannelScheme
from twostroke_engine.transfer.collective import CollectiveScheme
from twostroke_engine.transfer.host_staging import StagedScheme
from twostroke_engine.transfer.shm import ShmScheme, place
from twostroke_engine.transfer.tcp import TcpScheme

_ORDER = {
    "cpu": ("shm", "collective", "tcp"),
    # GPUs reach each other without a host's memory between them, on one host too.
    "cuda": ("collective", "shm", "tcp"),
}


def scheme_names(device_type: str, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The names that were asked for; if none were, those of every scheme that works here, best first.

    Raises:
        ModelError: a name that is unknown or does not work here, or one that comes twice.
    """
    possible = [name for name in _ORDER.get(device_type, _ORDER["cpu"]) if name != "shm" or place()]
    if unknown := [name for name in names if name not in possible]:
        raise ModelError(f"no KV channel {', '.join(unknown)} here; there are {', '.join(possible)}")
    if len(set(names)) < len(names):
        raise ModelError(f"a KV channel is named twice: {', '.join(names)}")
    return tuple(names or possible)


def channel_factory(device: torch.device, host: str, timeout_s: float, names: Sequence[str] = ()) -> ChannelFactory:
    """Schemes for a KV pool on this device.

    Args:
        device: where the pool is.
        host: address at which to listen, reachable by the peers.
        timeout_s: longest operation of a channel.
        names: as for `scheme_names`.
    """
    return ChannelFactory([_scheme(name, device, host, timeout_s) for name in scheme_names(device.type, names)])


def _scheme(name: str, device: torch.device, host: str, timeout_s: float) -> ChannelScheme:
    if name == "collective":
        return CollectiveScheme(device, host, timeout_s)
    scheme = ShmScheme(timeout_s) if name == "shm" else TcpScheme(host, timeout_s)
    return StagedScheme(scheme, device) if device.type == "cuda" else scheme
