"""`Capturer`: CUDA graphs that share one memory, for replays that follow one another on one stream."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Capturer:
    """Captures what a function launches. The largest first: later graphs then fit into the memory of earlier ones.

    What a captured function allocates is good until the next replay of any of the graphs.
    """

    def __init__(self) -> None:
        # Once for all captures: torch's own context manager does this for each of them, which takes longer than a
        # capture.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._memory = torch.cuda.graph_pool_handle()

    def warm(self, run: Callable[[], None]) -> None:
        """Runs outside of a capture: kernels are compiled and libraries set up, which a capture does not allow."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """The replay of what `run` launches."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._memory, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        return graph.replay
