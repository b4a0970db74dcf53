"""The CUDA driver's way to let another process of this host map a KV pool, by ctypes: torch has none that is public."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from twostroke_engine.kv.spec import DTYPE_BYTES
from twostroke_engine.transfer.channel import ChannelError

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class ExportedPool(msgspec.Struct, frozen=True, array_like=True):
    """How another process finds a pool."""

    handle: bytes
    """Of the allocation that the pool lies in."""
    offset: int
    """Of the pool in it, bytes."""
    allocation_bytes: int
    shape: tuple[int, ...]
    dtype: str
    """Name of a torch dtype, a key of `DTYPE_BYTES`."""
    device: str
    """UUID of the GPU that it is on."""

    @property
    def num_bytes(self) -> int:
        """The pool's size; 0 if it is none."""
        return prod(self.shape) * DTYPE_BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class MappedPool:
    """Another process's pool, as long as it is not closed."""

    pool: Tensor
    close: Callable[[], None]
    """Unmaps it: no kernel may use it any more, nor any tensor."""


class MemoryDriver(Protocol):
    """What a device's driver can do."""

    def export(self, pool: Tensor) -> ExportedPool:
        """Makes a pool known to other processes.

        Raises:
            ChannelError: this memory cannot be shared.
        """
        ...

    def map(self, exported: ExportedPool) -> MappedPool:
        """Maps another process's pool.

        Raises:
            ChannelError: it cannot be mapped here.
        """
        ...


class CudaDriver:
    """libcuda, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device(device.type, device.index or 0)

    def export(self, pool: Tensor) -> ExportedPool:
        """A handle of the allocation in which torch put the pool."""
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        address = ctypes.c_uint64(pool.data_ptr())
        with self._context():
            _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
            _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return ExportedPool(
            handle=bytes(handle.content),
            offset=address.value - base.value,
            allocation_bytes=size.value,
            shape=tuple(pool.shape),
            dtype=str(pool.dtype).removeprefix("torch."),
            device=device_uuid(self._device.index),
        )

    def map(self, exported: ExportedPool) -> MappedPool:
        """Opens the allocation; a view of the pool in it, on the device that it is on."""
        devices = {device_uuid(index): index for index in range(torch.cuda.device_count())}
        if exported.device not in devices:
            raise ChannelError(f"GPU {exported.device} is not visible here")
        base, handle = ctypes.c_uint64(), _Handle()
        ctypes.memmove(handle.content, exported.handle, _HANDLE_BYTES)
        with self._context():
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(base), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
        address = base.value + exported.offset
        memory = torch.as_tensor(
            _Bytes(address, exported.num_bytes), device=torch.device("cuda", devices[exported.device])
        )
        if memory.data_ptr() != address:
            self._unmap(base.value)
            raise ChannelError("torch does not take mapped memory over as it is")
        pool = memory.view(getattr(torch, exported.dtype)).view(exported.shape)
        return MappedPool(pool, lambda: self._unmap(base.value))

    def _unmap(self, base: int) -> None:
        with self._context():
            _call("cuIpcCloseMemHandle", ctypes.c_uint64(base))

    @contextmanager
    def _context(self) -> Iterator[None]:
        """The device's context, in a thread that may never have called the driver."""
        with torch.cuda.device(self._device):
            torch.cuda.mem_get_info(self._device)  # choosing the device that is chosen already makes no context
            yield


def device_uuid(index: int) -> str:
    """Names a GPU wherever it is seen from."""
    return str(torch.cuda.get_device_properties(index).uuid)


def reachable_devices(device: torch.device) -> tuple[str, ...]:
    """UUIDs of the other visible GPUs whose memory kernels of this one can write to."""
    own = device.index or 0
    others = [index for index in range(torch.cuda.device_count()) if index != own]
    return tuple(device_uuid(index) for index in others if torch.cuda.can_device_access_peer(own, index))


def check_exported(exported: ExportedPool, own: Tensor) -> None:
    """A look at what a receiver says of its pool, before anything is written there.

    Raises:
        ChannelError: it is no pool like this side's.
    """
    theirs, ours = exported.shape, tuple(own.shape)
    is_alike = len(theirs) == len(ours) and theirs[1:3] == ours[1:3] and theirs[4:] == ours[4:]
    if not is_alike or not all(size > 0 for size in theirs) or exported.dtype not in DTYPE_BYTES:
        raise ChannelError(f"the receiver's pool {theirs} {exported.dtype} does not fit {ours}")
    end = exported.offset + exported.num_bytes
    if len(exported.handle) != _HANDLE_BYTES or exported.offset < 0 or end > exported.allocation_bytes:
        raise ChannelError("the receiver's pool does not lie in the memory that it shares")


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = [("content", ctypes.c_ubyte * _HANDLE_BYTES)]


class _Bytes:
    """Device memory, as torch takes it over without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


@cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ChannelError("there is no CUDA driver") from error


def _call(function: str, *arguments: Any) -> None:
    status = getattr(_library(), function)(*arguments)
    if status:
        name = ctypes.c_char_p()
        _library().cuGetErrorName(status, ctypes.byref(name))
        raise ChannelError(f"{function}: {(name.value or b'unknown error').decode()}")
