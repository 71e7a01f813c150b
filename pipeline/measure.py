"""The measuring loop: every prompt answered in every way before the next, so that all meet the same
machine.

A way is a drafter with a tree; plain decoding on the same target may be one more. Which way goes
first rotates from answer to answer, so that a machine that slows down or is busy hits all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.errors import UsageError
from pipeline.config import DecodeOptions
from pipeline.progress import Tell
from pipeline.prompts import Prompt, PromptSet
from runtime.generator import Completion, Generator
from runtime.tree import TreeConfig

_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Way:
    """How to answer. `name` tells it from other ways; `engine` is the folder it came from."""

    name: str
    generator: Generator
    tree: TreeConfig
    engine: Path | None = None


@dataclass(frozen=True)
class Answer:
    """One prompt answered with one seed: `fast` by each way in order, `plain` where asked for."""

    prompt: Prompt
    seed: int
    fast: tuple[Completion, ...]
    plain: Completion | None = None

    def identical(self, way: int) -> bool | None:
        """Whether `way` gave the tokens of its judge: of plain decoding, where there is none of the
        first way; None for the first way then.
        """
        if self.plain is None and way == 0:
            return None
        return self.fast[way].token_ids == (self.plain or self.fast[0]).token_ids

    def to_json(self, way: int = 0) -> dict[str, Any]:
        """One line of `--details FILE`: what `way` made of it."""
        found, plain = self.fast[way], self.plain
        rate, plain_rate = decode_rate(found), decode_rate(plain)
        return {
            "prompt": self.prompt.name,
            "seed": self.seed,
            "identical": self.identical(way),
            "tokens": len(found.token_ids),
            "prompt_tokens": found.prompt_tokens,
            "tau": found.tau,
            "rounds": found.rounds,
            "accepted_at": found.accepted_at,
            "plain_tok_s": plain_rate,
            "speculative_tok_s": rate,
            "speedup": None if rate is None or plain_rate is None else rate / plain_rate,
            "plain_seconds": None if plain is None else plain.timings.as_dict(),
            "speculative_seconds": found.timings.as_dict(),
            "plain_text": None if plain is None else plain.text,
            "speculative_text": found.text,
        }


def decode_rate(completion: Completion | None) -> float | None:
    """Tokens a second after the prompt's pass; None where it gave all of them."""
    if completion is None:
        return None
    seconds = completion.timings.total_s - completion.timings.prefill_s
    tokens = len(completion.token_ids) - 1
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def measure(
    ways: Sequence[Way],
    prompts: PromptSet,
    options: DecodeOptions,
    tell: Tell,
    *,
    plain: bool = True,
    seeds: int = 1,
    state: Callable[[Sequence[Answer]], str] = lambda _: "",
) -> list[Answer]:
    """Answer every prompt in all ways; where tokens are drawn, with `seeds` seeds from
    `options.seed` on.

    `state` says what is known so far, for the progress line. Raises UsageError for a prompt that is
    too long, before the first one is decoded.
    """
    tasks = [
        (prompt, encode(ways, prompt), seed)
        for prompt in prompts.prompts
        for seed in range(options.seed, options.seed + (seeds if options.temperature else 1))
    ]
    tell("warming up", None)
    for way in ways:
        _generate(way, tasks[0][1], _warm_up(options), tasks[0][2])
    if plain:
        _generate(ways[0], tasks[0][1], _warm_up(options), tasks[0][2], speculate=False)
    answers: list[Answer] = []
    for index, (prompt, ids, seed) in enumerate(tasks):
        tell(_progress(index, len(tasks), state(answers)), index / len(tasks))
        answers.append(_answer(ways, prompt, ids, options, seed, turn=index, plain=plain))
    tell(_progress(len(tasks) - 1, len(tasks), state(answers)), 1.0)
    return answers


def encode(ways: Sequence[Way], prompt: Prompt) -> list[int]:
    """The prompt's token ids. Raises UsageError where it has none, or too many for a way."""
    try:
        ids = ways[0].generator.prompt_ids(prompt.text)
    except UsageError as error:
        raise UsageError(f"prompt {prompt.name}: {error}") from None
    context = min(way.generator.max_context for way in ways)
    if len(ids) >= context:
        raise UsageError(
            f"prompt {prompt.name} has {len(ids)} tokens, the engine's context holds "
            f"{context} and needs one for the answer; shorten or remove it."
        )
    return ids


def _answer(
    ways: Sequence[Way],
    prompt: Prompt,
    ids: list[int],
    options: DecodeOptions,
    seed: int,
    *,
    turn: int,
    plain: bool,
) -> Answer:
    places = [*([None] if plain else []), *range(len(ways))]  # None: plainly
    first = turn % len(places)
    found: dict[int | None, Completion] = {}
    for place in (*places[first:], *places[:first]):
        way = ways[place or 0]
        found[place] = _generate(way, ids, options, seed, speculate=place is not None)
    return Answer(prompt, seed, tuple(found[place] for place in range(len(ways))), found.get(None))


def _generate(
    way: Way, ids: list[int], options: DecodeOptions, seed: int, *, speculate: bool = True
) -> Completion:
    return way.generator.generate(
        ids,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=seed,
        speculate=speculate,
        tree=way.tree,
    )


def _warm_up(options: DecodeOptions) -> DecodeOptions:
    tokens = min(options.max_tokens, _WARM_UP_TOKENS)
    return options.model_copy(update={"max_tokens": tokens})


def _progress(index: int, count: int, known: str) -> str:
    state = f"answer {index + 1}/{count}"
    return f"{state}, {known}" if known else state
