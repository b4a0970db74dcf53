"""A GPU's payloads over a channel of hosts: through pinned memory, by a stream of the channel's own."""

from __future__ import annotations

import torch
from torch import Tensor

from twostroke_engine.transfer.channel import ChannelListener, ChannelScheme, KVChannel


class StagedChannel:
    """One side of a pair. Its staging grows to the largest message, which the plan of transfers bounds."""

    def __init__(self, inner: KVChannel, device: torch.device) -> None:
        self._inner = inner
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging = torch.empty(0, dtype=torch.uint8, pin_memory=True)
        self.close = inner.close

    def send(self, payload: Tensor) -> None:
        """Down to the host, then out."""
        staged = self._part(payload.numel())
        self._copy(staged, payload)
        self._inner.send(staged)

    def receive(self, payload: Tensor) -> None:
        """In, then up to the device."""
        staged = self._part(payload.numel())
        self._inner.receive(staged)
        self._copy(payload, staged)

    def _part(self, num_bytes: int) -> Tensor:
        if self._staging.numel() < num_bytes:
            self._staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._staging[:num_bytes]

    def _copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()


class _StagedListener:
    """Another listener, whose pairs take tensors of a device."""

    def __init__(self, inner: ChannelListener, device: torch.device) -> None:
        self._inner = inner
        self._device = device
        self.endpoint = inner.endpoint
        self.close = inner.close

    def accept(self, pair_id: str) -> KVChannel:
        return StagedChannel(self._inner.accept(pair_id), self._device)


class StagedScheme:
    """Another scheme, whose pairs take tensors of a device; the peer need not stage."""

    def __init__(self, inner: ChannelScheme, device: torch.device) -> None:
        self.name = inner.name
        self.ability = inner.ability
        self._inner = inner
        self._device = device

    def listen(self) -> ChannelListener:
        """The other scheme's listener."""
        return _StagedListener(self._inner.listen(), self._device)

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        """The other scheme's pair."""
        return StagedChannel(self._inner.connect(endpoint, pair_id), self._device)
