"""Plots of `hinton`'s rows: beside the paper's numbers, against the temperature, and against the moved bias."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.experiments.hinton2015.plan import CURVE, PAPER, Plan, Results
from kd_jax.experiments.notebook.plots import new_figure, plain_numbers, save_figures
from kd_jax.stats import half_width

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_BLACK = "#000000"


def write(
    found: Results,
    plan: Plan,
    lines: Sequence[Any],
    by_width: Mapping[int, Mapping[float | None, list[int]]],
    folder: Path,
) -> list[str]:
    """Writes the plots of what is there as PNG files into `folder` and returns their names.

    lines: of `hinton_report`'s table. by_width: errors of every seed by units and temperature, None for those alone.
    """
    drawn = {"rows.png": _rows(lines)} if lines else {}
    drawn |= {"temperature.png": _temperature(by_width)} if by_width else {}
    moved = [name for name in ("no3", "only78") if name in found]
    drawn |= {"bias.png": _bias(found, moved, plan)} if moved else {}
    return save_figures(drawn, folder)


def _rows(lines: Sequence[Any]) -> Any:
    figure = new_figure(figsize=(9, 1.4 + 0.5 * len(lines)))
    axis = figure.subplots()
    for place, line in enumerate(lines):
        spots = place + (np.linspace(-0.18, 0.18, len(line.errors)) if len(line.errors) > 1 else np.zeros(1))
        axis.scatter(line.errors, spots, s=14, color="0.6", label="one seed" if place == 0 else None)
        label = "our mean" if place == 0 else None
        axis.plot(np.mean(line.errors), place, "|", color=_COLOURS[0], markersize=20, markeredgewidth=3, label=label)
        if line.paper is not None:
            label = "paper (one run)" if place == 0 else None
            axis.plot(line.paper, place, "D", color=_COLOURS[1], markersize=7, label=label)
    axis.set(xscale="log", xlabel="test errors", yticks=range(len(lines)), ylim=(len(lines) - 0.5, -0.5))
    axis.set_yticklabels([f"{line.row}: {line.setup}" for line in lines], fontsize=8)
    low, high = axis.get_xlim()
    plain_numbers(axis.xaxis, "25" if high >= 10 * low else "23456789")
    axis.grid(axis="x", which="both", alpha=0.25)
    axis.legend(fontsize=8, markerscale=0.6)
    return figure


def _temperature(by_width: Mapping[int, Mapping[float | None, list[int]]]) -> Any:
    figure = new_figure(figsize=(4.2 * len(by_width) + 0.5, 4.2))
    for axis, (units, own) in zip(np.ravel(figure.subplots(1, len(by_width))), by_width.items(), strict=True):
        alone = np.asarray(own[None], np.float64)
        half = half_width(alone)
        axis.axhline(alone.mean(), color=_BLACK, linewidth=1, label="alone")
        axis.axhspan(alone.mean() - half, alone.mean() + half, color=_BLACK, alpha=0.15, linewidth=0)
        at = [t for t in own if t is not None]
        means = [np.mean(own[t]) for t in at]
        halves = [half_width(own[t]) for t in at]
        axis.errorbar(at, means, yerr=halves, fmt="o-", color=_COLOURS[1], capsize=4, linewidth=1, label="distilled")
        axis.set(xscale="log", xlabel="temperature", ylabel="test errors", xticks=at, title=f"{units} units a layer")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    # Below, where it hides no interval.
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle("Means and their 95 % intervals over the seeds", fontsize=10)
    return figure


def _bias(found: Results, names: list[str], plan: Plan) -> Any:
    figure = new_figure(figsize=(5 * len(names), 4.2))
    what = {"no3": f"no {plan.left_out}s", "only78": f"only {' and '.join(map(str, plan.only))}"}
    classes = {"no3": f"{plan.left_out}", "only78": " and ".join(map(str, plan.only))}
    for axis, name in zip(np.ravel(figure.subplots(1, len(names))), names, strict=True):
        moved = [run["moved"] for run in found[name]["runs"]]
        axis.plot(CURVE, np.mean([one["curve"] for one in moved], axis=0), color=_BLACK, linewidth=1.5)
        for way, colour in (("test", _COLOURS[1]), ("training", _COLOURS[0])):
            offsets, errors = ([one[way][key] for one in moved] for key in ("offset", "errors"))
            where = "the test set" if way == "test" else "training images"
            axis.plot(offsets, errors, "o", color=colour, markersize=4, label=f"chosen on {where}, each seed")
        axis.plot(PAPER[name]["offset"], PAPER[name]["moved"], "D", color=_COLOURS[2], label="paper (one run)")
        axis.set(yscale="log", xlabel=f"added to the bias of {classes[name]}", ylabel="test errors")
        axis.set_title(f"{what[name]} in the transfer set, mean of {len(moved)} seeds", fontsize=10)
        plain_numbers(axis.yaxis)
        axis.grid(which="both", alpha=0.25)
        axis.legend(fontsize=8)
    return figure
