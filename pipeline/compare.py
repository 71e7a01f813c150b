"""Many drafters, one target: the same prompts answered with each, interleaved, and compared.

found = compare([dense, low_rank], read_prompts(path), DecodeOptions(max_tokens=128))
found.tau(1), found.tau_ratio(1)   # with intervals, paired with the first drafter
found.counts(1).tokens             # by prompt
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from pipeline import figures
from pipeline.config import CompareOptions, DecodeOptions, TreeOptions, options
from pipeline.figures import Counts
from pipeline.intervals import Estimate
from pipeline.measure import Answer, Way, encode, measure
from pipeline.progress import Tell, progress, said_once
from pipeline.prompts import PromptSet
from runtime.generator import Generator
from runtime.trace import Trace
from runtime.tree import ADAPTIVE_TREE, TreeConfig

CHAIN, DEFAULT, ADAPTIVE = "chain", "default", "adaptive"  # default: the engine's own tree


@dataclass(frozen=True)
class Comparison:
    """The answers to one prompt set in all ways, and the figures of one way by its place."""

    prompts: PromptSet
    decode: DecodeOptions
    ways: tuple[Way, ...]
    answers: tuple[Answer, ...]

    def counts(self, way: int) -> Counts:
        """Tokens, rounds and accepted depths, by prompt."""
        return figures.counts(self.answers, way)

    def tau(self, way: int) -> Estimate:
        """Mean tokens per round."""
        return figures.tau(self.answers, way)

    def tau_ratio(self, way: int, base: int = 0) -> Estimate:
        """rho_tau against the first way (or another), paired by prompt."""
        return figures.tau_ratio(self.answers, way, base)

    def tau_difference(self, way: int, base: int = 0) -> Estimate:
        """The difference in tau to the first way (or another), paired by prompt."""
        return figures.tau_difference(self.answers, way, base)

    def conditional_acceptance(self, way: int) -> list[Estimate]:
        """[d]: of the rounds that accepted depth d, those that accepted depth d+1 too."""
        return figures.conditional_acceptance(self.answers, way)


def compare(
    engine_dirs: Sequence[Path],
    prompts: PromptSet,
    decode: DecodeOptions,
    chosen: CompareOptions | None = None,
) -> Comparison:
    """`compare_all` for one set and one temperature, by default without plain decoding."""
    chosen = chosen or options(CompareOptions, plain=False)
    (found,) = compare_all(engine_dirs, [prompts], [decode], chosen)
    return found


def compare_all(
    engine_dirs: Sequence[Path],
    sets: Sequence[PromptSet],
    decodes: Sequence[DecodeOptions],
    chosen: CompareOptions,
    state: Callable[[Sequence[Answer]], str] = lambda _: "",
    trace: Trace | None = None,
) -> list[Comparison]:
    """Answer every set, decoded in each manner, with each engine's drafter in each tree.

    Raises UsageError where the engines' targets differ or a prompt is too long, before the first
    one is answered.
    """
    from runtime.side_by_side import load_side_by_side

    generators = load_side_by_side(
        engine_dirs, chosen.threads, said_once(), adaptive=ADAPTIVE in chosen.tree
    )
    if trace is not None:
        for name, generator in zip(names(engine_dirs), generators, strict=True):
            generator.track = trace.track(name)
    tasks = [
        (prompts, decode, ways_of(engine_dirs, generators, decode.temperature, chosen))
        for decode, prompts in product(decodes, sets)
    ]
    for prompts, _, ways in tasks:
        for prompt in prompts.prompts:
            encode(ways, prompt)
    found = []
    with progress("evaluate") as tell:
        for place, (prompts, decode, ways) in enumerate(tasks):
            part = _part(tell, place, len(tasks), prompts.title)
            answers = measure(
                ways, prompts, decode, part, plain=chosen.plain, seeds=chosen.seeds, state=state
            )
            found.append(Comparison(prompts, decode, tuple(ways), tuple(answers)))
    return found


def ways_of(
    engine_dirs: Sequence[Path],
    generators: Sequence[Generator],
    temperature: float,
    chosen: CompareOptions,
) -> list[Way]:
    """Every engine in every tree, engine by engine, named by what tells them apart."""
    ways = []
    for name, folder, generator in zip(names(engine_dirs), engine_dirs, generators, strict=True):
        for kind in chosen.tree:
            parts = [name] if len(engine_dirs) > 1 or len(chosen.tree) == 1 else []
            parts += [kind] if len(chosen.tree) > 1 else []
            tree = shaped(generator.tree(temperature), kind, chosen)
            ways.append(Way(", ".join(parts), generator, tree, folder))
    return ways


def shaped(tree: TreeConfig, kind: str, shape: TreeOptions) -> TreeConfig:
    """The engine's tree, a chain of its depth or an adaptive one, with the values of `shape`.

    A chain is drafted to its full depth by the drafter alone: nothing prunes it, nothing is looked
    up, so that its tau says what the drafter can do. Raises UsageError.
    """
    given = shape.chosen()
    if kind == CHAIN:
        depth = given.get("depth", tree.depth)
        tree = TreeConfig(depth=depth, width=1, budget=depth)
    if kind == ADAPTIVE:
        tree = ADAPTIVE_TREE
    return replace(tree, **given)


def names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths below the folder that holds them all."""
    paths = [str(folder.resolve()) for folder in folders]
    if len(paths) == 1:
        return [Path(paths[0]).name]
    above = os.path.commonpath([str(Path(path).parent) for path in paths])
    return [os.path.relpath(path, above) for path in paths]


def _part(tell: Tell, place: int, count: int, title: str) -> Tell:
    """Progress of one of several measurements."""
    if count == 1:
        return tell
    return lambda state, share: tell(f"{title}: {state}", (place + (share or 0.0)) / count)
