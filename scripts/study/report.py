"""The study's tables and plots from its JSON files: docs/study.md between its two marks, and in
docs/figures the plots, and the figures of all runs, study-runs.jsonl and study-decoding.json. What
stands outside the marks is written by hand and kept.

Intervals: 95 %, bootstrap over prompts (`pipeline.intervals`); the seeds of a variant are summed
within each prompt, comparisons are paired by prompt.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from decode import LOSS, decoding_path
from plots import plot_gain, plot_learning, plot_tau, plot_trade
from runs import CHAIN, Study, read_result
from texts import SETS, TEMPERATURES
from variants import DENSE, LOSSES, Variant, heads

from drafter.errors import UsageError
from drafter.families import read_target_config
from pipeline.intervals import Estimate, Pooled, difference, pooled, ratio

MARKS = ("<!-- figures: scripts/study -->", "<!-- end of figures -->")
INITS = ("activation-pca", "svd", "random")
Results = dict[tuple[str, str, str], list[dict[str, Any]]]  # head, loss, init -> one per seed


def write_report(study: Study, chosen: Sequence[Variant], docs: Path) -> None:
    """Write what the results there are say."""
    results = read_results(study, chosen)
    names = list(heads(read_target_config(study.target)))
    parts = [
        _budget(study, results),
        "### Heads and losses\n\n" + _heads_table(results, names),
        "![tau by head and loss](figures/study-tau.svg)",
        "### LK hybrid against KL\n\n" + _losses_table(results, names),
        "### Starts of the d/8 head (KL)\n\n" + _inits_table(results),
        "### By prompt set (KL, all seeds)\n\n" + _sets_table(results, names),
        "![alpha while training](figures/study-learning.svg)",
    ]
    folder = docs / "figures"
    folder.mkdir(exist_ok=True)
    _keep_figures(folder / "study-runs.jsonl", results)
    plot_tau(folder / "study-tau.svg", _taus(results, names))
    plot_learning(folder / "study-learning.svg", _curves(results, names))
    if decoding_path(study).exists():
        live = json.loads(decoding_path(study).read_text(encoding="utf-8"))
        parts += [
            "### What the head costs, and what that gives (KL, seed 0, live decoding)\n\n"
            + _cost_table(results, live),
            "![tau against milliseconds](figures/study-trade.svg)",
            "![predicted and measured gain](figures/study-gain.svg)",
        ]
        shutil.copyfile(decoding_path(study), folder / "study-decoding.json")
        plot_trade(folder / "study-trade.svg", _trade(results, live))
        plot_gain(folder / "study-gain.svg", [_gain(live, name) for name in live["heads"]])
    _between_marks(docs / "study.md", "\n\n".join(parts))


def _keep_figures(path: Path, results: Results) -> None:
    """All that the runs found, a line each, to five digits."""
    rows = [row for group in results.values() for row in group]
    lines = [json.dumps(_rounded(row), separators=(",", ":")) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value


def read_results(study: Study, chosen: Sequence[Variant]) -> Results:
    """What was run, grouped over seeds. Raises UsageError for results of another study."""
    found: Results = {}
    made_from = study.made_from()
    for variant in chosen:
        if study.result(variant).exists():
            row = read_result(study, variant, made_from)
            found.setdefault((variant.head, variant.loss, variant.init), []).append(row)
    if not found:
        raise UsageError(f"{study.out} holds no results; leave --only out, or name `runs` too.")
    return found


def common(*groups: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The runs of each group whose seed every group has: only those are compared."""
    seeds = set.intersection(*({row["seed"] for row in rows} for rows in groups))
    return [[row for row in rows if row["seed"] in seeds] for rows in groups]


def tau_of(
    rows: Sequence[dict[str, Any]], temperature: float, sets: Sequence[str] = tuple(SETS)
) -> Pooled:
    """1 + the accepted tokens per root, by prompt; seeds summed."""
    sums: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        for text in row["replayed"]:
            if text["temperature"] == temperature and text["set"] in sets:
                total = sums.setdefault((text["set"], text["prompt"]), [0.0, 0.0])
                total[0] += text["roots"] + sum(text["survival"])
                total[1] += text["roots"]
    above, below = np.array([sums[key] for key in sorted(sums)]).T
    return Pooled(above, below)


