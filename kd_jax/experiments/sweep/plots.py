"""Plots of a sweep: a heat map of two options with the baseline marked, and every measure against the temperature."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax import stats
from kd_jax.experiments.notebook.config import Config
from kd_jax.experiments.notebook.plots import new_figure, save_figures
from kd_jax.experiments.sweep import grid
from kd_jax.experiments.sweep.grid import ALONE, SMOOTHED, Setting
from kd_jax.experiments.sweep.search import Gain, SweepResult, rank

_MEASURES: dict[str, Callable[[Any], Any]] = {
    "errors": lambda e: e.errors,
    "negative log-likelihood (nats)": lambda e: e.nll,
    "calibration error (%)": lambda e: 100 * e.ece,
    "agrees with the teacher (%)": lambda e: 100 * e.teacher_agreement,
    "KL to the teacher (nats)": lambda e: e.kl_to_teacher,
}
# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BASELINES = {ALONE: ("black", "alone"), SMOOTHED: ("gray", "smoothed labels")}
# Inches of a side; Matplotlib draws no larger image than 2^16 points.
_LARGEST = 60.0
_WIDTH = "student_hidden"
# Values that are nearer to each other than this share of the axis are drawn at equal distances.
_NEAREST = 0.05
# Lines stand apart by this share of the axis, and all of them within this share of the gap between two values.
_BESIDE, _OF_A_GAP = 0.012, 0.6
# Matplotlib finds no limits for an axis with numbers near the ends of what a float can hold.
_LARGEST_NUMBER = 1e30
_LABELS = 20
# No measure is beyond these, however wide the interval of few seeds; errors have the number of images.
_HIGHEST = {"calibration error (%)": 100.0, "agrees with the teacher (%)": 100.0}
_ORDER = ("temperature", "alpha", "learning_rate", "epochs", "batch_size", "shift")


def write(found: SweepResult, folder: Path) -> list[str]:
    """Writes the plots as PNG files into `folder` and returns their names; none for a single setting.

    Of several students each has its own, as the best setting of all would show the widest alone, and there is one of
    them together.
    """
    drawn = {}
    widths = found.grid.lists.get(_WIDTH, ())
    for width in widths or (None,):
        one = found if width is None else _of(found, width)
        own, axes = "" if width is None else _name(width, widths), _axes(one)
        if axes and one.gains:
            drawn[f"heat-map{own}.png"] = _heat_map(one, axes)
            drawn[f"{axes[0].replace('_', '-')}{own}.png"] = _curves(one, axes)
    if widths:
        drawn[f"{_WIDTH.replace('_', '-')}.png"] = _curves(found, [_WIDTH, *_axes(_of(found, widths[0]))])
    return save_figures(drawn, folder)


def remove_older(folder: Path) -> None:
    """Plots that an earlier sweep left, which would seem to belong to this one. Raises `OSError`."""
    options = "|".join(name.replace("_", "-") for name in Config.__dataclass_fields__ if name not in grid.SINGLE)
    ours = re.compile(rf"(heat-map|{options})(-of)?(-\d+)*\.png")
    for path in folder.glob("*.png"):
        if ours.fullmatch(path.name):
            path.unlink()


def _name(width: tuple[int, ...], widths: Sequence[tuple[int, ...]]) -> str:
    """A width in a file's name; `-of-` and its place in the list where that would be long."""
    return "-" + ("-".join(map(str, width)) if len(width) <= 8 else f"of-{widths.index(width) + 1}")


def _of(found: SweepResult, width: tuple[int, ...]) -> SweepResult:
    """What was found of the students of one width, as if no other had been asked for."""
    lists = {name: values for name, values in found.grid.lists.items() if name != _WIDTH}
    return found._replace(
        grid=found.grid._replace(lists=lists),
        students={s: measured for s, measured in found.students.items() if s.config.student_hidden == width},
        gains={s: gains for s, gains in found.gains.items() if s.config.student_hidden == width},
        chosen=tuple(s for s in found.chosen if s.config.student_hidden == width),
    )


