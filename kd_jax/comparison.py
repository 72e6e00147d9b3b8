"""What a comparison of methods found: a table with paired intervals, its files, and its plots."""

import difflib
import html
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tabulate import tabulate

from kd_jax.errors import ConfigError, DataError, OutputError
from kd_jax.files.written import without_infinities, write_whole
from kd_jax.stats import Comparison, digits_that_tell, half_width, paired_comparison, summarise

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
_LEFT, _RIGHT = "text-align: left", "text-align: right"
_NUMBER = f"{_RIGHT}; white-space: nowrap"
_PER_CENT = ("accuracy", "agreement", "ece")


@dataclass(frozen=True)
class Table:
    """Methods over the same seeds, each compared with the first, pair by pair.

    measure: what is compared, and higher: whether more of it is better. values: by method and measure, `[seeds]`.
    history: by method and metric, `[seeds, epochs]`, of the training batches. chosen: of a grid, the method that was
    chosen on the development split. parameters: trained numbers of one student. seconds: of each method's trainings.
    teacher: its own measures on the test data. looked_at: how many comparisons the intervals are corrected for.
    teacher_parameters: trained numbers of the teacher; None where they are not known, as of a function or a file.
    settings: how it was trained, as JSON holds it.
    """

    measure: str
    higher: bool
    seeds: tuple[int, ...]
    values: Mapping[str, Mapping[str, Float[np.ndarray, " seeds"]]]
    history: Mapping[str, Mapping[str, Float[np.ndarray, "seeds epochs"]]]
    chosen: Mapping[str, str]
    parameters: int
    seconds: Mapping[str, float]
    teacher: Mapping[str, float]
    looked_at: int
    teacher_parameters: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """Every method but the first against the first."""
        first, *others = self.values
        before = self.values[first][self.measure]
        return {
            name: paired_comparison(
                before, self.values[name][self.measure], metric=self.measure, comparisons=self.looked_at
            )
            for name in others
        }

    def conclusion(self, name: str) -> str:
        """In a sentence, what a method changed against the first. Raises `ConfigError` for another name."""
        compared, first = self.comparisons, next(iter(self.values))
        if name not in compared:
            near = difflib.get_close_matches(name.lower(), compared, 1, 0)
            names = ", ".join(near + [one for one in compared if one not in near]) or "none"
            raise ConfigError(f"no method {name!r} is compared with {first!r}: use one of {names}")
        found = compared[name]
        change = f"{name} changed {self.measure.replace('_', ' ')} by {self._interval(found)} against {first}"
        if found.ci95 is None:
            reason = "one seed has no interval" if found.n < 2 else "the differences are too alike for an interval"
            if not np.isfinite(found.mean_difference):
                reason = "a seed's value is not finite"
            return f"{change}: {reason}."
        change += f" (95 % interval, {found.n} seeds)"
        low, high = found.ci95 if self.higher else (-found.ci95[1], -found.ci95[0])
        if low > 0:
            return f"{change}: a gain."
        return f"{change}: a loss." if high < 0 else f"{change}: no evidence of a difference."

    def rows(self) -> list[list[str]]:
        """The cells of the table, its header first."""
        names = list(next(iter(self.values.values())))
        # How many are right and wrong is what the accuracy says, too.
        hidden = ("correct", "errors", self.measure) if "accuracy" in names else (self.measure,)
        names = [self.measure, *(name for name in names if name not in hidden)]
        first = next(iter(self.values))
        rows = [["", *map(self._title, names), f"{self._title(self.measure)} against {first}", "seconds a seed"]]
        for method, measured in self.values.items():
            cells = [self._spread(name, measured[name]) for name in names]
            compared = "" if method == first else self._interval(self.comparisons[method])
            label = f"{method} ({self.chosen[method]})" if method in self.chosen else method
            rows.append([label, *cells, compared, f"{self.seconds[method] / len(self.seeds):.2f}"])
        if self.teacher:
            cells = [self._one(name, self.teacher[name]) if name in self.teacher else "" for name in names]
            rows.append(["teacher", *cells, "", ""])
        return rows

    def __str__(self) -> str:
        """The table and its conclusions, for a terminal."""
        return self._text("simple")

    __repr__ = __str__

    def markdown(self) -> str:
        """The table and its conclusions as Markdown."""
        return self._text("pipe")

    def _repr_html_(self) -> str:
        def row(cells: list[str], tag: str) -> str:
            # Notebooks align to the right, and break a cell at ±.
            styles = [_LEFT, *[_NUMBER if tag == "td" else _RIGHT] * (len(cells) - 1)]
            written = zip(cells, styles, strict=True)
            return "".join(f'<{tag} style="{style}">{html.escape(cell)}</{tag}>' for cell, style in written)

        header, *rows = self.rows()
        body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
        said = [*map(self.conclusion, self.comparisons), self._note()]
        below = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in said)
        return f"<table><thead><tr>{row(header, 'th')}</tr></thead><tbody>{body}</tbody></table>{below}"

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it: None for a number that is not finite."""
        content = {
            "measure": self.measure, "higher_is_better": self.higher, "seeds": list(self.seeds),
            "settings": dict(self.settings),
            "methods": {
                method: {
                    "chosen": self.chosen.get(method), "seconds": self.seconds[method],
                    "runs": [
                        {"seed": seed} | {name: float(values[place]) for name, values in measured.items()}
                        for place, seed in enumerate(self.seeds)
                    ],
                    "history": {name: values.tolist() for name, values in self.history[method].items()},
                }
                for method, measured in self.values.items()
            },
            "comparisons": {name: found._asdict() for name, found in self.comparisons.items()},
            "conclusions": [self.conclusion(name) for name in self.comparisons],
            "corrected_for": self.looked_at, "parameters": self.parameters, "teacher": dict(self.teacher),
            "teacher_parameters": self.teacher_parameters,
        }  # fmt: skip
        return dict(without_infinities(content))

    def figures(self) -> dict[str, Any]:
        """Matplotlib's figures by name: `comparison` (pairs, and intervals), `learning-curves`, and `size`."""
        return {"comparison": self._draw_pairs(), "learning-curves": self._draw_curves(), "size": plot_sizes([self])}

    def save(self, folder: str | Path) -> list[Path]:
        """Writes results.json, results.md and the figures, as PNG, into `folder`. Raises `OutputError`."""
        place = Path(folder).expanduser()
        try:
            place.mkdir(parents=True, exist_ok=True)
            write_whole(place / "results.md", f"{self.markdown()}\n".encode())
            drawn = {f"{name}.png": figure for name, figure in self.figures().items()}
            for name, figure in drawn.items():
                write_whole(place / name, _as_png(figure, dpi=130))
            text = json.dumps(self.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            write_whole(place / "results.json", text.encode())
        except DataError as error:
            raise OutputError(str(error)) from None
        except OSError as error:
            raise OutputError(f"{place} takes no files ({error.strerror or error}): choose another folder") from None
        return [place / name for name in ("results.json", "results.md", *drawn)]

    def _text(self, style: str) -> str:
        header, *rows = self.rows()
        align = ("left", *("right" for _ in header[1:]))
        table = tabulate(rows, header, tablefmt=style, colalign=align, disable_numparse=True)
        said = [self.conclusion(name) for name in self.comparisons]
        return "\n\n".join([table, *said, self._note()])

    def _note(self) -> str:
        if len(self.seeds) == 1:
            return f"One seed has no standard deviation and no interval. A student has {self.parameters:,} parameters."
        text = f"± in the table is the standard deviation over {len(self.seeds)} seeds; intervals are of paired "
        text += "differences"
        text += f", corrected for {self.looked_at} comparisons" if self.looked_at > 1 else ""
        return f"{text}. A student has {self.parameters:,} parameters."

    def _title(self, name: str) -> str:
        return f"{name.replace('_', ' ')} (%)" if name in _PER_CENT else name.replace("_", " ")

    def _form(self, name: str) -> tuple[float, str]:
        if name in _PER_CENT:
            return 100.0, ".2f"
        return (1.0, ".0f") if name in ("errors", "correct") else (1.0, ".4g")

    def _spread(self, name: str, values: Float[np.ndarray, " seeds"]) -> str:
        factor, form = self._form(name)
        found = summarise(values * factor)
        mean = format(found.mean, form)
        return mean if found.sd is None else f"{mean} ± {format(found.sd, '.2g' if form == '.4g' else form)}"

    def _one(self, name: str, value: float) -> str:
        factor, form = self._form(name)
        return format(value * factor, form)

    def _interval(self, found: Comparison) -> str:
        """Mean ± half-width, with as many digits as tell whether 0 is in the interval."""
        factor, form = self._form(self.measure)
        fewest = {".2f": 2, ".0f": 1}.get(form) or _decimals(found)
        digits = digits_that_tell(found, fewest, factor)
        if form == ".4g" and digits == fewest:
            mean, margin = format(found.mean_difference, "+.4g"), found.margin and format(found.margin, ".4g")
        else:
            mean = f"{found.mean_difference * factor:+.{max(0, digits)}f}"
            margin = None if found.margin is None else f"{found.margin * factor:.{max(0, digits)}f}"
        unit = " points" if factor == 100 else ""
        return f"{mean}{unit}" if margin is None else f"{mean} ± {margin}{unit}"

    def _draw_pairs(self) -> Any:
        figure = _new_figure(3 + 1.4 * len(self.values), 4.2)
        left, right = figure.subplots(1, 2)
        factor, _ = self._form(self.measure)
        names = list(self.values)
        points = np.stack([self.values[name][self.measure] * factor for name in names])
        for seed in points.T:
            left.plot(range(len(names)), seed, color="#999999", linewidth=0.8, marker="o", markersize=4)
        left.plot(range(len(names)), points.mean(axis=1), color="#D55E00", marker="D", linestyle="none")
        left.set_xticks(range(len(names)), names, rotation=20, ha="right")
        left.set_xlim(-0.4, len(names) - 0.6)
        left.set_ylabel(self._title(self.measure))
        left.set_title("each seed, and the mean", fontsize=10)
        for place, found in enumerate(self.comparisons.values()):
            colour = _COLOURS[(place + 1) % len(_COLOURS)]
            margin = None if found.margin is None else found.margin * factor
            right.errorbar(place, found.mean_difference * factor, yerr=margin, fmt="o", capsize=5, color=colour)
        right.axhline(0, color="black", linewidth=0.8)
        right.set_xticks(range(len(self.comparisons)), list(self.comparisons), rotation=20, ha="right")
        right.set_xlim(-0.6, max(0.6, len(self.comparisons) - 0.4))
        right.set_ylabel("points" if factor == 100 else self._title(self.measure))
        corrected = ", corrected" if self.looked_at > 1 else ""
        right.set_title(f"difference to {names[0]}\n95 % interval{corrected}", fontsize=10)
        for panel in (left, right):
            panel.grid(axis="y", alpha=0.25)
        return figure

    def _draw_curves(self) -> Any:
        shown = [name for name in ("loss", "accuracy") if all(name in history for history in self.history.values())]
        figure = _new_figure(4.8 * len(shown), 4.0)
        for panel, metric in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
            factor, _ = self._form(metric)
            for place, (name, history) in enumerate(self.history.items()):
                values = np.asarray(history[metric], np.float64) * factor
                epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(axis=0)
                colour = _COLOURS[place % len(_COLOURS)]
                panel.plot(epochs, mean, color=colour, label=name, marker="o" if len(epochs) == 1 else None)
                if len(values) > 1:
                    sd = values.std(axis=0, ddof=1)
                    panel.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
            lines = np.concatenate([line.get_ydata() for line in panel.lines])
            if metric == "loss" and 0 < 20 * lines.min() < lines.max():
                panel.set_yscale("log")  # methods whose losses have another size
            panel.set_xlabel("epoch")
            panel.set_ylabel(self._title(metric))
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.25)
        panel.legend()
        band = f", mean ± standard deviation of {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        figure.suptitle(f"training batches{band}", fontsize=10)
        return figure