def shown(estimate: Estimate, digits: int = 2) -> str:
    """`2.41 (2.35 to 2.47)`."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "-"
    low, value, high = (f"{x:.{digits}f}" for x in (estimate.low, estimate.value, estimate.high))
    return f"{value} ({low} to {high})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _budget(study: Study, results: Results) -> str:
    runs = [row for rows in results.values() for row in rows]
    steps = sorted({row["steps"] for row in runs})
    if len(steps) > 1:
        raise UsageError(f"the runs have {steps} steps; they must have the same number.")
    return (
        f"{len(runs)} runs of {steps[0]} steps ({study.tokens:,} tokens, one pass, batches of "
        f"{study.batch_tokens} tokens, peak rate {study.learning_rate:g}); chains of {CHAIN}."
    )


def _heads_table(results: Results, names: Sequence[str]) -> str:
    rows = []
    for loss in LOSSES:
        dense = results.get((DENSE, loss, INITS[0]))
        for name in names:
            found = results.get((name, loss, INITS[0]))
            if found is None or dense is None:
                continue
            cells = [name, loss.replace("_", " "), f"{found[0]['parameters'] / 1e6:.2f} M"]
            for temperature in TEMPERATURES:
                cells += [
                    shown(pooled(tau_of(found, temperature))),
                    _rho(found, dense, temperature),
                ]
            rows.append([*cells, _seeds(found)])
    header = ["head", "loss", "weights", "tau T=0", "rho_tau T=0", "tau T=1", "rho_tau T=1"]
    return _table([*header, "tau T=1 by seed"], rows)


def _rho(rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], temperature: float) -> str:
    tau, other = (tau_of(group, temperature) for group in common(rows, base))
    return shown(ratio(tau, other), 3)


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    taus = [pooled(tau_of([row], 1.0)).value for row in rows]
    return ", ".join(f"{tau:.2f}" for tau in taus if tau is not None)


def _losses_table(results: Results, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        pair = [results.get((name, loss, INITS[0])) for loss in LOSSES]
        if pair[0] is None or pair[1] is None:
            continue
        cells = [name]
        for temperature in TEMPERATURES:
            kl, hybrid = (tau_of(rows, temperature) for rows in common(*pair))
            cells += [shown(difference(hybrid, kl), 3), shown(ratio(hybrid, kl), 3)]
        rows.append(cells)
    return _table(["head", "T=0 difference", "T=0 ratio", "T=1 difference", "T=1 ratio"], rows)


def _inits_table(results: Results) -> str:
    rows = []
    base = results.get(("d/8", "kl", INITS[0]))
    for init in INITS:
        found = results.get(("d/8", "kl", init))
        if found is None or base is None:
            continue
        cells = [init]
        for temperature in TEMPERATURES:
            cells += [shown(pooled(tau_of(found, temperature))), _rho(found, base, temperature)]
        rows.append(cells)
    return _table(["start", "tau T=0", "against PCA", "tau T=1", "against PCA"], rows)


def _sets_table(results: Results, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        found = results.get((name, "kl", INITS[0]))
        if found is None:
            continue
        cells = [name]
        for temperature in TEMPERATURES:
            cells += [shown(pooled(tau_of(found, temperature, [part]))) for part in SETS]
        rows.append(cells)
    header = [f"{part}, T={temperature:g}" for temperature in TEMPERATURES for part in SETS]
    return _table(["head", *header], rows)


def _cost_table(results: Results, live: dict[str, Any]) -> str:
    rows = []
    for name in live["heads"]:
        gain = _gain(live, name)
        replayed = pooled(tau_of(results[name, LOSS, INITS[0]][:1], 0.0, ["mt-bench"]))
        chain, tree = (_row(live, "t0", name, kind) for kind in ("chain", "default"))
        rows.append(
            [
                name,
                f"{live['head_ms'][name][1]:.2f}",
                f"{gain['nu']:.3f}",
                shown(Estimate(**chain["tau"])),
                shown(replayed),
                shown(Estimate(**chain["rho"]), 3),
                f"{gain['predicted']:.3f}",
                shown(gain["measured"], 3),
                shown(Estimate(**tree["tau"])),
                shown(Estimate(**tree["speedup"])),
            ]
        )
    header = ["head", "head ms", "nu", "tau live", "tau replayed", "rho_tau live"]
    header += ["predicted gain", "measured gain", "tau, default tree", "speedup, default tree"]
    kappa = _gain(live, DENSE)["kappa"]
    return f"kappa = {kappa:.3f} (chain of {CHAIN}, T=0).\n\n" + _table(header, rows)


def _row(live: dict[str, Any], key: str, head: str, tree: str) -> dict[str, Any]:
    (found,) = [row for row in live[key] if row["head"] == head and row["tree"] == tree]
    return dict(found)


def _gain(live: dict[str, Any], name: str) -> dict[str, Any]:
    """nu, kappa, predicted and measured gain over the dense head (SlimSpec, arXiv 2605.10453,
    equation 4): rho (1 + kappa) / (1 + nu kappa), for chains at temperature 0.
    """
    dense = _row(live, "t0", DENSE, "chain")
    whole = 1e3 * sum(dense["seconds"][part] for part in ("draft_s", "verify_s", "overhead_s"))
    head_ms = CHAIN * live["head_ms"][DENSE][1]  # one head a drafted token
    kappa = head_ms / (whole / dense["rounds"] - head_ms)
    dense_ms, own_ms = live["head_ms"][name]
    nu = own_ms / dense_ms if name != DENSE else 1.0
    chain = _row(live, "t0", name, "chain")
    return {
        "head": name,
        "nu": nu,
        "kappa": kappa,
        "predicted": chain["rho"]["value"] * (1 + kappa) / (1 + nu * kappa),
        "measured": Estimate(**chain["gain"]),
    }


def _taus(results: Results, names: Sequence[str]) -> dict[tuple[str, str, float], Estimate]:
    return {
        (name, loss, temperature): pooled(tau_of(results[name, loss, INITS[0]], temperature))
        for name in names
        for loss in LOSSES
        for temperature in TEMPERATURES
        if (name, loss, INITS[0]) in results
    }


def _curves(results: Results, names: Sequence[str]) -> dict[str, list[float]]:
    return {
        name: np.mean([row["training_alpha"] for row in results[name, "kl", INITS[0]]], 0).tolist()
        for name in names
        if (name, "kl", INITS[0]) in results
    }


def _trade(results: Results, live: dict[str, Any]) -> dict[str, tuple[float, Estimate]]:
    return {
        name: (live["head_ms"][name][1], pooled(tau_of(results[name, LOSS, INITS[0]], 1.0)))
        for name in live["heads"]
    }


def _between_marks(path: Path, content: str) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else "\n\n".join(MARKS) + "\n"
    if any(text.count(mark) != 1 for mark in MARKS):
        raise UsageError(f"{path} must hold the lines {MARKS[0]} and {MARKS[1]} once each.")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n\n{content}\n\n{MARKS[1]}{after}", encoding="utf-8")
