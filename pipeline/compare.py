"""Many drafters, one target: the same prompts answered with each, interleaved, and compared.

found = compare([dense, low_rank], read_prompts(path), DecodeOptions(max_tokens=128))
found.tau(1), found.tau_ratio(1)   # with intervals, paired with the first drafter
found.counts(1).tokens             # by prompt
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import figures
from pipeline.config import DecodeOptions, TreeOptions
from pipeline.config import options as options_of
from pipeline.figures import Counts
from pipeline.intervals import Estimate
from pipeline.measure import Answer, Way, measure
from pipeline.progress import Tell, progress
from pipeline.prompts import PromptSet
from runtime.generator import Generator
from runtime.tree import TreeConfig

CHAIN = "chain"
DEFAULT = "default"
TREES = (DEFAULT, CHAIN)


@dataclass(frozen=True)
class Comparison:
    """The answers of all ways, and the figures of one of them by its place in `ways`."""

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
    options: DecodeOptions,
    *,
    trees: Sequence[str] = (DEFAULT,),
    shape: TreeOptions | None = None,
    plain: bool = False,
    seeds: int = 1,
    threads: int | None = None,
) -> Comparison:
    """Answer all prompts with each engine's drafter, in each of `trees`, and plainly if `plain`.

    `shape` overrules the trees' values. Raises UsageError where the engines' targets differ or a
    prompt is too long.
    """
    from runtime.side_by_side import load_side_by_side

    generators = load_side_by_side(engine_dirs, threads)
    ways = ways_of(
        engine_dirs, generators, options.temperature, trees, shape or options_of(TreeOptions)
    )
    with progress("compare") as tell:
        return _compared(ways, prompts, options, tell, plain=plain, seeds=seeds)


def _compared(
    ways: Sequence[Way],
    prompts: PromptSet,
    options: DecodeOptions,
    tell: Tell,
    *,
    plain: bool,
    seeds: int,
) -> Comparison:
    answers = measure(ways, prompts, options, tell, plain=plain, seeds=seeds)
    return Comparison(tuple(ways), tuple(answers))


def ways_of(
    engine_dirs: Sequence[Path],
    generators: Sequence[Generator],
    temperature: float,
    trees: Sequence[str],
    shape: TreeOptions,
) -> list[Way]:
    """Every engine with every tree, engine by engine."""
    ways = []
    for name, generator in zip(names(engine_dirs), generators, strict=True):
        for tree in trees:
            label = name if len(trees) == 1 else f"{name}, {tree}"
            ways.append(Way(label, generator, shaped(generator.tree(temperature), tree, shape)))
    return ways


def shaped(tree: TreeConfig, kind: str, shape: TreeOptions) -> TreeConfig:
    """The engine's tree, or a chain of its depth, with the values of `shape`.

    A chain is drafted to its full depth by the drafter alone: nothing prunes it, nothing is looked
    up, so that its tau says what the drafter can do. Raises UsageError.
    """
    given = shape.chosen()
    if kind == CHAIN:
        depth = given.get("depth", tree.depth)
        tree = TreeConfig(depth=depth, width=1, budget=depth)
    return replace(tree, **given)


def names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths below the folder that holds them all."""
    paths = [str(folder.resolve()) for folder in folders]
    if len(paths) == 1:
        return [Path(paths[0]).name]
    above = os.path.commonpath([str(Path(path).parent) for path in paths])
    return [os.path.relpath(path, above) for path in paths]
