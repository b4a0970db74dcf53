"""Who may come in, and how long they wait for a worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from twostroke_router.directory import Directory, PromptHashes
from twostroke_router.errors import Fault, RequestError
from twostroke_router.placement import Placement, Policy, RequestShape


class Admission:
    """Bounds the number of live requests, and finds workers for those admitted."""

    def __init__(self, directory: Directory, policy: Policy, max_live: int, placement_wait_s: float) -> None:
        self._directory = directory
        self._policy = policy
        self._max_live = max_live
        self._placement_wait_s = placement_wait_s
        self.num_live = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Holds a place for one request.

        Raises:
            RequestError: there is none.
        """
        if self.num_live >= self._max_live:
            raise RequestError(
                Fault.OVERLOADED, f"{self.num_live} requests are running, which is all this router takes"
            )
        self.num_live += 1
        try:
            yield
        finally:
            self.num_live -= 1

    async def place(self, shape: RequestShape, prompt: PromptHashes) -> Placement:
        """Workers for a request; waits for fitting ones to appear.

        Raises:
            RequestError: none appeared in time.
        """
        give_up = monotonic() + self._placement_wait_s
        while True:
            placement = self._policy(shape, self._directory.view(prompt))
            if placement is not None:
                self._directory.placed()
                return placement
            try:
                await self._directory.wait_change(give_up - monotonic())
            except TimeoutError:
                raise RequestError(Fault.UNAVAILABLE, "no worker can take this request now") from None
