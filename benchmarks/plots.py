"""One picture of a benchmark: how many times faster in each step, and how images and students a second grow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measure import Table, quartiles, ratios
from kd_jax.experiments.notebook.plots import plain_numbers

_COLOURS = {
    "notebook": "C7",
    "tuned PyTorch": "C1",
    "Keras 3": "C2",
    "PyTorch, stacked": "C4",
    "kd_jax": "C0",
    "limit": "C3",
}
_BARS = ("steps", "end-to-end", "evaluation")


def write(tables: Sequence[Table], path: Path) -> None:
    """A panel for each table that has a picture; nothing where there is none."""
    bars = [table for table in tables if table.name in _BARS]
    lines = [table for table in tables if table.name.startswith("batches") or table.name == "seeds"]
    panels = [(_draw_bars, table) for table in bars] + [(_draw_lines, table) for table in lines]
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.5 * columns, 4.2 * rows), layout="constrained")
    for number, (draw, table) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        draw(axes, table)
        plain_numbers(axes.yaxis)
        axes.set_title(table.title)
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Any, table: Table) -> None:
    """Ratios to the baseline, with quartiles; the baseline is the line at 1."""
    others = [column for column in table.columns() if column != table.baseline]
    width = 0.8 / max(1, len(others))
    for place, column in enumerate(others):
        for row, by_column in enumerate(table.figures.values()):
            if column in by_column:
                low, middle, high = quartiles(ratios(by_column[column], by_column[table.baseline], rate=table.rate))
                error = [[middle - low], [high - middle]]
                label = column if row == 0 else None
                axes.bar(row + place * width, middle, width, yerr=error, color=_COLOURS.get(column), label=label)
    axes.axhline(1, color=_COLOURS["kd_jax"], label=table.baseline)
    axes.set(yscale="log", ylabel=f"times the {table.unit} of {table.baseline}")
    axes.set_xticks(
        [row + 0.4 - width / 2 for row in range(len(table.figures))],
        [row.replace(", ", ",\n") for row in table.figures],
    )
    axes.legend()


def _draw_lines(axes: Any, table: Table) -> None:
    """Medians and quartiles against the rows, which are numbers."""
    for column in table.columns():
        points = [(int(row), quartiles(by[column])) for row, by in table.figures.items() if column in by]
        where = [number for number, _ in points]
        colour = _COLOURS.get(column)
        axes.plot(where, [middle for _, (_, middle, _) in points], "o-", color=colour, label=column)
        axes.fill_between(where, [q[0] for _, q in points], [q[2] for _, q in points], color=colour, alpha=0.2)
    axes.set(xscale="log", yscale="log", ylabel=table.unit)
    axes.set_xticks([int(row) for row in table.figures], list(table.figures), rotation=45, minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("batch size" if table.name.startswith("batches") else "seeds trained together")
    axes.legend()
