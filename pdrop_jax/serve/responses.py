"""Answers in OpenAI's form, whole or as chunks of a stream, and errors."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from pdrop_jax.generation.logprobs import TokenLogprobs
from pdrop_jax.generation.requests import Completion


class ApiError(Exception):
    """An error response.

    Args:
      kind: OpenAI's "type" of the error.
    """

    def __init__(self, status: int, message: str, kind: str, code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Responses:
    """The responses to one request.

    Args:
      tokens: the bytes of each token of the vocabulary.
    """

    def __init__(self, model: str, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Completion], extra: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None if answer.logprobs is None else self._logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
            }
            for number, answer in enumerate(answers)
        ]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": usage(answers), **extra}

    def chunk(
        self,
        number: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprobs] | None = None,
        finish_reason: str | None = None,
        **extra: Any,
    ) -> str:
        choice = {
            "index": number,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice], **extra})

    def last(self, answers: Sequence[Completion]) -> str:
        """The chunk with the usage."""
        return event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answers)})

    def _logprobs(self, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {
            "content": [
                {**self._token(each.token_id, each.logprob), "top_logprobs": [self._token(*pair) for pair in each.top]}
                for each in found
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._tokens[token]
        return {"token": content.decode("utf-8", "replace"), "bytes": list(content), "logprob": logprob}


def usage(answers: Sequence[Completion]) -> dict[str, Any]:
    """Tokens of the prompt, images before any drop included, and of all answers."""
    cached = max((answer.cached for answer in answers), default=0)
    details = {"prompt_tokens_details": {"cached_tokens": cached}} if cached else {}
    prompt = max((answer.stage_lengths[0] for answer in answers if answer.stage_lengths), default=0)
    new = sum(len(answer.token_ids) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, **details}


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
