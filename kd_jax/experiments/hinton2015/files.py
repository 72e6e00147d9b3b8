"""What is left of a reproduction: results.json, results.csv, the table and the plots."""

import csv
import io
from pathlib import Path
from typing import Any

from kd_jax.data.dataset import Dataset
from kd_jax.experiments.hinton2015 import plan as hinton
from kd_jax.experiments.hinton2015 import plots as hinton_plots
from kd_jax.experiments.hinton2015.contrasts import contrasts, temperature_errors
from kd_jax.experiments.hinton2015.plan import PAPER, Plan, Results, RowResult
from kd_jax.experiments.hinton2015.report import lines, text
from kd_jax.experiments.notebook import report
from kd_jax.experiments.shell import environment
from kd_jax.experiments.shell.folder import RESULTS, TABLE, not_written, write_whole
from kd_jax.experiments.shell.text import json_text
from kd_jax.stats import summarise

CSV = "results.csv"


def write(found: Results, plan: Plan, dataset: Dataset, folder: Path) -> list[str]:
    """Writes every file of the result, results.json last, and returns their names. Raises `OutputError`."""
    try:
        (folder / RESULTS).unlink(missing_ok=True)
        drawn = hinton_plots.write(found, plan, lines(found, plan), temperature_errors(found, plan), folder)
        write_whole(folder / TABLE, text(found, plan, dataset, markdown=True) + "\n")
        write_whole(folder / CSV, _as_csv(found))
        write_whole(folder / RESULTS, json_text(as_json(found, plan, dataset)))
    except OSError as error:
        raise not_written(folder, error) from None
    return [RESULTS, TABLE, CSV, *drawn]


def as_json(found: Results, plan: Plan, dataset: Dataset) -> dict[str, Any]:
    """The content of results.json."""
    names_of = {row: list(hinton.names_of(row, plan, dataset.classes)) for row in hinton.ROWS}
    rows = {
        row: {
            "paper": PAPER.get(row),
            "parts": names,
            "seconds": sum(found[name]["timing"]["total_s"] for name in names),
        }
        for row, names in names_of.items()
        if all(name in found for name in names)
    }
    return {
        "config": hinton.as_dict(plan),
        "data": report.data_json(dataset),
        "environment": environment.describe(),
        "rows": rows,
        "table": [line._asdict() | {"summary": summarise(line.errors)._asdict()} for line in lines(found, plan)],
        "comparisons": [contrast._asdict() for contrast in contrasts(found, plan)],
        "parts": {name: _without_curves(result) for name, result in found.items()},
        "timing": {"total_s": sum(result["timing"]["total_s"] for result in found.values())},
    }


def _without_curves(result: RowResult) -> RowResult:
    """As results.json holds it; the errors at many offsets are in rows/NAME.json and in the plot."""
    runs = [
        run | {"moved": {way: run["moved"][way] for way in ("test", "training")}} if "moved" in run else run
        for run in result["runs"]
    ]
    return result | {"runs": runs}


def _as_csv(found: Results) -> str:
    """A line for every training."""
    names = ["part", "seed", "temperature", "errors", "accuracy", "nll", "ece", "teacher_agreement", "kl_to_teacher"]
    names += [f"{way}_{what}" for way in ("test", "training") for what in ("offset", "errors")]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*names, "errors_by_class"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in found.values():
        for run in result["runs"]:
            ways = {way: run["moved"][way] for way in ("test", "training") if "moved" in run}
            moved = {f"{way}_{name}": value for way, one in ways.items() for name, value in one.items()}
            by_class = " ".join(map(str, run["errors_by_class"]))
            writer.writerow({"part": result["name"], **run, **moved, "errors_by_class": by_class})
    return file.getvalue()
