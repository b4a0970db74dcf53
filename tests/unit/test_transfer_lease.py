from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twostroke_engine.transfer.lease import KVLease, LeaseError, LeaseState

EVENTS = ("bind", "begin_write", "end_write", "begin_read", "end_read", "complete", "hand_over", "abort")
BLOCKS = (3, 1, 4)


class Watched:
    """A lease, and what its events said about the blocks."""

    def __init__(self) -> None:
        self.lease = KVLease("lease", 1)
        self.freed: list[tuple[int, ...]] = []
        self.handed_over = False

    def do(self, event: str, epoch: int = 1) -> None:
        lease = self.lease
        match event:
            case "bind":
                lease.bind(BLOCKS)
            case "begin_write":
                lease.begin_write(epoch)
            case "hand_over":
                assert lease.hand_over() == BLOCKS
                self.handed_over = True
            case "complete" | "begin_read":
                getattr(lease, event)()
            case _:
                self._note(getattr(lease, event)())

    def _note(self, freed: tuple[int, ...]) -> None:
        if freed:
            assert self.lease.readers == 0
            assert self.lease.writers == 0
            assert self.lease.state is LeaseState.CLOSED
            self.freed.append(freed)

    def wind_up(self) -> None:
        """What happens in the end, whatever happened before."""
        self.do("abort")
        while self.lease.writers:
            self.do("end_write")
        while self.lease.readers:
            self.do("end_read")


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from([1, 1, 1, 2])), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_order_of_events_frees_once_and_only_without_readers_and_writers(events: list[tuple[str, int]]) -> None:
    watched = Watched()
    was_bound = False
    for event, epoch in events:
        writers, state = watched.lease.writers, watched.lease.state
        try:
            watched.do(event, epoch)
        except LeaseError:
            assert (watched.lease.writers, watched.lease.state) == (writers, state), "a refused event changes nothing"
        was_bound |= watched.lease.state is LeaseState.FILLING
        assert not (watched.lease.writers and watched.lease.state in (LeaseState.READY, LeaseState.CLOSED))
    watched.wind_up()
    assert watched.lease.state is LeaseState.CLOSED
    assert watched.lease.readers == watched.lease.writers == 0
    assert len(watched.freed) + watched.handed_over == was_bound, "each bound block ends in exactly one way"


def test_abort_waits_for_the_writer() -> None:
    watched = Watched()
    for event in ("bind", "begin_write", "abort"):
        watched.do(event)
    assert watched.lease.state is LeaseState.ABORTING
    assert watched.freed == []
    watched.do("end_write")
    assert watched.freed == [BLOCKS]


def test_a_writer_of_another_epoch_never_begins() -> None:
    watched = Watched()
    watched.do("bind")
    assert not watched.lease.may_write(2)
    with pytest.raises(LeaseError, match="epoch 2"):
        watched.do("begin_write", 2)


@pytest.mark.parametrize("event", ["begin_write", "complete", "hand_over", "end_write", "end_read", "begin_read"])
def test_what_a_reservation_cannot_do(event: str) -> None:
    with pytest.raises(LeaseError):
        Watched().do(event)


def test_complete_needs_the_writers_end() -> None:
    watched = Watched()
    for event in ("bind", "begin_write"):
        watched.do(event)
    with pytest.raises(LeaseError, match="writer is active"):
        watched.do("complete")
