"""Answers from OpenAI-compatible servers, as documents of the target's own token ids.

A document is the prompt in our chat template and the tokens of the answer: those that the server
returned, else its text tokenised again and closed with the end-of-turn token where it ended by
itself. What the server tells of the prompt (ids, or their number) must be what our template makes.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from drafter.corpus import Document, document
from drafter.errors import MissingError, UsageError
from drafter.tokenizer import ChatTokenizer
from pipeline.answer_log import AnswerLog
from pipeline.chat_server import Answer, ChatServer, NoAnswer
from pipeline.progress import Tell


@dataclass(frozen=True)
class Asking:
    """What is asked: prompts, sampling, and the share of them that may fail.

    Prompt i is answered at `temperatures[i % len]` with the seed `seed * 1,000,003 + i`.
    `template`: variables of the chat template, for the server's and for ours.
    """

    prompts: Sequence[str]
    temperatures: Sequence[float]
    max_tokens: int
    seed: int
    max_failures: float
    template: dict[str, Any] = field(default_factory=dict)

    def options(self, index: int) -> dict[str, Any]:
        """The body of a request, but for model and messages."""
        found: dict[str, Any] = {
            "temperature": self.temperatures[index % len(self.temperatures)],
            "max_tokens": self.max_tokens,
            "seed": self.seed * 1_000_003 + index,
        }
        return found | ({"chat_template_kwargs": self.template} if self.template else {})


class Regeneration:
    """One corpus being answered by servers, and the log of it."""

    def __init__(self, asking: Asking, tokenizer: ChatTokenizer, log: AnswerLog) -> None:
        self.asking, self.tokenizer, self.log = asking, tokenizer, log
        self.end = tokenizer.end_of_turn()

    def run(self, server: ChatServer, tell: Tell) -> None:
        """Ask until every prompt has an answer or was given up. Raises UsageError for a server that
        does not fit, MissingError where too many prompts fail, or all.
        """
        try:
            asyncio.run(self._run(server, tell))
        except BaseExceptionGroup as group:
            raise _first(group) from None
        if not self.log.answered:
            raise MissingError(
                f"none of the {len(self.asking.prompts)} prompts has an answer, a corpus needs at "
                f"least one; {self.log.path(0).parent} says why. Mend the server and run the same "
                "command again."
            )

    def documents(self) -> Iterator[Document]:
        """What was answered, in the order of the prompts."""
        for row in self.log.rows():
            if "ids" in row:
                yield document(self._prompt_ids(row["index"]), row["ids"])

    def counts(self) -> dict[str, dict[str, int]]:
        """How the tokens of the answers came ("returned", or from the "text"), how prompts were
        compared (by "ids", by their "count", or "not" where the server tells nothing of them), and
        of texts, whether their tokens are as many as the server counted ("same", "other").
        """
        found = {"tokens": Counter[str](), "prompts": Counter[str](), "counts": Counter[str]()}
        for row in self.log.rows():
            for kind in found.keys() & row.keys():
                found[kind][row[kind]] += 1
        return {kind: dict(sorted(counter.items())) for kind, counter in found.items()}

    def failures(self) -> list[dict[str, Any]]:
        """The prompts that were given up, as the log has them."""
        return [row for row in self.log.rows() if "ids" not in row]

    async def _run(self, server: ChatServer, tell: Tell) -> None:
        todo = self.log.todo()
        async with server, asyncio.TaskGroup() as group:
            for _ in range(server.concurrency):
                group.create_task(self._work(server, todo, tell))

    async def _work(self, server: ChatServer, todo: Iterator[int], tell: Tell) -> None:
        for index in todo:
            try:
                answer = await server.ask(self.asking.prompts[index], self.asking.options(index))
                self.log.add(self._row(index, answer))
            except NoAnswer as error:
                self._fail(index, error)
            done, total = len(self.log.answered), len(self.asking.prompts)
            failed = f", {len(self.log.failed)} failed" if self.log.failed else ""
            tell(f"answered {done} of {total} prompts{failed}", done / total)

    def _row(self, index: int, answer: Answer) -> dict[str, Any]:
        """The line of the log. Raises NoAnswer for an ending that is none of the model's."""
        compared = self._compare_prompt(index, answer)
        if answer.finish_reason not in ("stop", "length"):
            raise NoAnswer(200, 1, f"the answer ended with '{answer.finish_reason}'")
        returned = answer.token_ids is not None
        ids = self._returned_ids(answer) if returned else self._text_ids(answer)
        if not ids:
            raise NoAnswer(200, 1, "the answer has no tokens")
        row = {"index": index, "ids": ids, "prompts": compared}
        if returned:
            return row | {"tokens": "returned"}
        same = answer.completion_tokens == len(ids)
        known = {} if answer.completion_tokens is None else {"counts": "same" if same else "other"}
        return row | {"tokens": "text"} | known

    def _returned_ids(self, answer: Answer) -> list[int]:
        """Returned ids, the token that ended the answer included."""
        ids = answer.token_ids or []
        if bad := [token for token in ids if not 0 <= token < self.tokenizer.vocab_size]:
            raise UsageError(
                f"the server returned token id {bad[0]}, the target's tokenizer has "
                f"{self.tokenizer.vocab_size}: it serves another model than --target."
            )
        ended = bool(ids) and ids[-1] in self.tokenizer.eos_ids
        return ids + ([self.end] if answer.finish_reason == "stop" and not ended else [])

    def _text_ids(self, answer: Answer) -> list[int]:
        """The text tokenised again, and the end-of-turn token where the answer ended by itself."""
        if answer.reasoning:
            raise UsageError(
                "the server takes the reasoning out of its answers, so what the model said cannot "
                "be put together again; serve it without a reasoning parser, or with one that "
                "returns token ids, or give --thinking off."
            )
        ids = self.tokenizer.encode(answer.text, add_special=False)
        return ids + ([self.end] if answer.finish_reason == "stop" else [])

    def _compare_prompt(self, index: int, answer: Answer) -> str:
        """How the server's prompt was compared with ours. Raises UsageError where they differ."""
        ours = self._prompt_ids(index)
        if answer.prompt_ids is not None:
            how, fits, found = "ids", answer.prompt_ids == ours, len(answer.prompt_ids)
        elif answer.prompt_tokens is not None:
            how, fits, found = "count", answer.prompt_tokens == len(ours), answer.prompt_tokens
        else:
            return "not"
        if not fits:
            raise UsageError(
                f"the server reads prompt {index + 1} as {found} tokens, the target's chat "
                f"template makes {len(ours)} of it, or others: serve the model with the tokenizer "
                "and the chat template of --target (and the same --thinking)."
            )
        return how

    def _prompt_ids(self, index: int) -> list[int]:
        turn = {"role": "user", "content": self.asking.prompts[index]}
        return self.tokenizer.apply_chat_template([turn], **self.asking.template)

    def _fail(self, index: int, error: NoAnswer) -> None:
        self.log.add(
            {
                "index": index,
                "status": error.status,
                "attempts": error.attempts,
                "reason": error.reason,
            }
        )
        most = math.floor(self.asking.max_failures * len(self.asking.prompts))
        if len(self.log.failed) > most:
            status = "no reply" if error.status is None else f"status {error.status}"
            raise MissingError(
                f"{len(self.log.failed)} prompts were given up, --max-failures allows {most}; the "
                f"last, prompt {index + 1}, after {error.attempts} attempts ({status}: "
                f"{error.reason}); all of them are in {self.log.path(0).parent}. Mend the server "
                "and run the same command again: it goes on with what has no answer."
            )


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first error of a group, of several that workers met at once."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
