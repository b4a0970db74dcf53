"""When the things happened that a request's latencies and waterfalls are made of."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

from twostroke_chassis.telemetry import RouterMetrics
from twostroke_engine.request import RequestFacts

from twostroke_router.arrival import Arrival
from twostroke_router.events import Stages, Update
from twostroke_router.waterfall import SecondParts, TtftParts, Waterfall, second_token_waterfall, ttft_waterfall


@dataclass(frozen=True, slots=True)
class _Taken:
    """A token that opens or closes a waterfall: when it was taken in, and what its message said."""

    at_s: float
    read_s: float
    unseen_s: float
    sent_s: float
    stages: Stages | None

    @property
    def reading_s(self) -> float:
        return max(0.0, self.at_s - self.read_s)


class Timing:
    """Measures a request from its arrival, and publishes as it goes. Stamps are of this host's monotonic clock."""

    def __init__(self, metrics: RouterMetrics, arrival: Arrival) -> None:
        self._metrics = metrics
        self.arrived_s = arrival.at_s
        self.admitted_s: float | None = None
        self.placed_s: float | None = None
        """When the placement was made that was tried last."""
        self.granted_s: float | None = None
        """When decode's promise came; None where none is asked for."""
        self.ended_s: float | None = None
        self.ttft_s: float | None = None
        """Arrival to the first token."""
        self.second_token_s: float | None = None
        """First token of a choice to its second, of the first choice to have one; None if they came together."""
        self._link_s = 0.0
        self._decode_link_s = 0.0
        self._first: _Taken | None = None
        self._second: _Taken | None = None
        self._latest_s: dict[int, float] = {}
        self._gaps_s = 0.0
        self._num_gaps = 0

    @property
    def itl_s(self) -> float | None:
        """Mean time between tokens of one choice."""
        return self._gaps_s / self._num_gaps if self._num_gaps else None

    @property
    def first_token_s(self) -> float | None:
        """When the first token was taken in."""
        return self._first.at_s if self._first else None

    @property
    def e2e_s(self) -> float | None:
        """Arrival to the end."""
        return None if self.ended_s is None else self.ended_s - self.arrived_s

    # ---- as it goes --------------------------------------------------------------------------------------------------

    def admitted(self) -> None:
        """The request has its place."""
        self.admitted_s = monotonic()

    def placed(self) -> None:
        """Workers were chosen, perhaps not for the first time: what was measured of an earlier try is void."""
        self.placed_s = monotonic()
        self.granted_s, self._link_s, self._decode_link_s = None, 0.0, 0.0

    def granted(self) -> None:
        """Decode has promised capacity."""
        self.granted_s = monotonic()

    def receipt(self, update: Update) -> None:
        """A worker has the request: what it did not hold of the time since then went by on the way there and back."""
        if update.held_s is None or update.sent_s is None:
            return
        link_s = max(0.0, update.read_s - update.sent_s - update.held_s)
        if update.reserved is None:
            self._link_s = link_s
        else:
            self._decode_link_s = link_s

    def tokens(self, choice: int, before: int, after: int, update: Update) -> None:
        """A choice that had `before` tokens now has `after`."""
        if after <= before:
            return
        now_s = monotonic()
        if self._first is None:
            self._first = _taken(now_s, update)
            self.ttft_s = now_s - self.arrived_s
            self._metrics.ttft_s.observe(self.ttft_s)
        if before:
            self._gap(now_s - self._latest_s[choice], before, after - before)
            if self._second is None and before == 1:
                self.second_token_s = now_s - self._latest_s[choice]
                self._second = _taken(now_s, update)
        self._latest_s[choice] = now_s

    def _gap(self, gap_s: float, before: int, num_tokens: int) -> None:
        self._gaps_s += gap_s
        self._num_gaps += num_tokens
        if before == 1:
            self._metrics.second_token_s.observe(gap_s)
        self._metrics.itl_s.observe(gap_s / num_tokens)

    def end(self) -> None:
        """The request is over."""
        self.ended_s = monotonic()
        self._metrics.e2e_s.observe(self.ended_s - self.arrived_s)

    # ---- afterwards --------------------------------------------------------------------------------------------------

    def ttft_waterfall(self) -> Waterfall | None:
        """Where the time before the first token went; None if there was none."""
        first, admitted_s, placed_s = self._first, self.admitted_s, self.placed_s
        if first is None or self.ttft_s is None or admitted_s is None or placed_s is None:
            return None
        stages = first.stages
        ready_s = placed_s if self.granted_s is None else self.granted_s
        parts = TtftParts(
            admission_s=admitted_s - self.arrived_s,
            placement_s=placed_s - admitted_s,
            reserve_s=None if self.granted_s is None else self.granted_s - placed_s,
            sending_s=max(0.0, first.sent_s - ready_s),
            link_s=self._link_s,
            queue_s=stages.queue_s if stages else None,
            compute_s=stages.compute_s if stages else None,
            leaving_s=stages.leaving_s if stages else 0.0,
            reading_s=first.reading_s,
            unseen_s=first.unseen_s,
        )
        return ttft_waterfall(self.ttft_s, parts)

    def second_token_waterfall(self, sender: RequestFacts | None) -> Waterfall | None:
        """Where the time between the first two tokens went; `sender` are the facts of the prefill worker that handed
        over, None if the request was not handed over."""
        first, second = self._first, self._second
        if first is None or second is None or self.second_token_s is None:
            return None
        stages = second.stages
        if stages is None:
            return second_token_waterfall(self.second_token_s, SecondParts())
        parts = SecondParts(
            hand_off_s=None if sender is None else _hand_off_s(sender, stages.ready_s),
            returning_s=first.reading_s + (first.stages.leaving_s if first.stages else 0.0),
            admission_s=None if sender is None else stages.queue_s,
            step_s=stages.compute_s,
            leaving_s=stages.leaving_s,
            reading_s=second.reading_s,
            slack_s=second.unseen_s + self._decode_link_s / 2,
        )
        return second_token_waterfall(self.second_token_s, parts)


def _taken(now_s: float, update: Update) -> _Taken:
    return _Taken(now_s, update.read_s, update.unseen_s, update.sent_s or 0.0, update.stages)


def _hand_off_s(sender: RequestFacts, ready_s: float) -> float:
    """First token to the last of the KV. The commit's way is half of what its round trip took without decode's part."""
    return sender.commit_wait_s + max(0.0, sender.commit_ack_s - ready_s) / 2 + ready_s
