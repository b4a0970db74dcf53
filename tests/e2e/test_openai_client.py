"""The official OpenAI client against a cluster."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.support.cluster import Cluster, assert_blocks_come_home

pytestmark = pytest.mark.e2e
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, http_client=httpx.Client(trust_env=False)
    )


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=32)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 32


def test_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=QUESTION,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]


def test_completions_and_stop_string(client: openai.OpenAI, model: str) -> None:
    free = client.completions.create(model=model, prompt="One, two, three, four,", temperature=0, max_tokens=20)
    text = free.choices[0].text
    stop = text[6:9]
    cut = client.completions.create(
        model=model, prompt="One, two, three, four,", temperature=0, max_tokens=20, stop=stop
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage is not None
    assert free.usage is not None
    assert cut.usage.completion_tokens < free.usage.completion_tokens


def test_seed_is_reproducible(client: openai.OpenAI, model: str) -> None:
    def ask(seed: int) -> str:
        answer = client.completions.create(
            model=model, prompt="Once upon a time", temperature=1, seed=seed, max_tokens=16
        )
        return answer.choices[0].text

    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert token.logprob <= 0
    assert "".join(token.token for token in logprobs.content).strip() != ""


def test_two_choices(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, n=2, temperature=1.2, seed=3, max_tokens=24)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content
    again = client.chat.completions.create(model=model, messages=QUESTION, n=2, temperature=1.2, seed=3, max_tokens=24)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def test_errors_are_typed(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=model, messages=QUESTION, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=model, prompt=[5] * 9000, max_tokens=1)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=model, messages=QUESTION, extra_body={"beam_width": 4})
    assert unknown.value.param == "beam_width"


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b'{"model": "\xff"}', 400), (b'{"messages": 3}', 400), (b"{}", 400)],
)
def test_malformed_bodies(cluster: Cluster, body: bytes, status: int) -> None:
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", content=body, trust_env=False)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "Traceback" not in answer.text


def test_nothing_stays_allocated(cluster: Cluster) -> None:
    assert_blocks_come_home(cluster)
