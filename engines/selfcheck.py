"""After every build: seeded inputs through the new engine and PyTorch; a wrong engine is refused.

An engine of rounded weights is checked twice: its weights and graphs with float activations, to
the tolerances of fp32, and as it runs, against PyTorch that rounds activations as the kernel does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from drafter.decoder import TargetDecoder
from drafter.eagle3 import Drafter
from drafter.errors import CheckFailed
from drafter.heads.low_rank import LowRankHead
from engines.base import PRECISIONS, Engine, EngineManifest
from engines.cases import BATCHES, make_cases
from engines.parity import EXACT, ROUNDED, Comparison, Tolerance, compare
from engines.torch_backend import torch_engines
from export.contract import GraphName, contracts

_PREFIXES = (5,)
Engines = Mapping[GraphName, Engine]


@dataclass(frozen=True)
class Comparand:
    """What must agree with a reference, and how closely; the keys of `engines` name them in
    reports.
    """

    engines: Mapping[str, Engines]
    reference: Engines
    tolerances: Mapping[str, Tolerance]


class Labelled(NamedTuple):
    """One tensor of one case of the engines called `label`."""

    label: str
    comparison: Comparison


def comparands(
    manifest: EngineManifest,
    open_as_built: Callable[[], Engines],
    decoder: TargetDecoder,
    drafter: Drafter,
    exported: Mapping[str, Engines] | None = None,
) -> Iterator[Comparand]:
    """The checks that an engine folder needs; `exported` are graphs to check beside it.

    For rounded graphs the linear layers of `decoder` and `drafter` are replaced for good.
    """
    rounded = PRECISIONS[manifest.precision].graphs
    built = open_as_built()
    exact = {graph: engine for graph, engine in built.items() if graph not in rounded}
    candidates = {**(exported or {}), **({"engine": exact} if exact else {})}
    if candidates:
        yield Comparand(candidates, torch_engines(decoder, drafter), dict.fromkeys(ROUNDED, EXACT))
    if rounded:
        modules: list[nn.Module] = [drafter, decoder] if "target" in rounded else [drafter]
        as_built = {graph: built[graph] for graph in rounded}
        yield from _rounded_comparands(manifest, as_built, modules, torch_engines(decoder, drafter))


def _rounded_comparands(
    manifest: EngineManifest, as_built: Engines, modules: list[nn.Module], reference: Engines
) -> Iterator[Comparand]:
    from engines.onnxruntime import open_with_float_activations
    from engines.weight_only_reference import replace_factors, replace_linears, round_activations

    chosen = PRECISIONS[manifest.precision]
    for module in modules:
        if chosen.only is None:
            inner = chosen.layers if module is not modules[0] else chosen.form  # of the target
            replace_linears(module, inner, head=chosen.form)
        elif isinstance(module, Drafter) and isinstance(module.lm_head, LowRankHead):
            replace_factors(module.lm_head, chosen.form, chosen.only)
        round_activations(module, False)
    unrounded = open_with_float_activations(manifest, tuple(as_built))
    yield Comparand(
        {"engine, float activations": unrounded}, reference, dict.fromkeys(ROUNDED, EXACT)
    )
    for module in modules:
        round_activations(module, True)
    yield Comparand({"engine": as_built}, reference, ROUNDED)


def run_comparand(
    pair: Comparand,
    manifest: EngineManifest,
    *,
    batches: Sequence[int] = BATCHES,
    prefixes: Sequence[int] = _PREFIXES,
) -> Iterator[Labelled]:
    """Every tensor of every case, each reference output computed once."""
    found = contracts(manifest.target, manifest.drafter)
    cases = make_cases(
        pair.reference, manifest.target, manifest.drafter, batches=batches, prefixes=prefixes
    )
    for case in cases:
        compared = {label: e for label, e in pair.engines.items() if case.graph in e}
        if not compared:
            continue
        expected = pair.reference[case.graph].run(case.feeds)
        for label, engines in compared.items():
            outputs = engines[case.graph].run(case.feeds)
            tolerance = pair.tolerances[case.graph]
            for made in compare(found[case.graph], case.name, expected, outputs, tolerance):
                yield Labelled(label, made)


def self_check(
    manifest: EngineManifest,
    open_as_built: Callable[[], Engines],
    decoder: TargetDecoder,
    drafter: Drafter,
) -> None:
    """Compare every graph, batch 1 and 4. Raises CheckFailed naming the first bad tensor."""
    for pair in comparands(manifest, open_as_built, decoder, drafter):
        bad = first_divergence(run_comparand(pair, manifest))
        if bad is not None:
            raise CheckFailed(f"{describe(bad)}; the engine was not kept.")


def first_divergence(made: Iterable[Labelled]) -> Labelled | None:
    """The first tensor out of tolerance, in computation order of the first bad case."""
    return next((one for one in made if not one.comparison.ok), None)


def describe(made: Labelled) -> str:
    """One clause on a tensor out of tolerance."""
    bad, agreement = made.comparison, ""
    if bad.topk_agreement is not None:
        agreement = f", top-k agreement {bad.topk_agreement:.1%}"
    return (
        f"{made.label}: {bad.graph}, {bad.case}: {bad.tensor} is the first tensor to differ from "
        f"PyTorch (max abs error {bad.max_abs:.2e}, relative {bad.max_rel:.2e}{agreement})"
    )
