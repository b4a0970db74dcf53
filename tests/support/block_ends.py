"""Ends of a transfer whose sender writes to the receiver's blocks: over CUDA IPC on a card.

On a host without one a pool lies in a file without a name, which the other process maps. That driver stands in for
CUDA's alone: sockets, processes, their ends and the fence are real.
"""

from __future__ import annotations

import mmap
import os
import struct

import torch
from torch import Tensor
from twostroke_engine.kv.spec import KVSpec
from twostroke_engine.transfer.channel import ChannelError
from twostroke_engine.transfer.cuda_ipc import CudaIpcScheme
from twostroke_engine.transfer.cuda_ipc_driver import CudaDriver, ExportedPool, MappedPool, MemoryDriver

from tests.support.transfer_ends import SPEC, Receiving, Sending, make_pool

_HANDLE = struct.Struct("<II56x")


class HostDriver:
    """Pools in files; a handle is a process and a descriptor of it."""

    def __init__(self) -> None:
        self.num_mapped = 0
        self.is_broken = False
        self._files: dict[int, int] = {}

    def shared(self, content: Tensor) -> Tensor:
        """The same content in memory that can be exported."""
        num_bytes = content.numel() * content.element_size()
        descriptor = os.memfd_create("pool")
        os.ftruncate(descriptor, num_bytes)
        pool = _view(descriptor, num_bytes, content.dtype, tuple(content.shape))
        pool.copy_(content)
        self._files[pool.data_ptr()] = descriptor
        return pool

    def export(self, pool: Tensor) -> ExportedPool:
        handle, num_bytes = _HANDLE.pack(os.getpid(), self._files[pool.data_ptr()]), pool.numel() * pool.element_size()
        dtype = str(pool.dtype).removeprefix("torch.")
        return ExportedPool(handle, 0, num_bytes, tuple(pool.shape), dtype, "host")

    def map(self, exported: ExportedPool) -> MappedPool:
        if self.is_broken:
            raise ChannelError("no mapping today")
        process, file = _HANDLE.unpack(exported.handle)
        descriptor = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
        pool = _view(descriptor, exported.num_bytes, getattr(torch, exported.dtype), exported.shape)
        os.close(descriptor)
        self.num_mapped += 1
        return MappedPool(pool, self._unmap)

    def _unmap(self) -> None:
        self.num_mapped -= 1


class OneProcessDriver:
    """Pools of one process, each its own mapping."""

    def __init__(self) -> None:
        self._pools: list[Tensor] = []

    def export(self, pool: Tensor) -> ExportedPool:
        self._pools.append(pool)
        handle, num_bytes = _HANDLE.pack(0, len(self._pools) - 1), pool.numel() * pool.element_size()
        return ExportedPool(handle, 0, num_bytes, tuple(pool.shape), str(pool.dtype).removeprefix("torch."), "host")

    def map(self, exported: ExportedPool) -> MappedPool:
        return MappedPool(self._pools[_HANDLE.unpack(exported.handle)[1]], lambda: None)


def _view(descriptor: int, num_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8).view(dtype).view(shape)


def on_device(content: Tensor, device: torch.device) -> tuple[Tensor, MemoryDriver]:
    """A pool that can be exported, and by what."""
    if device.type == "cuda":
        return content.to(device), CudaDriver(device)
    driver = HostDriver()
    return driver.shared(content), driver


def make_block_sending(
    device: torch.device, num_blocks: int = 64, spec: KVSpec = SPEC, timeout_s: float = 5.0, **more: object
) -> Sending:
    pool, driver = on_device(make_pool(num_blocks, spec), device)
    scheme = CudaIpcScheme(pool, driver, timeout_s)
    return Sending(scheme, num_blocks=num_blocks, spec=spec, pool=pool, timeout_s=timeout_s, **more)


def make_block_receiving(
    device: torch.device, num_blocks: int = 64, spec: KVSpec = SPEC, timeout_s: float = 5.0, **more: object
) -> Receiving:
    pool, driver = on_device(make_pool(num_blocks, spec), device)
    scheme = CudaIpcScheme(pool, driver, timeout_s)
    return Receiving(scheme, num_blocks=num_blocks, spec=spec, pool=pool, timeout_s=timeout_s, **more)
