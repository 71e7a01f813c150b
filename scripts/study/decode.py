"""Live decoding with the drafters of the study: tau, speed, and what the head costs.

Every head (one loss, one seed) is exported and built for ONNX Runtime. All of them answer the same
prompts, interleaved with plain decoding, as a chain (which replaying must agree with) and in the
default tree. The heads alone are timed for one row, the work of a chain's step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from runs import CHAIN, Study
from variants import Variant, heads

from drafter.checkpoint import load_drafter, load_target
from drafter.disk import atomic_write_json
from drafter.families import read_target_config
from engines import build_engines
from export.model import export_model
from pipeline.compare import Comparison, compare
from pipeline.config import CompareOptions, DecodeOptions, options
from pipeline.figures import speed_ratio, tau, tau_ratio
from pipeline.head_bench import head_milliseconds
from pipeline.prompt_sets import benchmark_prompts

LOSS = "kl"
PROMPTS = 10
TOKENS = 48
TREES = ("chain", "default")


def decoding_path(study: Study) -> Path:
    """Where the figures are."""
    return study.out / "decoding.json"


def measure_decoding(study: Study) -> None:
    """Build what is missing, decode, time the heads; writes one JSON file."""
    names = list(heads(read_target_config(study.target)))
    engines = [_engine(study, Variant(name, LOSS, 0)) for name in names]
    # Of each category of MT-Bench the first questions; HumanEval and GSM8K are replayed only.
    prompts = benchmark_prompts("mt-bench", PROMPTS)
    found: dict[str, Any] = {"heads": names, "head_ms": _head_times(study, names)}
    chosen = options(CompareOptions, tree=TREES, depth=CHAIN)
    decode = DecodeOptions(max_tokens=TOKENS, temperature=0.0)
    found["t0"] = _figures(compare(engines, prompts, decode, chosen), names)
    atomic_write_json(decoding_path(study), found)


def _engine(study: Study, variant: Variant) -> Path:
    folder = study.out / "engines" / variant.name
    export_model(study.target, study.drafter(variant), folder / "export", name=variant.name)
    build_engines(folder / "export", folder / "engine")
    return folder / "engine"


def _head_times(study: Study, names: list[str]) -> dict[str, tuple[float, float]]:
    """Median milliseconds of the dense head and of each head for one state, interleaved."""
    target = load_target(study.target)
    found = {}
    for name in names:
        drafter = load_drafter(study.drafter(Variant(name, LOSS, 0)), target)
        found[name] = head_milliseconds(drafter, rows=1)
    return found


def _figures(found: Comparison, names: list[str]) -> list[dict[str, Any]]:
    """One row per head and tree, in the order of the ways."""
    rows = []
    for way in range(len(found.ways)):
        name, tree = names[way // len(TREES)], TREES[way % len(TREES)]
        dense = way % len(TREES)  # the first head, in the same tree
        fast = [answer.fast[way] for answer in found.answers]
        rounds = sum(completion.rounds for completion in fast)
        seconds = {
            part.name: sum(getattr(completion.timings, part.name) for completion in fast)
            for part in dataclasses.fields(fast[0].timings)
        }
        rows.append(
            {
                "head": name,
                "tree": tree,
                "tau": tau(found.answers, way)._asdict(),
                "rho": tau_ratio(found.answers, way, dense)._asdict(),
                "rounds": rounds,
                "seconds": seconds,
                "gain": speed_ratio(found.answers, way, dense)._asdict(),
                "speedup": speed_ratio(found.answers, way, None)._asdict(),
            }
        )
    return rows