def _axes(found: SweepResult) -> list[str]:
    """The listed options, those that one looks at first before the others."""
    known = [name for name in _ORDER if name in found.grid.lists]
    return known + [name for name in found.grid.lists if name not in known]


def _heat_map(found: SweepResult, axes: list[str]) -> Any:
    """Errors over the first two options; of the settings that agree in both, the best."""
    lists = found.grid.lists
    across, down = _in_order(lists[axes[0]]), _in_order(lists[axes[1]]) if len(axes) > 1 else (None,)
    # Empty where every setting diverged.
    errors = np.full((len(down), len(across)), np.nan)
    best: dict[tuple[int, int], Setting] = {}
    for setting in sorted(found.gains, key=lambda s: rank(found.students[s]), reverse=True):
        config = setting.config
        row = down.index(getattr(config, axes[1])) if len(axes) > 1 else 0
        place = (row, across.index(getattr(config, axes[0])))
        errors[place], best[place] = float(np.mean(found.students[setting].errors)), setting
    size = (max(6.0, 1.1 * len(across) + 3.5), max(3.2, 0.65 * len(down) + 2.2))
    drawn = new_figure(figsize=[min(one, _LARGEST) for one in size])
    axis = drawn.subplots()
    image = axis.imshow(errors, cmap="viridis_r", aspect="auto")
    marked: dict[str, tuple[float, str]] = {}
    for kind, (colour, word) in _BASELINES.items():
        means = [float(np.mean(found.students[s].errors)) for s in found.students if s.kind == kind]
        if means:
            marked[word] = (min(means), colour)
    shown = [*errors[np.isfinite(errors)], *(mean for mean, _ in marked.values())]
    margin, middle = 0.05 * (max(shown) - min(shown)) or 1.0, (min(shown) + max(shown)) / 2
    image.set_clim(min(shown) - margin, max(shown) + margin)
    for place, setting in best.items():
        marks = "".join(_mark(gain.comparison) for gain in found.gains[setting] if gain.baseline.kind == ALONE)
        colour = "black" if errors[place] < middle else "white"
        axis.text(place[1], place[0], f"{errors[place]:.1f}{marks}", ha="center", va="center", color=colour, fontsize=9)
    for place in (place for place, setting in best.items() if setting in found.chosen):
        axis.add_patch(_frame(place))
    axis.set(xticks=range(len(across)), xticklabels=[grid.shown(v) for v in across], xlabel=grid.words(axes[0]))
    if len(axes) > 1:
        axis.set(yticks=range(len(down)), yticklabels=[grid.shown(v) for v in down], ylabel=grid.words(axes[1]))
    else:
        axis.set(yticks=[])
    bar = drawn.colorbar(image, ax=axis, label="errors on the development split")
    for mean, colour in marked.values():
        bar.ax.axhline(mean, color=colour, linewidth=2.5)
    ends = ", ".join(f"{word} {mean:.1f} ({colour})" for word, (mean, colour) in marked.items())
    more = f", the best of {', '.join(map(grid.words, axes[2:]))}" if len(axes) > 2 else ""
    seeds = found.grid.base.seeds
    errors_of = f"mean errors of {seeds} seeds" if seeds > 1 else "errors of 1 seed"
    drawn_marks = any(text.get_text().endswith(("▲", "▼")) for text in axis.texts)
    marks_explained = "\n▲ a gain on the student alone, ▼ a loss (95 %, corrected)" if drawn_marks else ""
    drawn.suptitle(
        f"Students {_student(found)}: {errors_of}{more}; framed: tested\n"
        f"lines in the bar, the best baselines: {ends}{marks_explained}",
        fontsize=9,
    )
    return drawn


def _mark(comparison: stats.Comparison) -> str:
    if comparison.ci95 is None:
        return ""
    return " ▲" if comparison.ci95[0] > 0 else " ▼" if comparison.ci95[1] < 0 else ""


