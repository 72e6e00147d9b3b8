"""What is left of a sweep: results.json, results.csv, the table and the plots."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kd_jax.data.dataset import Dataset
from kd_jax.evaluate import Evaluation
from kd_jax.experiments.notebook import report
from kd_jax.experiments.notebook.config import Config
from kd_jax.experiments.shell import environment
from kd_jax.experiments.shell.folder import RESULTS, TABLE, not_written, write_whole
from kd_jax.experiments.shell.text import json_text, plain
from kd_jax.experiments.sweep import grid
from kd_jax.experiments.sweep import plots as sweep_plots
from kd_jax.experiments.sweep.grid import Grid, Setting
from kd_jax.experiments.sweep.report import command_of, conclusions, text
from kd_jax.experiments.sweep.search import Gain, SweepResult

RUNS = "results.csv"
_MEASURES = ("errors", "nll", "ece", "teacher_agreement", "kl_to_teacher")


def write(found: SweepResult, dataset: Dataset, folder: Path) -> list[str]:
    """Writes every file of a sweep into `folder`, results.json last, and returns their names.

    Raises `OutputError` where the folder no longer takes them.
    """
    try:
        (folder / RESULTS).unlink(missing_ok=True)
        sweep_plots.remove_older(folder)
        write_whole(folder / TABLE, text(found, markdown=True) + "\n")
        with (folder / RUNS).open("w", newline="", encoding="utf-8") as file:
            rows = list(_runs(found))
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        drawn = sweep_plots.write(found, folder)
        write_whole(folder / RESULTS, json_text(as_json(found, dataset), indent=1))
    except OSError as error:
        raise not_written(folder, error) from None
    return [RESULTS, RUNS, TABLE, *drawn]


def as_json(found: SweepResult, dataset: Dataset) -> dict[str, Any]:
    """The content of results.json."""
    asked = found.grid
    number, tested = found.looked_at, sum(map(len, found.test_gains.values()))
    return {
        "config": {name: value for name, value in asked.base.as_dict().items() if name not in asked.lists},
        "lists": {name: [_plain(value) for value in values] for name, values in asked.lists.items()},
        "label_smoothing": list(asked.smoothing),
        "data": {"name": dataset.name, "sha256": dataset.digest()}
        | dict(zip(("train", "development", "test"), found.examples, strict=True)),
        "environment": environment.describe(),
        "teachers": [_teacher_json(config, measured, asked) for config, measured in found.teachers.items()],
        "development": {
            "correction": f"Bonferroni, {number} comparisons",
            "settings": [
                _setting_json(setting, measured, asked, grid.seeds(asked))
                | {"gains": _gains_json(found.gains.get(setting, []), number, asked)}
                for setting, measured in found.students.items()
            ],
        },
        "diverged": [_described(setting, asked) for setting in found.diverged],
        "chosen": _described(found.chosen[0], asked),
        "chosen_of_each_student": [_described(setting, asked) for setting in found.chosen],
        "command": command_of(found),
        "test": {
            "correction": f"Bonferroni, {tested} comparisons",
            "settings": [
                _setting_json(setting, measured, asked, grid.seeds_of_the_test(asked))
                for setting, measured in found.tested.items()
            ],
            "diverged": [_described(setting, asked) for setting in found.diverged_in_test],
            "teachers": [_teacher_json(config, measured, asked) for config, measured in found.tested_teachers.items()],
            "gains": [
                {"setting": _described(setting, asked)} | gain
                for setting, gains in found.test_gains.items()
                for gain in _gains_json(gains, tested, asked)
            ],
            "conclusions": conclusions(found),
        },
        "timing": {"total_s": found.total_s, "train_s": found.train_s},
    }


def _teacher_json(config: Config, measured: Evaluation, asked: Grid) -> dict[str, Any]:
    found = {name: plain(value) for name, value in measured._asdict().items() if value is not None}
    return {"config": _changed(config, asked)} | found


def _setting_json(setting: Setting, measured: Evaluation, asked: Grid, seeds: Sequence[int]) -> dict[str, Any]:
    runs = [{"seed": seed} | run for seed, run in zip(seeds, report.runs_json(measured), strict=True)]
    return {"setting": _described(setting, asked), "runs": runs}


def _gains_json(gains: Iterable[Gain], number: int, asked: Grid) -> list[dict[str, Any]]:
    """number: of all comparisons, for which interval and p-value are corrected."""
    corrected = {"corrected_for_comparisons": number}
    return [{"baseline": _described(gain.baseline, asked)} | gain.comparison._asdict() | corrected for gain in gains]


def _described(setting: Setting, asked: Grid) -> dict[str, Any]:
    values = {name: _plain(value) for name, value in grid.describe(setting, asked).items()}
    return {"kind": setting.kind} | values


def _changed(config: Config, asked: Grid) -> dict[str, Any]:
    return {name: _plain(getattr(config, name)) for name in asked.lists if name.startswith("teacher_")}


def _runs(found: SweepResult) -> Iterable[dict[str, Any]]:
    """One row for each student on each of the parts that it was measured on."""
    asked = found.grid
    names = [*asked.lists, "label_smoothing"]
    for part, students, seeds in (
        ("development", found.students, grid.seeds(asked)),
        ("test", found.tested, grid.seeds_of_the_test(asked)),
    ):
        for setting, measured in students.items():
            values = {name: grid.shown(value) for name, value in grid.describe(setting, asked).items()}
            for seed, run in zip(seeds, report.runs_json(measured), strict=True):
                row: dict[str, Any] = {"part": part, "kind": setting.kind}
                row |= {name: values.get(name, "") for name in names} | {"seed": seed}
                yield row | {name: run[name] for name in _MEASURES}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
