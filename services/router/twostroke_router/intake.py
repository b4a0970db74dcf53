"""The router's door: what a client asked for becomes a `Job`, or a clear error. HTTP and gRPC share it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import msgspec
from twostroke_engine.request import Request, SamplingParams

from twostroke_router.arrival import Arrival
from twostroke_router.errors import Fault, RequestError, invalid
from twostroke_router.sampling_check import check_choices, check_priority, check_sampling

MAX_CACHE_SALT_CHARS = 256
MAX_REQUEST_ID_CHARS = 128


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks, and how long they wait. One per call, shared by its prompts."""

    request_id: str
    tenant: str = ""
    arrival: Arrival = field(default_factory=lambda: Arrival.of({}))
    endpoint: str = "generate"
    """For metrics: chat, completions or generate."""
    deadline_s: float | None = None
    """Time the client gives; the router's own limit may be shorter."""
    wants_whole: bool = False
    """The answer is not streamed: nothing of it is shown before its end, so until then it can be begun anew."""
    wants_facts: bool = False
    """The answer will explain itself, so it is worth waiting for what the workers measured."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt with everything that was asked for, not yet checked."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    """Its `max_tokens` is not used; see below."""
    max_tokens: int | None
    """None: what the context allows."""
    prompt_param: str = "prompt"
    tokens_param: str = "max_tokens"
    n: int = 1
    stops: tuple[str, ...] = ()
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True)
class Job:
    """A checked request with what stays in the router."""

    request: Request
    caller: Caller
    stops: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Limits:
    """What the model and the workers allow."""

    vocab_size: int
    max_model_len: int | None
    """None while no worker is known and the model's configuration does not say."""


def draw_id() -> str:
    """A request id."""
    return secrets.token_hex(12)


def draw_seed() -> int:
    """A seed for a request without one."""
    return secrets.randbits(64)


def seed_of(seed: int | None) -> int:
    """A client's seed as 64 unsigned bits; negative ones wrap.

    Raises:
        RequestError: it does not fit.
    """
    if seed is None:
        return draw_seed()
    if not -(2**63) <= seed < 2**64:
        raise invalid("seed", "must fit in 64 bits")
    return seed % 2**64


def clean_request_id(given: str | None) -> str:
    """A client's request id if it can be written in a header and a log, else a drawn one."""
    if given and len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable():
        return given
    return draw_id()


def take_in(ask: Ask, caller: Caller, limits: Limits) -> Job:
    """Checks one prompt and makes its request.

    Raises:
        RequestError: names the first field that is wrong.
    """
    check_choices(ask.n)
    check_priority(ask.priority)
    check_sampling(ask.sampling, limits.vocab_size)
    max_tokens = _fit(ask, limits.max_model_len)
    if not 0 <= ask.sampling.min_tokens <= max_tokens:
        raise invalid("min_tokens", f"must be between 0 and {ask.tokens_param} ({max_tokens})")
    if len(ask.cache_salt) > MAX_CACHE_SALT_CHARS:
        raise invalid("cache_salt", f"at most {MAX_CACHE_SALT_CHARS} characters")
    request = Request(
        # Clients may repeat an id; on the workers it must be unique.
        id=f"{caller.request_id}-{secrets.token_hex(4)}",
        token_ids=ask.token_ids,
        sampling=msgspec.structs.replace(ask.sampling, max_tokens=max_tokens),
        n=ask.n,
        priority=ask.priority,
        tenant=caller.tenant,
        cache_salt=ask.cache_salt.encode(),
        traceparent=caller.arrival.traceparent,
    )
    return Job(request, caller, ask.stops)


def _fit(ask: Ask, max_model_len: int | None) -> int:
    """The number of tokens to generate at most."""
    if not ask.token_ids:
        raise invalid(ask.prompt_param, "must not be empty")
    if ask.max_tokens is not None and ask.max_tokens < 1:
        raise invalid(ask.tokens_param, f"must be at least 1, not {ask.max_tokens}")
    if max_model_len is None:
        if ask.max_tokens is None:
            raise RequestError(Fault.UNAVAILABLE, "no worker has joined yet, so the context length is not known")
        return ask.max_tokens
    room = max_model_len - len(ask.token_ids)
    wanted = room if ask.max_tokens is None else ask.max_tokens
    if room < 1:
        raise _too_long(ask, max_model_len, ask.prompt_param)
    if wanted > room:
        raise _too_long(ask, max_model_len, ask.tokens_param)
    return wanted


def _too_long(ask: Ask, max_model_len: int, param: str) -> RequestError:
    output = "" if ask.max_tokens is None else f" and {ask.max_tokens} of output"
    message = (
        f"{param}: the model's context length is {max_model_len} tokens, "
        f"but {len(ask.token_ids)} tokens of prompt{output} were asked for"
    )
    return RequestError(Fault.CONTEXT, message, param)