def _frame(place: tuple[int, int]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((place[1] - 0.48, place[0] - 0.46), 0.96, 0.92, fill=False, edgecolor="#D55E00", linewidth=2.5)


def _curves(found: SweepResult, axes: list[str]) -> Any:
    """Every measure, and the gain, against the first option, a line for each value of the second."""
    first, lists = axes[0], found.grid.lists
    values = _in_order(lists[first])
    at, log = _places(values)
    lines = _in_order(lists[axes[1]]) if len(axes) > 1 else (None,)
    drawn = new_figure(figsize=(13, 7.5))
    panels = drawn.subplots(2, 3).ravel()
    titles = [*_MEASURES, "gain on alone (images)"]
    for panel, title in zip(panels, titles, strict=True):
        _axis(panel, at, [grid.shown(value) for value in values], log=log)
        panel.set(xlabel=grid.words(first), ylabel=title)
        panel.grid(alpha=0.25)
    measured = [(panel, title, _MEASURES[title]) for panel, title in zip(panels, _MEASURES, strict=False)]
    highest = _HIGHEST | {"errors": float(found.examples[1])}
    shown = lines[: len(_COLOURS)]
    # Baselines do not depend on how a student is distilled, and do on how it is trained.
    bands = grid.of_the_distillation(first)
    beside_each_other = _beside(at, len(shown) + (0 if bands else len(_BASELINES)), log=log)
    for beside, line, colour in zip(beside_each_other, shown, _COLOURS, strict=False):
        best = {x: _best_at(found, axes, value, line) for x, value in zip(beside, values, strict=True)}
        chosen = {x: setting for x, setting in best.items() if setting}
        label = "distilled" if line is None else f"{grid.words(axes[1])} {grid.shown(line)}"
        for panel, title, measure in measured:
            known = [measure(found.students[s]) for s in chosen.values()]
            _line(panel, list(chosen), known, colour, label, highest.get(title, math.inf))
        _gains(panels[-1], {x: found.gains[s] for x, s in chosen.items()}, colour)
    for place, (kind, (colour, word)) in enumerate(_BASELINES.items(), start=len(shown)):
        students = [s for s in found.students if s.kind == kind]
        overall = _best(found, students)
        by_value = {
            x: _best(found, [s for s in students if getattr(s.config, first) == value])
            for x, value in zip(at if bands else beside_each_other[place], values, strict=True)
        }
        chosen = {x: setting for x, setting in by_value.items() if setting}
        for panel, title, measure in measured:
            top = highest.get(title, math.inf)
            if overall and bands:
                _band(panel, measure(found.students[overall]), colour, word, top)
            elif overall:
                known = [measure(found.students[s]) for s in chosen.values()]
                _line(panel, list(chosen), known, colour, word, top, linestyle="--")
    panels[-1].axhline(0, color="0.4", linewidth=1)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=10)
    more = f"; best over {', '.join(map(grid.words, axes[2:]))}" if len(axes) > 2 else ""
    if len(lines) > len(_COLOURS):
        more += f"; the first {len(_COLOURS)} of {len(lines)} values of {grid.words(axes[1])}"
    who = "" if first == _WIDTH else f", students {_student(found)}"
    drawn.suptitle(
        f"Development split{who}: {_seeds(found)}{more}",
        fontsize=11,
    )
    return drawn


