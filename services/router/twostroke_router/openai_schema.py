"""The bodies of OpenAI requests. Anything that is not known here and could change the answer is refused by name."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from twostroke_engine.request import SamplingParams

from twostroke_router.errors import Fault, RequestError, invalid
from twostroke_router.sampling_check import MAX_LOGPROBS, check_stops

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions."""

_PATH = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """`response_format`; only text so far."""

    type: str
    json_schema: msgspec.Raw | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of a conversation. The fields below `name` are accepted when null, as clients send answers back."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Any] | None = None
    refusal: str | None = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None


class Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints take: OpenAI's fields, and the extra ones that vLLM made usual."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    response_format: ResponseFormat | None = None
    # extra
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    # ignored: they cannot change the answer here
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    parallel_tool_calls: Any = None

    def choices(self) -> int:
        """How many choices per prompt."""
        return 1 if self.n is None else self.n

    def stops(self) -> tuple[str, ...]:
        """Stop strings, checked."""
        return check_stops([self.stop] if isinstance(self.stop, str) else self.stop or [])

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_common(self) -> None:
        """Refuses what is known but not offered.

        Raises:
            RequestError: names the field.
        """
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "is only allowed with stream")
        if self.response_format is not None and self.response_format.type != "text":
            raise invalid("response_format", f"type {self.response_format.type!r} is not supported, only 'text'")


class ChatRequest(Common, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    # known, not offered
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    web_search_options: Any = None

    def wanted_tokens(self) -> tuple[str, int | None]:
        """The limit on new tokens, and the name of the field that says so."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    def wanted_logprobs(self) -> int | None:
        """Alternatives to report per token, None for no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Refuses what is known but not offered, and combinations without meaning.

        Raises:
            RequestError: names the field.
        """
        self.check_common()
        for name in ("tools", "functions", "function_call", "audio", "prediction", "reasoning_effort"):
            if getattr(self, name) not in (None, []):
                raise invalid(name, "is not supported")
        if self.tool_choice not in (None, "none"):
            raise invalid("tool_choice", "is not supported")
        if self.web_search_options is not None:
            raise invalid("web_search_options", "is not supported")
        if self.modalities not in (None, ["text"]):
            raise invalid("modalities", "only ['text'] is supported")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise invalid("top_logprobs", f"must be between 0 and {MAX_LOGPROBS}, not {self.top_logprobs}")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "needs logprobs to be true")

    def conversation(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them, each content one string.

        Raises:
            RequestError: names the message and field that cannot be accepted.
        """
        if not self.messages:
            raise invalid("messages", "must not be empty")
        return [_turn(message, f"messages[{place}]") for place, message in enumerate(self.messages)]


class CompletionRequest(Common, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def wanted_tokens(self) -> tuple[str, int | None]:
        """The limit on new tokens, and the name of the field that says so."""
        return "max_tokens", COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def wanted_logprobs(self) -> int | None:
        """Alternatives to report per token, None for no logprobs at all."""
        return self.logprobs

    def check(self) -> None:
        """Refuses what is known but not offered.

        Raises:
            RequestError: names the field.
        """
        self.check_common()
        if self.echo:
            raise invalid("echo", "is not supported")
        if self.suffix:
            raise invalid("suffix", "is not supported")
        if self.best_of is not None and self.best_of != self.choices():
            raise invalid("best_of", "is not supported unless it equals n")

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids.

        Raises:
            RequestError: the list is empty or mixed.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise invalid("prompt", "must not be empty")
        kinds = {type(item) for item in self.prompt}
        if len(kinds) > 1:
            raise invalid("prompt", "must be a string, token ids, or a list of one of these")
        if kinds == {int}:
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /detokenize."""

    tokens: list[int]
    model: str | None = None


def turns(messages: list[Message]) -> list[dict[str, str]]:
    """Messages as a chat template takes them; for /tokenize.

    Raises:
        RequestError: names the message and field that cannot be accepted.
    """
    return ChatRequest(model="", messages=messages).conversation()


def _turn(message: Message, param: str) -> dict[str, str]:
    if message.role not in ROLES:
        raise invalid(f"{param}.role", f"{message.role!r} is not one of {', '.join(sorted(ROLES))}")
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name):
            raise invalid(f"{param}.{name}", "is not supported")
    turn = {"role": message.role, "content": _content(message, f"{param}.content")}
    return turn if message.name is None else turn | {"name": message.name}


def _content(message: Message, param: str) -> str:
    if message.content is None:
        raise invalid(param, "is required")
    if isinstance(message.content, str):
        return message.content
    return "\n".join(_part(part, f"{param}[{place}]") for place, part in enumerate(message.content))


def _part(part: dict[str, Any], param: str) -> str:
    if part.get("type") != "text":
        raise invalid(f"{param}.type", f"{part.get('type')!r} is not supported, only 'text'")
    if not isinstance(part.get("text"), str):
        raise invalid(f"{param}.text", "must be a string")
    return str(part["text"])


def sampling_of(body: Common, logprobs: int | None, max_tokens: int, seed: int) -> SamplingParams:
    """The engine's parameters of a body; ranges are checked elsewhere.

    Raises:
        RequestError: a key of `logit_bias` is not a token id.
    """
    given = {
        name: getattr(body, name)
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "min_tokens",
            "ignore_eos",
        )
        if getattr(body, name) is not None
    }
    if given.get("top_k") == -1:
        given["top_k"] = 0
    return SamplingParams(
        **given,
        logit_bias=_logit_bias(body.logit_bias or {}),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        max_tokens=max_tokens,
        seed=seed,
    )


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdigit()):
            raise invalid("logit_bias", f"{key!r} is not a token id")
    return tuple((int(key), value) for key, value in bias.items())


Body = TypeVar("Body", bound=msgspec.Struct)


def decode_body(raw: bytes, kind: type[Body]) -> Body:
    """Parses a body.

    Raises:
        RequestError: malformed JSON, invalid UTF-8, an unknown or missing field, or a wrong type, by name.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from error
    except UnicodeDecodeError as error:
        raise RequestError(Fault.INVALID, "the body is not valid UTF-8") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(Fault.INVALID, f"the body is not valid JSON: {error}") from error


def _named(message: str) -> RequestError:
    path_match = _PATH.search(message)
    # A key of a mapping is written as [...].
    path = path_match.group(1).removesuffix("[...]") if path_match else ""
    reason = _PATH.sub("", message)
    if unknown := _UNKNOWN.search(reason):
        return invalid(_join(path, unknown.group(1)), "unknown parameter")
    if missing := _MISSING.search(reason):
        return invalid(_join(path, missing.group(1)), "is required")
    return invalid(path, reason) if path else RequestError(Fault.INVALID, f"the body is not valid: {reason}")


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field
