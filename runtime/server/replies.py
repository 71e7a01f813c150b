"""Answers as OpenAI's clients read them, whole or in chunks, with our figures in `x_slimspec`.

A chat stream opens with the role, both streams end with the finish reason and, if asked for, a
chunk without choices that holds usage and `x_slimspec`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from runtime.generator import Completion

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event. ASCII, because some clients take U+2028 or U+0085 for a line's end."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


def usage(completion: Completion) -> dict[str, int]:
    """OpenAI's token counts; the token that ended the text counts, though it has no text."""
    prompt, generated = completion.prompt_tokens, len(completion.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


def figures(completion: Completion) -> dict[str, Any]:
    """What speculation gave this request."""
    return {
        "rounds": completion.rounds,
        "tau": completion.tau,
        "acceptance_by_depth": completion.acceptance_by_depth,
        "target_passes": completion.target_passes,
        "reused_tokens": completion.reused_tokens,
        "tok_s": completion.tok_s,
    }


@dataclass(frozen=True)
class TextReply:
    """The bodies that answer one request of /v1/completions."""

    model: str
    include_usage: bool = False
    token_ids: bool = False  # of a whole answer, in its choice, as vLLM has it
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The answer in one body."""
        content = self._content(completion.text)
        if self.token_ids:
            content["token_ids"] = completion.token_ids
        return {
            **self._head(self.whole_object),
            "choices": [self._choice(content, completion.finish_reason)],
            "usage": usage(completion),
            "x_slimspec": figures(completion),
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first text."""
        return iter(())

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk([self._choice(self._delta(text), None)])

    def closing(self, completion: Completion) -> Iterator[dict[str, Any]]:
        """Chunks after the last text."""
        yield self._chunk([self._choice(self._delta(""), completion.finish_reason)])
        if self.include_usage:
            figured = {"usage": usage(completion), "x_slimspec": figures(completion)}
            yield {**self._chunk([]), **figured}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        nothing_yet = {"usage": None} if self.include_usage else {}
        return {**self._head(self.chunk_object), "choices": choices, **nothing_yet}

    def _choice(self, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}


@dataclass(frozen=True)
class ChatReply(TextReply):
    """The bodies that answer one request of /v1/chat/completions."""

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")

    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def opening(self) -> Iterator[dict[str, Any]]:
        """See `TextReply`."""
        role = {"delta": {"role": "assistant", "content": ""}}
        yield self._chunk([self._choice(role, None)])

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}
