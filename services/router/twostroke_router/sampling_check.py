"""The ranges of sampling parameters: checked once, at the router's door, for HTTP and gRPC alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from twostroke_engine.request import SamplingParams

from twostroke_router.errors import invalid

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_STOP_IDS = 1024

Check = tuple[str, Callable[[float], bool], str]

_RANGES: tuple[Check, ...] = (
    ("temperature", lambda x: 0 <= x <= 2, "must be between 0 and 2"),
    ("top_k", lambda x: 0 <= x < 2**31, "must be -1, 0 (keep every token) or positive"),
    ("top_p", lambda x: 0 < x <= 1, "must be above 0 and at most 1"),
    ("min_p", lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
    ("repetition_penalty", lambda x: 0 < x <= 1e6, "must be above 0"),
    ("presence_penalty", lambda x: -2 <= x <= 2, "must be between -2 and 2"),
    ("frequency_penalty", lambda x: -2 <= x <= 2, "must be between -2 and 2"),
    ("seed", lambda x: 0 <= x < 2**64, "must fit in 64 bits"),
)


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Checks everything but `max_tokens`, whose limit depends on the prompt.

    Raises:
        RequestError: names the first field that is out of range.
    """
    for name, is_good, rule in _RANGES:
        value = getattr(sampling, name)
        if not math.isfinite(value) or not is_good(value):
            raise invalid(name, f"{rule}, not {value}")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
        raise invalid("logprobs", f"at most {MAX_LOGPROBS}, not {sampling.logprobs}")
    _check_ids(sampling, vocab_size)


def _check_ids(sampling: SamplingParams, vocab_size: int) -> None:
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        raise invalid("logit_bias", f"at most {MAX_LOGIT_BIAS} tokens")
    for token_id, bias in sampling.logit_bias:
        _check_id("logit_bias", token_id, vocab_size)
        if not -100 <= bias <= 100:
            raise invalid("logit_bias", f"a bias must be between -100 and 100, not {bias}")
    if len(sampling.stop_token_ids) > MAX_STOP_IDS:
        raise invalid("stop_token_ids", f"at most {MAX_STOP_IDS} ids")
    for token_id in sampling.stop_token_ids:
        _check_id("stop_token_ids", token_id, vocab_size)


def _check_id(param: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise invalid(param, f"token id {token_id} is not in the vocabulary (0 to {vocab_size - 1})")


def check_prompt_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """A prompt given as token ids.

    Raises:
        RequestError: it is empty, or an id is not in the vocabulary.
    """
    if not token_ids:
        raise invalid(param, "must not be empty")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        bad = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        _check_id(param, bad, vocab_size)
    return tuple(token_ids)


def check_choices(n: int) -> int:
    """The number of choices.

    Raises:
        RequestError: out of range.
    """
    if not 1 <= n <= MAX_CHOICES:
        raise invalid("n", f"must be between 1 and {MAX_CHOICES}, not {n}")
    return n


def check_priority(priority: int) -> int:
    """A priority fits in 32 bits.

    Raises:
        RequestError: it does not.
    """
    if not -(2**31) <= priority < 2**31:
        raise invalid("priority", "must fit in 32 bits")
    return priority


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Stop strings, without repetitions.

    Raises:
        RequestError: too many, too long or empty.
    """
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"at most {MAX_STOPS} strings")
    if any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise invalid("stop", f"a stop string must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(stops))
