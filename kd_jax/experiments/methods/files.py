"""What is left of the table of methods: results.json, results.csv, the table and the plots."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from kd_jax.data.dataset import Dataset
from kd_jax.experiments.methods import plan as table
from kd_jax.experiments.methods import plots
from kd_jax.experiments.methods.plan import Plan
from kd_jax.experiments.methods.report import MEASURES, Line, conclusions, lines, text
from kd_jax.experiments.methods.rows import LEFT_OUT, ROWS
from kd_jax.experiments.methods.search import Results, RowResult
from kd_jax.experiments.notebook import report
from kd_jax.experiments.shell import environment
from kd_jax.experiments.shell.folder import RESULTS, TABLE, not_written, write_whole
from kd_jax.experiments.shell.text import json_text

CSV = "results.csv"


def written(folder: Path) -> set[str]:
    """The rows of the table that is there; none where it is none or damaged."""
    try:
        return {*json.loads((folder / RESULTS).read_bytes())["rows"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def write(found: Results, plan: Plan, dataset: Dataset, folder: Path) -> list[str]:
    """Writes every file of the result, results.json last, and returns their names. Raises `OutputError`."""
    made = lines(found)
    try:
        (folder / RESULTS).unlink(missing_ok=True)
        drawn = plots.write(made, found, folder)
        write_whole(folder / TABLE, text(found, plan, dataset, markdown=True) + "\n")
        write_whole(folder / CSV, _as_csv(found))
        write_whole(folder / RESULTS, json_text(as_json(found, plan, dataset)))
    except OSError as error:
        raise not_written(folder, error) from None
    return [RESULTS, TABLE, CSV, *drawn]


def as_json(found: Results, plan: Plan, dataset: Dataset) -> dict[str, Any]:
    """The content of results.json."""
    made = lines(found)
    return {
        "config": table.as_dict(plan),
        "data": report.data_json(dataset),
        "environment": environment.describe(),
        "teacher": found.teacher,
        "table": [_line_json(line) for line in made],
        "conclusions": conclusions(made, found),
        "rows": {name: _row_json(name, row) for name, row in found.rows.items()},
        "left_out": LEFT_OUT,
    }


def _line_json(line: Line) -> dict[str, Any]:
    accuracy = None if line.accuracy is None else line.accuracy.tolist()
    against = {name: comparison._asdict() for name, comparison in line.against.items()}
    return line._asdict() | {"accuracy": accuracy, "against": against}


def _row_json(name: str, row: RowResult) -> dict[str, Any]:
    own = ROWS[name]
    asked = {"number": own.number, "values": list(own.values), "place": own.place, "note": own.note}
    return asked | row._asdict()


def _as_csv(found: Results) -> str:
    """A line for every training."""
    names = ["method", "part", "number", "seed", "finite", *MEASURES, "seconds", "cost_s", "temp_bytes"]
    file = io.StringIO()
    writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for name, row in found.rows.items():
        for run in [*row.trials, *row.runs]:
            writer.writerow(run | {"method": name})
    return file.getvalue()
