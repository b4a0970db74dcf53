"""The answers of the HTTP API as schemas, for the OpenAPI document; tests hold real answers against them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from twostroke_router.explanation import Explanation

Seconds = Annotated[float | None, Meta(description="Seconds; null where there is nothing to measure.")]
Finish = Annotated[
    Literal["stop", "length"] | None, Meta(description="Why the choice ended; null while it goes on, in a stream.")
]


class ErrorObject(Struct, forbid_unknown_fields=True):
    """What went wrong, in OpenAI's form."""

    message: Annotated[str, Meta(description="For people; begins with the field's name where one is at fault.")]
    type: str
    param: Annotated[str | None, Meta(description="The field at fault.")]
    code: str | None


class ErrorBody(Struct, forbid_unknown_fields=True):
    """The body of every answer that is no success."""

    error: ErrorObject


class PromptTokensDetails(Struct, forbid_unknown_fields=True):
    """More about the prompt's tokens."""

    cached_tokens: Annotated[int, Meta(description="Found in the prefix cache.")]


class UsageBody(Struct, forbid_unknown_fields=True):
    """Tokens billed, summed over the prompts of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Facts(Struct):
    """Where a request ran, asked for with the header `x-twostroke-explain: 1`. More fields may come."""

    request_id: str
    prefill_worker: str | None
    decode_worker: str | None
    kv_bytes: int
    kv_segments: int
    cached_tokens: int
    ttft_s: Seconds
    itl_s: Seconds
    placement_reason: str | None
    preemptions: int


class Alternative(Struct, forbid_unknown_fields=True):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Alternative, forbid_unknown_fields=True):
    """A chosen token, and the best ones at its place."""

    top_logprobs: list[Alternative]


class ChatLogprobs(Struct, forbid_unknown_fields=True):
    """Logprobs of a chat answer."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(Struct, forbid_unknown_fields=True):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Struct, forbid_unknown_fields=True):
    """One choice of a chat answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Struct, forbid_unknown_fields=True):
    """The answer of /v1/chat/completions."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageBody
    twostroke: Facts | UnsetType = UNSET


class Delta(Struct, forbid_unknown_fields=True):
    """What an event adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, forbid_unknown_fields=True):
    """One choice of an event."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletionChunk(Struct, forbid_unknown_fields=True):
    """One event of a chat stream."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET
    twostroke: Facts | UnsetType = UNSET


class CompletionLogprobs(Struct, forbid_unknown_fields=True):
    """Logprobs of a completion: four lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Struct, forbid_unknown_fields=True):
    """One choice of a completion, or what an event adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class Completion(Struct, forbid_unknown_fields=True):
    """The answer of /v1/completions, and each event of its stream."""

    id: str
    created: int
    model: str
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageBody | UnsetType | None = UNSET
    twostroke: Facts | UnsetType = UNSET


class ModelCard(Struct, forbid_unknown_fields=True):
    """The model that this router serves."""

    id: Annotated[str, Meta(description="What a request's `model` says.")]
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Annotated[int, Meta(description="Most tokens of a request, prompt and output together.")]


class ModelList(Struct, forbid_unknown_fields=True):
    """What can be asked for."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Struct, forbid_unknown_fields=True):
    """The answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Struct, forbid_unknown_fields=True):
    """The answer of /detokenize."""

    prompt: str


class Health(Struct, forbid_unknown_fields=True):
    """This process lives."""

    status: Literal["ok"]


class Readiness(Struct, forbid_unknown_fields=True):
    """Whether a request would find a worker."""

    ready: bool


class WorkerLoad(Struct):
    """How busy a worker is."""

    waiting: int
    running: int
    queued_tokens: int
    step_s: float
    steps: int


class WorkerBlocks(Struct):
    """A worker's KV blocks by state."""

    total: int
    free: int
    cached: int
    leased: int
    promised: int


class WorkerState(Struct):
    """A worker as this router knows it. More fields may come."""

    id: str
    role: Literal["prefill", "decode"]
    endpoint: str
    state: str
    load: WorkerLoad
    blocks: WorkerBlocks
    hit_rate: Annotated[float | None, Meta(description="Share of prompt tokens found in the prefix cache.")]
    prompt_tokens: Annotated[int, Meta(description="Prompt tokens taken in so far, cached ones included.")]
    leases_open: int
    kv_bytes: int
    preemptions: int
    longest_wait_s: float
    digest_failures: int


class RouterState(Struct):
    """This router."""

    id: str
    live: Annotated[int, Meta(description="Requests that live now.")]


class ClusterState(Struct):
    """Every worker as this router knows it. More fields may come."""

    model: str
    routers: list[RouterState]
    workers: list[WorkerState]


class ExplanationList(Struct):
    """The latest requests, newest first."""

    requests: list[Explanation]
