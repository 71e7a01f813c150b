"""The study's plots, as SVG files that are the same for the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "study"
mpl.rcParams["font.size"] = 9

from matplotlib import pyplot as plt  # noqa: E402

from pipeline.intervals import Estimate  # noqa: E402

_COLOURS = {"kl": "#4c72b0", "lk_hybrid": "#dd8452"}


def plot_tau(path: Path, taus: Mapping[tuple[str, str, float], Estimate]) -> None:
    """tau of every head and loss with its interval, a panel for each temperature."""
    names = list(dict.fromkeys(name for name, _, _ in taus))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, temperature in zip(axes, sorted({t for _, _, t in taus}), strict=True):
        for shift, loss in ((0.15, "kl"), (-0.15, "lk_hybrid")):
            there = [(i, taus[n, loss, temperature]) for i, n in enumerate(names)
                     if (n, loss, temperature) in taus]  # fmt: skip
            axis.errorbar(
                [e.value for _, e in there],
                [len(names) - 1 - i + shift for i, _ in there],
                xerr=_bars([e for _, e in there]),
                fmt="o",
                capsize=3,
                color=_COLOURS[loss],
                label=loss.replace("_", " "),
            )
        axis.set_title(f"temperature {temperature:g}")
        axis.set_xlabel("tau (chain, bonus included)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names[::-1])
    axes[0].legend()
    _save(figure, path)


def plot_learning(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """alpha of the first draft step while training."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, alphas in curves.items():
        axis.plot(range(1, len(alphas) + 1), alphas, label=name, linewidth=1.2)
    axis.set_xlabel("step")
    axis.set_ylabel("alpha of the batch, step 1 of the chain")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    _save(figure, path)


def plot_trade(path: Path, points: Mapping[str, tuple[float, Estimate]]) -> None:
    """tau at temperature 1 against the head's milliseconds."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, (milliseconds, tau) in points.items():
        axis.errorbar(milliseconds, tau.value, yerr=_bars([tau]), fmt="o", capsize=3)
        axis.annotate(name, (milliseconds, tau.value), (5, 4), textcoords="offset points")
    axis.set_xscale("log")
    axis.set_xlabel("head, milliseconds for one state")
    axis.set_ylabel("tau (chain, temperature 1)")
    axis.grid(alpha=0.3)
    _save(figure, path)


def plot_gain(path: Path, gains: Sequence[Mapping[str, Any]]) -> None:
    """Predicted against measured gain over the dense head."""
    figure, axis = plt.subplots(figsize=(5, 5))
    ends = []
    for gain in gains:
        measured: Estimate = gain["measured"]
        axis.errorbar(gain["predicted"], measured.value, yerr=_bars([measured]), fmt="o", capsize=3)
        axis.annotate(
            gain["head"], (gain["predicted"], measured.value), (5, 4), textcoords="offset points"
        )
        ends += [gain["predicted"], measured.value]
    axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color="grey", linewidth=0.8)
    axis.set_xlabel("predicted gain over the dense head")
    axis.set_ylabel("measured gain")
    axis.grid(alpha=0.3)
    _save(figure, path)


def _bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances to the bounds, [2, n]."""
    low = [(e.value or 0.0) - (e.low if e.low is not None else e.value or 0.0) for e in estimates]
    high = [
        (e.high if e.high is not None else e.value or 0.0) - (e.value or 0.0) for e in estimates
    ]
    return [low, high]


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
