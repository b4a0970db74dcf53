"""Bad bodies: each is refused, and the field is named. Good ones mean what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from twostroke_engine.request import SamplingParams
from twostroke_router.errors import Fault, RequestError
from twostroke_router.http_openai import ask_of
from twostroke_router.intake import Caller, Job, Limits, take_in
from twostroke_router.openai_schema import ChatRequest, CompletionRequest, decode_body
from twostroke_router.sampling_check import check_prompt_ids

VOCAB, CONTEXT = 300, 256
USER = {"role": "user", "content": "hi"}


def chat_job(body: dict[str, Any]) -> Job:
    """A chat body through everything but the tokenizer."""
    parsed = decode_body(json.dumps({"model": "m", "messages": [USER], **body}).encode(), ChatRequest)
    parsed.check()
    parsed.conversation()
    return take_in(ask_of(parsed, (1, 2, 3), "messages"), Caller(request_id="r"), Limits(VOCAB, CONTEXT))


def completion_job(body: dict[str, Any]) -> Job:
    parsed = decode_body(json.dumps({"model": "m", "prompt": [1, 2, 3], **body}).encode(), CompletionRequest)
    parsed.check()
    [prompt] = parsed.prompts()
    token_ids = check_prompt_ids("prompt", prompt, VOCAB) if isinstance(prompt, list) else (1,)
    return take_in(ask_of(parsed, token_ids, "prompt"), Caller(request_id="r"), Limits(VOCAB, CONTEXT))


BOTH = [
    ({"beam_width": 2}, "beam_width"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 2**40}, "top_k"),
    ({"min_p": 1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": CONTEXT}, "max_tokens"),
    ({"max_tokens": 2**70}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 100}, "stop"),
    ({"stop": "a" * 5000}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "much"}}, "logit_bias"),
    ({"priority": 2**31}, "priority"),
    ({"cache_salt": "s" * 1000}, "cache_salt"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"model": 5}, "model"),
]
CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{**USER, "mood": "good"}]}, "messages[0].mood"),
    ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": CONTEXT}, "max_completion_tokens"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"prompt": "x"}, "prompt"),
]
COMPLETION = [
    ({"prompt": []}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [VOCAB]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1] * (CONTEXT - 1), "max_tokens": 2}, "max_tokens"),
    ({"prompt": [1] * (CONTEXT + 1)}, "prompt"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
]


@pytest.mark.parametrize(
    ("job", "body", "param"),
    [
        *((job, body, param) for job in (chat_job, completion_job) for body, param in BOTH),
        *((chat_job, body, param) for body, param in CHAT),
        *((completion_job, body, param) for body, param in COMPLETION),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_field_is_named(job: Callable[[dict[str, Any]], Job], body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        job(body)
    assert refused.value.param == param
    assert refused.value.fault.http_status == 400
    assert param.split("[")[0].split(".")[0] in refused.value.message


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"model": "\xff"}', b'{"a": NaN}', b'{"model": "\\ud800"}', b"[" * 100_000],
)
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        decode_body(raw, ChatRequest)
    assert refused.value.fault is Fault.INVALID


@pytest.mark.parametrize("missing", ["messages"])
def test_a_missing_field_is_named(missing: str) -> None:
    body = {"model": "m", "messages": [USER]}
    del body[missing]
    with pytest.raises(RequestError) as refused:
        decode_body(json.dumps(body).encode(), ChatRequest)
    assert (refused.value.param, refused.value.message) == (missing, f"{missing}: is required")


def test_the_context_limit_has_its_own_code() -> None:
    for body in ({"prompt": [1] * CONTEXT}, {"prompt": [1], "max_tokens": CONTEXT}):
        with pytest.raises(RequestError) as refused:
            completion_job(body)
        assert refused.value.fault is Fault.CONTEXT


def test_nothing_given_means_the_defaults() -> None:
    sampling = chat_job({}).request.sampling
    assert sampling == SamplingParams(max_tokens=CONTEXT - 3, seed=sampling.seed)
    assert completion_job({}).request.sampling.max_tokens == 16
    assert chat_job({}).request.sampling.seed != sampling.seed, "drawn anew for each request"


def test_everything_given_arrives() -> None:
    job = chat_job(
        {
            "temperature": 0.5,
            "top_k": -1,
            "top_p": 0.9,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "logit_bias": {"7": -100},
            "seed": -1,
            "max_tokens": 99,
            "max_completion_tokens": 20,
            "min_tokens": 2,
            "stop": ["a", "b", "a"],
            "stop_token_ids": [9],
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 4,
            "n": 3,
            "priority": -2,
            "cache_salt": "é",
        }
    )
    request = job.request
    assert request.sampling == SamplingParams(
        temperature=0.5,
        top_k=0,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias=((7, -100.0),),
        seed=2**64 - 1,
        max_tokens=20,
        min_tokens=2,
        stop_token_ids=(9,),
        ignore_eos=True,
        logprobs=4,
    )
    assert (request.n, request.priority, request.cache_salt, job.stops) == (3, -2, "é".encode(), ("a", "b"))
    assert request.id.startswith("r-")


def test_what_cannot_change_the_answer_is_ignored() -> None:
    ignored = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "temperature": None,
        "stop": None,
    }
    assert chat_job(ignored).request.n == 1
    assert completion_job({"best_of": 2, "n": 2, "echo": False, "suffix": None}).request.n == 2


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts, "name": "x"}]}
    assert decode_body(json.dumps(body).encode(), ChatRequest).conversation() == [
        {"role": "user", "content": "a\nb", "name": "x"}
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_of_every_shape(prompt: Any, expected: Any) -> None:
    assert decode_body(json.dumps({"model": "m", "prompt": prompt}).encode(), CompletionRequest).prompts() == expected
