"""When the tokens of one request arrived."""

from __future__ import annotations

from time import monotonic

from twostroke_chassis.telemetry import RouterMetrics


class Timing:
    """Measures a request from its arrival, and publishes as it goes."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._arrival_s = monotonic()
        self._latest_s: dict[int, float] = {}
        self._gaps_s = 0.0
        self._num_gaps = 0
        self.ttft_s: float | None = None
        """Arrival to the first token."""

    @property
    def itl_s(self) -> float | None:
        """Mean time between tokens of one choice."""
        return self._gaps_s / self._num_gaps if self._num_gaps else None

    def tokens(self, choice: int, before: int, after: int) -> None:
        """A choice that had `before` tokens now has `after`."""
        if after <= before:
            return
        now_s = monotonic()
        if self.ttft_s is None:
            self.ttft_s = now_s - self._arrival_s
            self._metrics.ttft_s.observe(self.ttft_s)
        if before:
            self._gap(now_s - self._latest_s[choice], before, after - before)
        self._latest_s[choice] = now_s

    def _gap(self, gap_s: float, before: int, num_tokens: int) -> None:
        self._gaps_s += gap_s
        self._num_gaps += num_tokens
        if before == 1:
            self._metrics.second_token_s.observe(gap_s)
        self._metrics.itl_s.observe(gap_s / num_tokens)

    def end(self) -> None:
        """The request is over."""
        self._metrics.e2e_s.observe(monotonic() - self._arrival_s)
