"""What each field of a request means: the texts and limits that the OpenAPI document adds to the schemas."""

from __future__ import annotations

from typing import Any

from twostroke_router.sampling_check import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    MAX_STOPS,
)

IGNORED = "Accepted and ignored."
REFUSED = "Known, but not offered: anything but null is refused with 400."

_IGNORED_FIELDS = (
    "annotations",
    "include_obfuscation",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "refusal",
    "safety_identifier",
    "service_tier",
    "store",
    "tool_call_id",
    "user",
)
_REFUSED_FIELDS = (
    "audio",
    "function_call",
    "functions",
    "json_schema",
    "prediction",
    "reasoning_effort",
    "tool_calls",
    "tools",
    "web_search_options",
)

FIELDS: dict[str, str] = {
    "model": "A name from /v1/models; may be left out.",
    "messages": "The conversation, oldest first; put through the model's chat template.",
    "prompt": "A text, token ids, or a list of either.",
    "tokens": "Token ids.",
    "n": f"Choices per prompt, 1 to {MAX_CHOICES}; default 1. One prefill, whatever n is.",
    "max_tokens": "Most tokens to generate. Default: what the context allows in chat, 16 in completions.",
    "max_completion_tokens": "As max_tokens, and counts before it.",
    "stream": "Answer with server-sent events; the last is `data: [DONE]`.",
    "stream_options": "Only with stream.",
    "include_usage": "End the stream with an event that carries usage.",
    "stop": f"Up to {MAX_STOPS} strings of at most {MAX_STOP_CHARS} characters; the answer ends before the first.",
    "temperature": "0 to 2; 0 is greedy. Default 1.",
    "top_p": "Above 0 and at most 1. Default 1.",
    "top_k": "0 or -1 keeps every token. Default 0.",
    "min_p": "0 to 1, relative to the best token's probability. Default 0.",
    "repetition_penalty": "Above 0, over prompt and output. Default 1.",
    "presence_penalty": "-2 to 2, over the output. Default 0.",
    "frequency_penalty": "-2 to 2, over the output, per occurrence. Default 0.",
    "logit_bias": f"Token id to what is added to its logit, -100 to 100; at most {MAX_LOGIT_BIAS}.",
    "seed": "0 to 2^64 - 1. The same seed gives the same noise, wherever the request runs. Drawn if left out.",
    "response_format": "Only type text.",
    "type": "text; anything else is refused.",
    "min_tokens": "End tokens are masked before this many. Default 0.",
    "ignore_eos": "Go on after the model's end token.",
    "stop_token_ids": f"Up to {MAX_STOP_IDS} token ids that end the answer.",
    "priority": "Smaller runs first. Default 0.",
    "cache_salt": "Cached prefixes are shared only within one salt.",
    "logprobs": f"In chat: whether to report logprobs. In completions: how many alternatives, 0 to {MAX_LOGPROBS}.",
    "top_logprobs": f"Alternatives at each token, 0 to {MAX_LOGPROBS}; needs logprobs.",
    "add_generation_prompt": "Whether the template opens the assistant's turn. Default true.",
    "add_special_tokens": "Whether the tokenizer adds its own tokens.",
    "modalities": "null or ['text'].",
    "tool_choice": "null or 'none'.",
    "best_of": "Only if equal to n.",
    "echo": "null or false.",
    "suffix": "null or empty.",
    "role": "system, developer, user, assistant or tool.",
    "content": "A text, or parts of type text.",
    "name": "Passed on to the chat template.",
    **dict.fromkeys(_IGNORED_FIELDS, IGNORED),
    **dict.fromkeys(_REFUSED_FIELDS, REFUSED),
}


LIMITS: dict[str, dict[str, float]] = {
    "n": {"minimum": 1, "maximum": MAX_CHOICES},
    "temperature": {"minimum": 0, "maximum": 2},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "exclusiveMaximum": 2**31},
    "min_p": {"minimum": 0, "exclusiveMaximum": 1},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 1_000_000},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "seed": {"minimum": 0, "exclusiveMaximum": 2**64},
    "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
}
"""Ranges of numbers, in JSON Schema's words; a test holds them against the router's own checks."""


def describe(schemas: dict[str, dict[str, Any]]) -> None:
    """Adds each field's text and range to the schemas of requests, and drops the defaults of null that say nothing."""
    for schema in schemas.values():
        for name, field in schema["properties"].items():
            if name in FIELDS:
                field["description"] = FIELDS[name]
            if "default" in field and field["default"] is None:
                del field["default"]
            for kind in field.get("anyOf", ()):
                if kind.get("type") in ("integer", "number"):
                    kind.update(LIMITS.get(name, {}))