def _decimals(found: Comparison) -> int:
    """Those of four digits, of the larger of mean and half-width; of 12,345 that is -1."""
    largest = max(abs(found.mean_difference), found.margin or 0)
    return 3 - math.floor(math.log10(largest)) if 0 < largest < math.inf else 0


def plot_sizes(tables: Iterable[Table]) -> Any:
    """A figure of Matplotlib: the measure of each method against the number of parameters, and of the teacher.

    tables: of `compare`, one for each student. Bars are 95 % intervals of the mean over the seeds, by Student's t. A
        teacher whose size is not known is a line. Raises `ConfigError` where the tables have not the same measure.
    """
    several = sorted(tables, key=lambda table: table.parameters)
    found = sorted({table.measure for table in several})
    if len(found) != 1:
        raise ConfigError(
            f"the tables compare {' and '.join(found) or 'nothing'}: give at least one, all of one measure"
        )
    figure = _new_figure(7.0, 4.4)
    panel = figure.subplots()
    measure, factor = found[0], several[0]._form(found[0])[0]
    taught = {
        (table.teacher_parameters, table.teacher[measure] * factor) for table in several if measure in table.teacher
    }
    sizes = sorted({table.parameters for table in several} | {size for size, _ in taught if size is not None})
    names = list(dict.fromkeys(name for table in several for name in table.values))
    # Methods stand beside each other, so that no bar hides another.
    step = _size_axis(panel, sizes)
    for place, name in enumerate(names):
        own = [table for table in several if name in table.values]
        values = [table.values[name][measure] * factor for table in own]
        beside = step ** (place - (len(names) - 1) / 2)
        bars = [half_width(one) for one in values] if any(len(one) > 1 for one in values) else None
        panel.errorbar(
            [table.parameters * beside for table in own], [one.mean() for one in values],
            yerr=bars, fmt="o-", capsize=4, markersize=5, linewidth=1.2,
            color=_COLOURS[place % len(_COLOURS)], label=name,
        )  # fmt: skip
    for place, (size, value) in enumerate(sorted(taught, key=str)):
        label = "teacher" if place == 0 else None
        if size is None:
            panel.axhline(value, color="#666666", linestyle="--", linewidth=1.2, label=label)
        else:
            panel.plot(size, value, "*", markersize=13, color="#666666", label=label)
    panel.set_ylabel(several[0]._title(measure))
    seeds = sorted({len(table.seeds) for table in several})
    told = "1 seed" if seeds == [1] else f"mean of {' or '.join(map(str, seeds))} seeds, 95 % interval"
    panel.set_title(told, fontsize=10)
    panel.grid(alpha=0.25)
    panel.legend()
    return figure


def _new_figure(width: float, height: float) -> Any:
    """In inches. A notebook shows it, whether or not pyplot is in use there."""
    from matplotlib.figure import Figure

    figure: Any = Figure(layout="constrained", figsize=(width, height))
    figure._repr_png_ = partial(_as_png, figure)
    return figure


def _as_png(figure: Any, **how: Any) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **how)
    return drawn.getvalue()


def _size_axis(panel: Any, sizes: list[int]) -> float:
    """Logarithmic, with the sizes themselves, as far as they stand apart. Gives a factor for a small step on it."""
    panel.set_xscale("log")
    room = max(1.25, (sizes[-1] / sizes[0]) ** 0.08)
    panel.set_xlim(sizes[0] / room, sizes[-1] * room)
    shown = sizes[:1]
    for size in sizes[1:]:
        if size / shown[-1] > room:
            shown.append(size)
    panel.minorticks_off()
    panel.set_xticks(shown, [f"{size:,}" for size in shown])
    panel.set_xlabel("parameters")
    return (room**2 * sizes[-1] / sizes[0]) ** 0.012
