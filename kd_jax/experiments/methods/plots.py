"""Plots of the table: what each method gained, seed by seed, and what it cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.experiments.methods.report import BASELINES, Line
from kd_jax.experiments.methods.rows import ALONE, KD, ROWS
from kd_jax.experiments.methods.search import Results
from kd_jax.experiments.notebook.plots import new_figure, plain_numbers, save_figures

# Okabe and Ito's colours, which people with any colour vision tell apart.
_LOGITS, _FEATURES, _OTHER = "#0072B2", "#D55E00", "#009E73"
_FAR_APART = 4
_KINDS = {"logits": _LOGITS, "features": _FEATURES, "no teacher's network": _OTHER}


def write(made: Sequence[Line], found: Results, folder: Path) -> list[str]:
    """Writes the plots as PNG files into `folder` and returns their names."""
    told = [line for line in made if line.accuracy is not None]
    drawn = {"differences.png": _differences(told, found)} if told else {}
    timed = [line for line in told if line.step is not None and line.temp_bytes is not None]
    drawn |= {"cost.png": _cost(timed)} if timed else {}
    return save_figures(drawn, folder)


def kind(name: str) -> str:
    """Logits or features, or what needs no teacher."""
    if ROWS[name].place:
        return "features"
    return "no teacher's network" if name in (ALONE, "labelsmoothing", "virtualteacher", "dml") else "logits"


def _differences(told: Sequence[Line], found: Results) -> Any:
    figure = new_figure(figsize=(11, 1.6 + 0.22 * len(told)))
    axes = figure.subplots(1, 2, sharey=True)
    titles = {ALONE: "to no distillation", KD: "to kd"}
    for axis, one in zip(axes, BASELINES, strict=True):
        baseline = {run["seed"]: run.get("accuracy") for run in found.rows[one].runs}
        for place, line in enumerate(told):
            comparison, colour = line.against.get(one), _KINDS[kind(line.name)]
            if comparison is None:
                continue
            runs = found.rows[line.name].runs
            each = [100 * (run["accuracy"] - baseline[run["seed"]]) for run in runs]
            axis.plot(each, np.full(len(each), place), ".", color="0.7", markersize=4)
            margin = None if comparison.margin is None else 100 * comparison.margin
            axis.errorbar(
                100 * comparison.mean_difference, place, xerr=margin, fmt="o", color=colour, markersize=4, capsize=2,
                linewidth=1,
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel="test accuracy, points", title=f"difference {titles[one]}")
        # One method that fails must not hide what the others differ by.
        means = [100 * line.against[one].mean_difference for line in told if one in line.against]
        if means:
            low, high = np.percentile(means, [15, 100])
            room = max(1.0, high - low)
            axis.set_xscale("symlog", linthresh=2 * room) if min(means) < low - 3 * room else None
        axis.grid(axis="x", alpha=0.25)
    _names(axes[0], told)
    _legend(figure, told)
    figure.suptitle("Means, corrected 95 % intervals, and each seed", fontsize=10)
    return figure


def _cost(told: Sequence[Line]) -> Any:
    figure = new_figure(figsize=(11, 1.6 + 0.22 * len(told)))
    axes = figure.subplots(1, 2, sharey=True)
    labels = ("time of a step, relative to kd", "temporary memory of the training (MiB)")
    costs = ([line.step or 0.0 for line in told], [(line.temp_bytes or 0) / 2**20 for line in told])
    for axis, label, cost in zip(axes, labels, costs, strict=True):
        for place, line in enumerate(told):
            axis.plot(cost[place], place, "o", color=_KINDS[kind(line.name)], markersize=5)
        axis.set(xlabel=label)
        low, high = min(cost), max(cost)
        # A logarithmic axis has too few numbers on it where all costs are about the same.
        if 0 < low <= high / _FAR_APART:
            axis.set_xscale("log")
            plain_numbers(axis.xaxis, "25" if high >= 10 * low else "23456789")
        else:
            axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    _names(axes[0], told)
    _legend(figure, told)
    figure.suptitle("The most accurate method first", fontsize=10)
    return figure


def _names(axis: Any, told: Sequence[Line]) -> None:
    axis.set(yticks=range(len(told)), ylim=(len(told) - 0.5, -0.5))
    axis.set_yticklabels([line.name for line in told], fontsize=7)


def _legend(figure: Any, told: Sequence[Line]) -> None:
    from matplotlib.lines import Line2D

    kinds = [name for name in _KINDS if name in {kind(line.name) for line in told}]
    marks = [Line2D([], [], color=_KINDS[name], marker="o", linestyle="none", label=name) for name in kinds]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
