"""OpenAI's answers: chunks of a stream and whole objects, for both endpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from twostroke_engine.request import FinishReason, TokenOut

from twostroke_router.choice import Piece
from twostroke_router.errors import RequestError
from twostroke_router.explanation import Usage
from twostroke_router.text import Text

Json = dict[str, Any]

_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def error_body(error: RequestError) -> Json:
    """OpenAI's error object."""
    fault = error.fault
    return {
        "error": {
            "message": error.message,
            "type": fault.openai_type,
            "param": error.param,
            "code": fault.openai_code,
        }
    }


def usage_body(usages: Sequence[Usage]) -> Json:
    """`usage` of an answer, summed over its prompts."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


@dataclass
class WholeChoice:
    """A choice gathered from its pieces."""

    text: str = ""
    tokens: list[TokenOut] = field(default_factory=list)
    finish: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        """Takes the next piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish or self.finish


class Rendering(ABC):
    """How one endpoint writes an answer. Lives as long as the answer."""

    object_name: str
    chunk_name: str
    id_prefix: str

    def __init__(self, text: Text, answer_id: str, model: str, created_s: int, has_logprobs: bool) -> None:
        self._text = text
        self._head = {"id": f"{self.id_prefix}-{answer_id}", "created": created_s, "model": model}
        self._has_logprobs = has_logprobs

    def whole(self, choices: Sequence[WholeChoice], usages: Sequence[Usage]) -> Json:
        """The answer in one object."""
        rendered = [
            {"index": index, **self._whole_choice(index, choice), "finish_reason": _finish(choice.finish)}
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "object": self.object_name, "choices": rendered, "usage": usage_body(usages)}

    def chunk(self, index: int, piece: Piece) -> Json:
        """One event of a stream."""
        choice = {"index": index, **self._chunk_choice(index, piece), "finish_reason": _finish(piece.finish)}
        return {**self._head, "object": self.chunk_name, "choices": [choice]}

    def usage_chunk(self, usages: Sequence[Usage]) -> Json:
        """The event that carries usage, after the last choice has ended."""
        return {**self._head, "object": self.chunk_name, "choices": [], "usage": usage_body(usages)}

    @abstractmethod
    def _whole_choice(self, index: int, choice: WholeChoice) -> Json: ...

    @abstractmethod
    def _chunk_choice(self, index: int, piece: Piece) -> Json: ...

    def _token_text(self, token_id: int) -> str:
        return self._text.token_bytes(token_id).decode(errors="replace")


class ChatRendering(Rendering):
    """/v1/chat/completions."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, text: Text, answer_id: str, model: str, created_s: int, has_logprobs: bool) -> None:
        super().__init__(text, answer_id, model, created_s, has_logprobs)
        self._begun: set[int] = set()

    def _whole_choice(self, index: int, choice: WholeChoice) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice.tokens)}

    def _chunk_choice(self, index: int, piece: Piece) -> Json:
        delta: Json = {"content": piece.text} if piece.text or index not in self._begun else {}
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", **delta}
        return {"delta": delta, "logprobs": self._logprobs(piece.tokens)}

    def _logprobs(self, tokens: Sequence[TokenOut]) -> Json | None:
        if not self._has_logprobs:
            return None
        content = [
            {**self._token(token.id, token.logprob), "top_logprobs": [self._token(*each) for each in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        text = self._token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(self._text.token_bytes(token_id))}


class CompletionRendering(Rendering):
    """/v1/completions."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, text: Text, answer_id: str, model: str, created_s: int, has_logprobs: bool) -> None:
        super().__init__(text, answer_id, model, created_s, has_logprobs)
        self._offsets: dict[int, int] = {}

    def _whole_choice(self, index: int, choice: WholeChoice) -> Json:
        return {"text": choice.text, "logprobs": self._logprobs(index, choice.tokens)}

    def _chunk_choice(self, index: int, piece: Piece) -> Json:
        return {"text": piece.text, "logprobs": self._logprobs(index, piece.tokens)}

    def _logprobs(self, index: int, tokens: Sequence[TokenOut]) -> Json | None:
        if not self._has_logprobs:
            return None
        texts = [self._token_text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": offsets,
        }

    def _alternatives(self, token: TokenOut) -> dict[str, float]:
        found = {self._token_text(token_id): logprob for token_id, logprob in token.top}
        found.setdefault(self._token_text(token.id), token.logprob)
        return found


def _finish(finish: FinishReason | None) -> str | None:
    return None if finish is None else _FINISH[finish]
