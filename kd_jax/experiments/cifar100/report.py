"""The table in words, and what is left of it in files."""

from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from kd_jax.data.dataset import Dataset
from kd_jax.experiments.cifar100.plan import ALONE, PAIRS, PUBLISHED, SLOWER, TEACHER, Plan
from kd_jax.experiments.cifar100.rows import Found
from kd_jax.experiments.notebook import report
from kd_jax.experiments.shell import environment
from kd_jax.experiments.shell.folder import RESULTS, TABLE, not_written, write_whole
from kd_jax.experiments.shell.text import json_text, spread
from kd_jax.stats import Comparison, paired_comparison, summarise


def header(plan: Plan, dataset: Dataset, folder: Path) -> str:
    """What will be trained, how, and where its results go."""
    usual = next((pair for pair in plan.pairs if PAIRS[pair][1] not in SLOWER), plan.pairs[0])
    slower = [pair for pair in plan.pairs if PAIRS[pair][1] in SLOWER]
    config = plan.config(usual)
    lines = {
        "data": report.data_line(dataset),
        "pairs": ", ".join(plan.pairs),
        "methods": ", ".join((ALONE, *plan.methods)),
        "seeds": f"{plan.seeds} ({plan.seed} to {plan.seed + plan.seeds - 1}); each pair has one teacher",
        "training": report.training_line(config.training, dataset),
        **({"slower": f"{', '.join(slower)} with a learning rate of 0.01"} if slower else {}),
        "device": environment.device_line(environment.describe()),
        "results": f"{folder}/",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def gains(found: Found, plan: Plan) -> dict[str, Comparison]:
    """Of each pair's methods against the student alone, in correct images, corrected for their number."""
    number = len(plan.pairs) * len(plan.methods)
    return {
        f"{pair}-{method}": paired_comparison(
            _values(found, f"{pair}-{ALONE}", "correct"), _values(found, f"{pair}-{method}", "correct"),
            metric="correct", comparisons=number,
        )
        for pair in plan.pairs for method in plan.methods
    }  # fmt: skip


def text(found: Found, plan: Plan, dataset: Dataset, *, markdown: bool = False) -> str:
    """The table and what it means."""
    rows = []
    compared, of = gains(found, plan), len(dataset.test_labels)
    for pair in plan.pairs:
        for part in (TEACHER, ALONE, *plan.methods):
            published, gain = PUBLISHED.get((pair, part)), compared.get(f"{pair}-{part}")
            accuracy = _values(found, f"{pair}-{part}", "accuracy")
            rows.append([
                pair if part == TEACHER else "", part, "" if published is None else f"{published:.2f}",
                spread(accuracy, ".2f", per_cent=True), str(len(accuracy)), "" if gain is None else _gain(gain, of),
            ])  # fmt: skip
    heads = ["pair", "", "published (%)", f"accuracy of {of:,} (%)", "n", "gain over alone (points)"]
    align = ("left", "left", "right", "right", "right", "right")
    table = tabulate(rows, heads, tablefmt="pipe" if markdown else "simple", colalign=align, disable_numparse=True)
    parts = (
        ["Quick version: a tenth of the epochs, so nothing to compare with what is published."] if plan.quick else []
    )
    number = len(compared)
    explained = (
        "± is the standard deviation over the seeds; of a gain it is half of the 95 % interval of the mean difference\n"
        f"seed by seed (paired t-test, corrected for {number} comparisons). Ours are of the last epoch. What is\n"
        "published is of CIFAR-100, and some of it of the best epoch on the test images, which makes it larger."
    )
    return "\n\n".join([*parts, table, explained])


def write(found: Found, plan: Plan, dataset: Dataset, folder: Path) -> list[str]:
    """Writes results.json and the table, and returns their names. Raises `OutputError`."""
    try:
        write_whole(folder / TABLE, text(found, plan, dataset, markdown=True) + "\n")
        write_whole(folder / RESULTS, json_text(_as_json(found, plan, dataset)))
    except OSError as error:
        raise not_written(folder, error) from None
    return [RESULTS, TABLE, "rows/", "parameters/"]


def _as_json(found: Found, plan: Plan, dataset: Dataset) -> dict[str, Any]:
    return {
        "configs": {pair: plan.config(pair).as_dict() for pair in plan.pairs},
        "data": report.data_json(dataset),
        "environment": environment.describe(),
        "published": {f"{pair}-{method}": number for (pair, method), number in PUBLISHED.items() if pair in plan.pairs},
        "rows": {
            name: one | {"accuracy": summarise(_values(found, name, "accuracy"))._asdict()}
            for name, one in found.items()
        },
        "gains": {name: one._asdict() for name, one in gains(found, plan).items()},
    }  # fmt: skip


def _values(found: Found, name: str, measure: str) -> np.ndarray:
    return np.array([run[measure] for run in found[name]["runs"]], np.float64)


def _gain(gain: Comparison, of: int) -> str:
    mean = f"{100 * gain.mean_difference / of:+.2f}".replace("-", "−")
    return mean if gain.margin is None else f"{mean} ± {100 * gain.margin / of:.2f}"
