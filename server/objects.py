"""OpenAI's objects: what an answer looks like, whole and in chunks."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from server.jobs import Done
from server.schema import ChatRequest, CompletionRequest
from transformers_patches import VERSION
from transformers_patches.generation.generate import GenerationResult
from transformers_patches.generation.text import INCOMPLETE
from transformers_patches.generation.token_logprobs import TokenLogprob

FINGERPRINT = f"partinfer-{VERSION}"


def new_answer(request: ChatRequest | CompletionRequest, *args) -> ChatAnswer | CompletionAnswer:
    """What the answer to a request looks like. args: those of its class."""
    return (ChatAnswer if isinstance(request, ChatRequest) else CompletionAnswer)(*args)


def usage(result: GenerationResult, reused: int) -> dict:
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.generated_tokens,
        "total_tokens": result.prompt_tokens + result.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


@dataclass
class _Answer:
    """One answer. `chunk` takes what belongs to a choice, `extra` to the whole object."""

    model: str
    created: int
    tokenizer: PreTrainedTokenizerBase

    prefix, whole_kind, chunk_kind = "", "", ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def _object(self, kind: str, choices: list[dict], **extra) -> dict:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"system_fingerprint": FINGERPRINT, "choices": choices} | extra

    def _token(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id])

    def last(self, done: Done, *, with_usage: bool, extended: bool) -> list[dict]:
        """The chunks after the text."""
        extra = {"partinfer": done.summary} if extended else {}
        chunks = [self._object(self.chunk_kind, [self._choice("", None, done.result.finish_reason)], **extra)]
        if with_usage:
            chunks.append(self._object(self.chunk_kind, [], usage=usage(done.result, done.reused_tokens)))
        return chunks

    def chunk(self, text: str, logprobs: Sequence[TokenLogprob], **extra) -> dict:
        return self._object(self.chunk_kind, [self._choice(text, logprobs, None)], **extra)

    def first(self) -> list[dict]:
        """The chunks before the text."""
        return []

    def _choice(self, text: str, logprobs: Sequence[TokenLogprob] | None, finish_reason: str | None) -> dict:
        raise NotImplementedError


class ChatAnswer(_Answer):
    """chat.completion and chat.completion.chunk"""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        return [self._object(self.chunk_kind, [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def whole(self, text: str, logprobs: Sequence[TokenLogprob] | None, done: Done, *, extended: bool) -> dict:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": _reason(done.result.finish_reason),
        }
        extra = {"partinfer": done.summary} if extended else {}
        return self._object(self.whole_kind, [choice], usage=usage(done.result, done.reused_tokens), **extra)

    def _choice(self, text, logprobs, finish_reason) -> dict:
        return {
            "index": 0,
            "delta": {"content": text} if finish_reason is None else {},
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": _reason(finish_reason),
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict:
        content = [
            self._entry(token.token_id, token.logprob) | {"top_logprobs": [self._entry(*pair) for pair in token.top]}
            for token in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict:
        text = self._token(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if INCOMPLETE in text else list(text.encode())}


class CompletionAnswer(_Answer):
    """text_completion"""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._offset = 0  # of the next token in the text, for log-probabilities

    def whole(self, text: str, logprobs: Sequence[TokenLogprob] | None, done: Done, *, extended: bool) -> dict:
        choice = self._choice(text, logprobs, done.result.finish_reason)
        extra = {"partinfer": done.summary} if extended else {}
        return self._object(self.whole_kind, [choice], usage=usage(done.result, done.reused_tokens), **extra)

    def _choice(self, text, logprobs, finish_reason) -> dict:
        return {
            "index": 0,
            "text": text,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": _reason(finish_reason),
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict:
        tokens = [self._token(token.token_id) for token in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        tops = [{self._token(i): value for i, value in reversed(token.top)} for token in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _reason(finish_reason: str | None) -> str | None:
    """An answer that was interrupted is said to be cut off, for want of a word in OpenAI's API."""
    return "length" if finish_reason == "interrupted" else finish_reason


def event(content: dict | str) -> bytes:
    """One server-sent event."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
