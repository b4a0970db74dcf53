"""Stop strings in pieces of text against a search through all of it, and choices that use them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from twostroke_engine.request import FinishReason, TokenOut
from twostroke_router.choice import Choice
from twostroke_router.detokenize import Detokenizer
from twostroke_router.stop_strings import StopScanner, StopStrings

SETTINGS = settings(max_examples=300, deadline=None)
FEW_LETTERS = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def brute_force(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string to be complete; of two complete at once, the longer."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def longest_partial(text: str, stops: list[str]) -> int:
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )


@SETTINGS
@given(st.lists(FEW_LETTERS, max_size=8), STOPS)
def test_pieces_give_what_a_search_through_the_whole_text_gives(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(StopStrings(stops))
    shown = ""
    for piece in pieces:
        shown += scanner.add(piece)
        if scanner.stopped:
            break
    expected, is_stopped = brute_force("".join(pieces), stops)
    assert scanner.stopped == is_stopped
    assert shown + scanner.flush() == expected


@SETTINGS
@given(FEW_LETTERS, STOPS)
def test_only_a_partial_match_is_held_back(text: str, stops: list[str]) -> None:
    scanner = StopScanner(StopStrings(stops))
    shown = scanner.add(text)
    if not scanner.stopped:
        assert len(text) - len(shown) == longest_partial(text, stops)


def letters(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def make_choice(stops: list[str], min_tokens: int = 0) -> Choice:
    return Choice(0, Detokenizer(letters), StopScanner(StopStrings(stops)) if stops else None, min_tokens)


def tokens(text: str) -> tuple[TokenOut, ...]:
    return tuple(TokenOut(ord(char)) for char in text)


@SETTINGS
@given(FEW_LETTERS.filter(bool), STOPS, st.randoms(use_true_random=False))
def test_tokens_in_any_order_and_twice_give_one_text(text: str, stops: list[str], random: Random) -> None:
    cuts = sorted({0, len(text), *(random.randrange(len(text)) for _ in range(4))})
    deltas = [
        (start, tokens(text[start:end]), FinishReason.LENGTH if end == len(text) else None)
        for start, end in itertools.pairwise(cuts)
    ]
    deltas += random.sample(deltas, k=min(2, len(deltas)))
    random.shuffle(deltas)
    choice = make_choice(stops)
    pieces = [piece for delta in deltas if (piece := choice.add(*delta))]
    expected, is_stopped = brute_force(text, stops)
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish is choice.finish is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
    assert sum(len(piece.tokens) for piece in pieces) == choice.num_tokens


def test_tokens_after_a_stop_string_are_not_billed() -> None:
    choice = make_choice(["END"])
    piece = choice.add(0, tokens("abENDcdef"), FinishReason.LENGTH)
    assert piece is not None
    assert (piece.text, piece.finish, choice.num_tokens) == ("ab", FinishReason.STOP, 5)
    assert choice.add(9, tokens("more"), None) is None


def test_the_token_that_stopped_the_engine_is_billed_but_not_shown() -> None:
    choice = make_choice([])
    piece = choice.add(0, tokens("abZ"), FinishReason.STOP)
    assert piece is not None
    assert (piece.text, choice.num_tokens) == ("ab", 3)


def test_held_text_is_shown_when_no_stop_string_came_of_it() -> None:
    choice = make_choice(["END"])
    first = choice.add(0, tokens("abEN"), None)
    assert first is not None
    assert first.text == "ab"
    last = choice.add(4, tokens("x"), FinishReason.LENGTH)
    assert last is not None
    assert last.text == "ENx"


def test_stop_strings_wait_for_min_tokens() -> None:
    choice = make_choice(["a"], min_tokens=3)
    piece = choice.add(0, tokens("aaaba"), FinishReason.LENGTH)
    assert piece is not None
    assert (piece.text, piece.finish) == ("aaab", FinishReason.STOP)
