"""Plots of an experiment: how the training went, what distillation changed, and which digits only the teacher knows."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from kd_jax.data.dataset import Dataset
from kd_jax.experiments.notebook.experiment import TITLES, Result, models
from kd_jax.experiments.shell.folder import write_whole
from kd_jax.stats import Comparison

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = {"teacher": "#000000", "student": "#0072B2", "distilled": "#D55E00"}
# The two students' curves may lie on each other.
_STYLES = {"teacher": "-", "student": "-", "distilled": "--"}
_MOST_IMAGES = 24


def write(result: Result, dataset: Dataset, folder: Path) -> list[str]:
    """Writes the plots as PNG files into `folder` and returns their names."""
    students = np.concatenate([result.student.answers, result.distilled.answers])
    pairs = np.stack([result.student.evaluations.correct, result.distilled.evaluations.correct])
    drawn = {
        "learning-curves.png": _learning_curves(result),
        "comparison.png": _comparison(pairs, result.comparison, result.teacher.answers.shape[1]),
        "digits.png": _digits(students, result.teacher.answers[0], dataset),
    }
    return save_figures(drawn, folder)


def save_figures(drawn: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes figures as PNG files, by their names, and returns these."""
    for name, figure in drawn.items():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
        write_whole(folder / name, content.getvalue())
    return list(drawn)


def plain_numbers(axis: Any, digits: str = "25") -> None:
    """Numbers without powers on an axis that is logarithmic. digits: those whose multiples between powers are told."""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(lambda value, _: f"{value:,.10g}" if f"{value:e}"[0] in digits else "")


def new_figure(**size: Any) -> Any:
    """An empty figure, without a display."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **size)


def _learning_curves(result: Result) -> Any:
    figure = new_figure(figsize=(10, 4.2))
    axes = figure.subplots(1, 2)
    for name, trained in models(result).items():
        if trained.history is None:
            continue
        marker = "o" if len(trained.epochs) == 1 else None
        # The square of a loss that grows may be beyond float32.
        wrong = 100 * (1 - np.asarray(trained.history.accuracy, np.float64))
        panels = (np.asarray(trained.history.cross_entropy, np.float64), wrong)
        for axis, values in zip(axes, panels, strict=True):
            mean = values.mean(axis=0)
            axis.plot(
                trained.epochs,
                mean,
                color=_COLOURS[name],
                label=TITLES[name],
                linestyle=_STYLES[name],
                marker=marker,
                linewidth=1.5,
            )
            if len(values) > 1:
                sd = values.std(axis=0, ddof=1)
                low = np.maximum(mean - sd, values.min(axis=0))
                axis.fill_between(trained.epochs, low, mean + sd, color=_COLOURS[name], alpha=0.2, linewidth=0)
    for axis, title in zip(axes, ("cross entropy (nats)", "wrong (%)"), strict=True):
        axis.set(xlabel="epoch", ylabel=title, yscale="log", xlim=(0, None))
        low, high = axis.get_ylim()
        plain_numbers(axis.yaxis, "246" if high >= 10 * low else "23456789")
        axis.grid(which="both", alpha=0.25)
        axis.legend()
    seeds = len(result.student.seeds)
    band = f", mean and ± sd of {seeds} seeds" if seeds > 1 else ""
    config = result.config
    drops = config.teacher is None and max(config.teacher_dropout, config.teacher_input_dropout) > 0
    noise = " (the teacher trains with its dropout)" if drops and result.teacher.history is not None else ""
    figure.suptitle(f"Training batches, before each update{band}{noise}", fontsize=11)
    return figure


def _comparison(pairs: Int[np.ndarray, "2 seeds"], comparison: Comparison, tests: int) -> Any:
    """From the correct test images of each seed, alone and distilled."""
    figure = new_figure(figsize=(9, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.plot([0, 1], pairs, color="0.6", linewidth=1, marker="o", markersize=4, zorder=1)
    for x, name in enumerate(("student", "distilled")):
        left.plot(x, pairs[x].mean(), marker="_", markersize=36, markeredgewidth=3, color=_COLOURS[name], zorder=2)
    left.set(xticks=[0, 1], xticklabels=["student alone", "distilled student"], xlim=(-0.4, 1.4))
    left.set(ylabel=f"correct of {tests:,} test images")
    left.set_title("each line one seed, bars their means", fontsize=10)
    left.grid(axis="y", alpha=0.25)
    right.axhline(0, color="0.4", linewidth=1)
    differences = pairs[1] - pairs[0]
    spots = np.linspace(-0.12, 0.12, len(differences)) if len(differences) > 1 else np.zeros(1)
    right.scatter(spots, differences, color="0.6", s=16, label="one seed")
    mean = comparison.mean_difference
    if comparison.ci95 is None:
        right.plot(0.4, mean, "o", color=_COLOURS["distilled"], label="mean")
    else:
        spread = [[mean - comparison.ci95[0]], [comparison.ci95[1] - mean]]
        colour = _COLOURS["distilled"]
        right.errorbar(0.4, mean, yerr=spread, fmt="o", color=colour, capsize=6, label="mean, 95 % interval")
    right.set(xlim=(-0.4, 0.8), xticks=[], ylabel="distilled minus alone (images)")
    right.set_title("the difference", fontsize=10)
    right.grid(axis="y", alpha=0.25)
    # Below, where it hides no seed.
    right.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, frameon=False)
    return figure


def _digits(students: Int[np.ndarray, "students tests"], teacher: Int[np.ndarray, " tests"], dataset: Dataset) -> Any:
    """From the answers of all students and of the teacher."""
    labels = dataset.test_labels
    wrong = (students != labels).sum(axis=0) * (teacher == labels)
    chosen = np.argsort(-wrong, kind="stable")[:_MOST_IMAGES]
    chosen = chosen[wrong[chosen] > 0]
    if len(chosen) == 0:
        figure = new_figure(figsize=(6, 1.5))
        figure.suptitle("There is no test image that the teacher gets right and a student gets wrong.", fontsize=10)
        return figure
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(figsize=(max(6.5, 1.35 * columns), 1.75 * rows + 0.7))
    # One pair of axes for all, in units of a side of an image, as Matplotlib lays out one for each slowly.
    axis = figure.subplots()
    height, width = dataset.test_images.shape[1:3]
    # A row of features would be a line of one pixel's width.
    across, down = (1.0, 1.0) if 1 in (height, width) else np.array([width, height]) / max(width, height)
    for place, index in enumerate(chosen):
        image = dataset.test_images[index]
        x, y = 1.07 * (place % columns), 1.4 * (place // columns)
        corners = (x - across / 2, x + across / 2, y + down / 2, y - down / 2)
        axis.imshow(image[..., 0] if image.shape[-1] != 3 else image, cmap="gray_r", vmin=0, vmax=255, extent=corners)
        mistakes = students[:, index][students[:, index] != labels[index]]
        said = np.bincount(mistakes).argmax()
        words = f"{labels[index]}, seen as {said}\nby {wrong[index]} of {len(students)}"
        axis.text(x, y - down / 2 - 0.04, words, fontsize=9, ha="center", va="bottom")
    axis.set(xlim=(-0.54, 1.07 * columns - 0.53), ylim=(1.4 * rows - 0.86, -0.86), aspect="equal")
    axis.axis("off")
    total = int((wrong > 0).sum())
    figure.suptitle(
        f"Where the teacher is right and most students are wrong ({len(chosen)} of the {total:,} where any is):\n"
        "the label, the students' usual answer, and how many of all students are wrong",
        fontsize=10,
    )
    return figure
