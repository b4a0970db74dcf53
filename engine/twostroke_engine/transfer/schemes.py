"""Which channels an engine has: what its device and system can do, best first, and what of it the user wants."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twostroke_engine.model.config import ModelError
from twostroke_engine.transfer.channel import BlockScheme, ChannelError, ChannelFactory, ChannelScheme
from twostroke_engine.transfer.collective import CollectiveScheme
from twostroke_engine.transfer.cuda_ipc import cuda_ipc_scheme, reachable_abilities
from twostroke_engine.transfer.host_staging import StagedScheme
from twostroke_engine.transfer.nixl import NixlScheme
from twostroke_engine.transfer.nixl_agent import package_name
from twostroke_engine.transfer.shm import ShmScheme, place
from twostroke_engine.transfer.tcp import TcpScheme

log = logging.getLogger(__name__)

_ORDER = {
    "cpu": ("shm", "nixl", "collective", "tcp"),
    # GPUs reach each other without a host's memory between them, on one host too.
    "cuda": ("cuda_ipc", "collective", "nixl", "shm", "tcp"),
}
_FABRIC = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class _Here:
    """What schemes are made of."""

    device: torch.device
    host: str
    timeout_s: float
    pool: Tensor | None

    def scheme(self, name: str) -> ChannelScheme | BlockScheme:
        """One scheme.

        Raises:
            ChannelError: it does not work here.
        """
        match name:
            case "cuda_ipc":
                if self.pool is None:
                    raise ChannelError("there is no KV pool to share")
                return cuda_ipc_scheme(self.pool, self.timeout_s)
            case "nixl":
                return NixlScheme(self.device, self.host, self.timeout_s)
            case "collective":
                return CollectiveScheme(self.device, self.host, self.timeout_s)
        scheme = ShmScheme(self.timeout_s) if name == "shm" else TcpScheme(self.host, self.timeout_s)
        return StagedScheme(scheme, self.device) if self.device.type == "cuda" else scheme


def possible_names(device_type: str) -> tuple[str, ...]:
    """Every scheme that this system has the parts for, best first."""
    has_parts = {"shm": bool(place()), "nixl": bool(package_name())}
    return tuple(name for name in _ORDER.get(device_type, _ORDER["cpu"]) if has_parts.get(name, True))


def scheme_names(device_type: str, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The names that were asked for; if none were, those that are worth it here, best first: of NIXL it is known only
    that it pays on a fabric with RDMA.

    Raises:
        ModelError: a name that is unknown or does not work here, or one that comes twice.
    """
    possible = possible_names(device_type)
    if unknown := [name for name in names if name not in possible]:
        raise ModelError(f"no KV channel {', '.join(unknown)} here; there are {', '.join(possible)}")
    if len(set(names)) < len(names):
        raise ModelError(f"a KV channel is named twice: {', '.join(names)}")
    return tuple(names or [name for name in possible if name != "nixl" or has_fabric()])


def has_fabric() -> bool:
    """Whether this host has an adapter for InfiniBand or RoCE."""
    return _FABRIC.is_dir() and any(_FABRIC.iterdir())


def channel_factory(
    device: torch.device, host: str, timeout_s: float, names: Sequence[str] = (), pool: Tensor | None = None
) -> ChannelFactory:
    """Schemes for a KV pool on this device.

    Args:
        device: where the pool is.
        host: address at which to listen, reachable by the peers.
        timeout_s: longest operation of a channel.
        names: as for `scheme_names`.
        pool: the pool itself, which peers with `cuda_ipc` write to.

    Raises:
        ModelError: a scheme that was asked for does not work here.
    """
    here, schemes = _Here(device, host, timeout_s, pool), []
    reachable: tuple[str, ...] = ()
    for name in scheme_names(device.type, names):
        try:
            schemes.append(here.scheme(name))
            reachable += reachable_abilities(device) if name == "cuda_ipc" else ()
        except ChannelError as error:
            if name in names:
                raise ModelError(f"KV channel {name}: {error}") from error
            log.warning("KV channel %s is left out: %s", name, error)
    return ChannelFactory(schemes, reachable)
