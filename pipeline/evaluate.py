"""Decoding measured: plain and speculative on the same engine, prompt by prompt, interleaved.

Rates are decode rates: tokens after the first over the time after the prompt's pass. For each
prompt both ways run one after the other, and which goes first alternates, so that a machine that
slows down or is busy hits both alike. `speedup` is the median of the prompts' own ratios, `tau`
and acceptance are pooled over all rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from drafter.errors import UsageError
from pipeline.config import DecodeOptions
from pipeline.progress import Tell
from pipeline.prompts import Prompt, PromptSet
from pipeline.reports import DecodeReport
from runtime.generator import Completion, Generator
from runtime.tree import TreeConfig

_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Pair:
    """One prompt decoded both ways."""

    prompt: Prompt
    plain: Completion
    speculative: Completion

    @property
    def identical(self) -> bool:
        """Whether both gave the same tokens."""
        return self.plain.token_ids == self.speculative.token_ids

    @property
    def speedup(self) -> float | None:
        """The ratio of the two decode rates, None where an answer has a single token."""
        plain, fast = decode_rate(self.plain), decode_rate(self.speculative)
        return None if plain is None or fast is None else fast / plain

    def to_json(self) -> dict[str, Any]:
        """One line of `--details FILE`."""
        return {
            "prompt": self.prompt.name,
            "identical": self.identical,
            "tokens": len(self.speculative.token_ids),
            "prompt_tokens": self.speculative.prompt_tokens,
            "tau": self.speculative.tau,
            "rounds": self.speculative.rounds,
            "plain_tok_s": decode_rate(self.plain),
            "speculative_tok_s": decode_rate(self.speculative),
            "speedup": self.speedup,
            "plain_seconds": self.plain.timings.as_dict(),
            "speculative_seconds": self.speculative.timings.as_dict(),
            "plain_text": self.plain.text,
            "speculative_text": self.speculative.text,
        }


def decode_rate(completion: Completion) -> float | None:
    """Tokens a second after the prompt's pass; None where it gave all of them."""
    seconds = completion.timings.total_s - completion.timings.prefill_s
    tokens = len(completion.token_ids) - 1
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def evaluate(
    generator: Generator,
    prompts: PromptSet,
    options: DecodeOptions,
    tell: Tell,
    tree: TreeConfig | None = None,
) -> list[Pair]:
    """Decode every prompt plainly and speculatively. Raises UsageError for a prompt that is too
    long, before the first one is decoded.
    """
    encoded = [_encode(generator, prompt) for prompt in prompts.prompts]
    tell("warming up", None)
    for speculate in (False, True):
        generator.generate(encoded[0], max_tokens=_WARM_UP_TOKENS, speculate=speculate, tree=tree)
    pairs: list[Pair] = []
    for index, (prompt, ids) in enumerate(zip(prompts.prompts, encoded, strict=True)):
        tell(_state(index, len(encoded), pairs), index / len(encoded))
        pairs.append(_pair(generator, prompt, ids, options, tree, plain_first=index % 2 == 0))
    tell(_state(len(encoded), len(encoded), pairs), 1.0)
    return pairs


def summarise(pairs: Sequence[Pair]) -> DecodeReport:
    """The `decode` object of the reports."""
    fast = [pair.speculative for pair in pairs]
    rounds = sum(c.rounds for c in fast)
    overhead = sum(c.timings.overhead_s for c in fast)
    return DecodeReport(
        prompts=len(pairs),
        identical=sum(pair.identical for pair in pairs),
        tau=_pooled([(c.tau, c.rounds) for c in fast], empty=1.0),
        acceptance_by_depth=_acceptance(fast),
        plain_tok_s=_median([decode_rate(pair.plain) for pair in pairs]),
        speculative_tok_s=_median([decode_rate(c) for c in fast]),
        speedup=_median([pair.speedup for pair in pairs]),
        target_passes_per_token=(
            sum(c.target_passes for c in fast) / sum(len(c.token_ids) for c in fast)
        ),
        overhead_ms_per_round=1e3 * overhead / rounds if rounds else 0.0,
    )


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """10th and 90th percentile (nearest rank) of the values there are."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return None
    last = len(found) - 1
    return found[round(0.1 * last)], found[round(0.9 * last)]


def seconds_by_part(completions: Sequence[Completion]) -> dict[str, float]:
    """Prefill, draft, verify and overhead seconds, summed."""
    parts = [completion.timings.as_dict() for completion in completions]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _encode(generator: Generator, prompt: Prompt) -> list[int]:
    try:
        ids = generator.prompt_ids(prompt.text)
    except UsageError as error:
        raise UsageError(f"prompt {prompt.name}: {error}") from None
    if len(ids) >= generator.max_context:
        raise UsageError(
            f"prompt {prompt.name} has {len(ids)} tokens, the engine's context holds "
            f"{generator.max_context} and needs one for the answer; shorten or remove it."
        )
    return ids


def _pair(
    generator: Generator,
    prompt: Prompt,
    ids: list[int],
    options: DecodeOptions,
    tree: TreeConfig | None,
    plain_first: bool,
) -> Pair:
    found: dict[bool, Completion] = {}
    for speculate in (False, True) if plain_first else (True, False):
        found[speculate] = generator.generate(
            ids,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed,
            speculate=speculate,
            tree=tree,
        )
    return Pair(prompt, plain=found[False], speculative=found[True])


def _state(index: int, count: int, pairs: Sequence[Pair]) -> str:
    if not pairs:
        return f"prompt {index + 1}/{count}"
    shown = summarise(pairs)
    state = f"prompt {min(index + 1, count)}/{count}, tau {shown.tau:.2f}"
    return state if shown.speedup is None else f"{state}, {shown.speedup:.2f}x"


def _acceptance(completions: Sequence[Completion]) -> list[float]:
    depth = max(len(c.acceptance_by_depth) for c in completions)
    return [
        _pooled([(_at(c.acceptance_by_depth, level), c.rounds) for c in completions], empty=0.0)
        for level in range(depth)
    ]


def _at(values: list[float], index: int) -> float:
    return values[index] if index < len(values) else 0.0


def _pooled(weighted: Sequence[tuple[float, int]], empty: float) -> float:
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else empty


def _median(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return median(found) if found else None