def _in_order(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers from the smallest on, whatever the order that they were given in; else as they are."""
    return tuple(sorted(values)) if all(isinstance(value, int | float) for value in values) else values


def _places(values: tuple[Any, ...]) -> tuple[list[float], bool]:
    """Where ordered values stand on the axis, and whether that is logarithmic; at equal distances if they crowd."""
    if all(isinstance(value, int | float) for value in values):
        log = values[0] > 0 and values[-1] >= 8 * values[0]
        if max(map(abs, values)) > _LARGEST_NUMBER or (log and values[0] < 1 / _LARGEST_NUMBER):
            return _equally(values)
        scaled = np.log(values) if log else np.asarray(values, np.float64)
        if np.diff(scaled).min(initial=math.inf) >= _NEAREST * (scaled[-1] - scaled[0]):
            return [float(value) for value in values], log
    return _equally(values)


def _equally(values: tuple[Any, ...]) -> tuple[list[float], bool]:
    return [float(place) for place in range(len(values))], False


def _beside(at: list[float], lines: int, *, log: bool) -> list[list[float]]:
    """For each of several lines, places on the axis moved by a little, so that their bars do not hide each other."""
    scaled = np.log(at) if log else np.asarray(at)
    length = scaled[-1] - scaled[0] or 1.0
    step = min(_BESIDE * length, _OF_A_GAP * np.diff(scaled).min(initial=length) / lines)
    moved = [scaled + step * (place - (lines - 1) / 2) for place in range(lines)]
    return [(np.exp(one) if log else one).tolist() for one in moved]


def _axis(panel: Any, at: list[float], labels: list[str], *, log: bool) -> None:
    """Limits come first: of a logarithmic axis on which nothing is drawn there would be none."""
    if log:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter("")
        beyond = (at[-1] / at[0]) ** 0.05
        panel.set_xlim(at[0] / beyond, at[-1] * beyond)
    else:
        beyond = 0.05 * (at[-1] - at[0]) or 0.5
        panel.set_xlim(at[0] - beyond, at[-1] + beyond)
    every = -(-len(at) // _LABELS)
    panel.set_xticks(at[::every], labels[::every])
    if sum(len(label) + 1 for label in labels[::every]) > 40:
        panel.tick_params(axis="x", labelrotation=90)


def _seeds(found: SweepResult) -> str:
    """What is drawn, of how many seeds."""
    seeds = found.grid.base.seeds
    if seeds == 1:
        return "1 seed, without intervals"
    return f"means of {seeds} seeds, 95 % intervals (bars, bands), those of the gain corrected"


def _best(found: SweepResult, settings: list[Setting]) -> Setting | None:
    return min(settings, key=lambda s: rank(found.students[s])) if settings else None


def _gains(panel: Any, gains: dict[float, list[Gain]], colour: str) -> None:
    """On the student alone, where that did not diverge."""
    known = {x: g.comparison for x, several in gains.items() for g in several if g.baseline.kind == ALONE}
    means = [one.mean_difference for one in known.values()]
    halves = [one.margin or 0.0 for one in known.values()]
    panel.errorbar(list(known), means, yerr=halves, color=colour, marker="o", markersize=4, capsize=3, linewidth=1.3)


def _best_at(found: SweepResult, axes: list[str], value: Any, line: Any) -> Setting | None:
    """The setting with the fewest errors among those with these values of the first two options."""
    fitting = [
        setting
        for setting in found.gains
        if getattr(setting.config, axes[0]) == value and (line is None or getattr(setting.config, axes[1]) == line)
    ]
    return _best(found, fitting)


def _line(
    panel: Any, at: list[float], values: list[Any], colour: str, label: str, highest: float, linestyle: str = "-"
) -> None:
    means = [float(np.mean(one)) for one in values]
    halves = [stats.half_width(one) for one in values]
    # No measure is below 0, however wide the interval of few seeds.
    below = [min(half, mean) for half, mean in zip(halves, means, strict=True)]
    above = [min(half, max(0.0, highest - mean)) for half, mean in zip(halves, means, strict=True)]
    panel.errorbar(
        at, means, yerr=[below, above], color=colour, label=label, linestyle=linestyle, marker="o", markersize=4,
        capsize=3, linewidth=1.3,
    )  # fmt: skip


def _band(panel: Any, values: Any, colour: str, label: str, highest: float) -> None:
    mean, half = float(np.mean(values)), stats.half_width(values)
    panel.axhline(mean, color=colour, linestyle="--", linewidth=1.3, label=label)
    panel.axhspan(max(0.0, mean - half), max(mean, min(highest, mean + half)), color=colour, alpha=0.12, linewidth=0)


def _student(found: SweepResult) -> str:
    """The width of the students, where all have one."""
    return grid.shown(next(iter(found.gains)).config.student_hidden)
