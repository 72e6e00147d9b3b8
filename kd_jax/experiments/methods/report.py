"""The table of methods in words: every row, what it gained, whether beyond chance, and what it cost."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tabulate import tabulate

from kd_jax import stats
from kd_jax.data.dataset import Dataset
from kd_jax.experiments.methods import plan as table
from kd_jax.experiments.methods.plan import Plan
from kd_jax.experiments.methods.rows import ALONE, KD, LEFT_OUT, PLACES, ROWS, Setting
from kd_jax.experiments.methods.search import Results, RowResult
from kd_jax.experiments.shell.text import counted, spread
from kd_jax.methods import CTKD, TTM, WTTM
from kd_jax.methods.bounds import walk
from kd_jax.stats import Comparison

BASELINES = (ALONE, KD)
MEASURES = ("accuracy", "errors", "nll", "ece", "agreement", "kl_to_teacher")


class Line(NamedTuple):
    """A row of the table.

    accuracy: of the seeds; None where one is not finite. against: by baseline, with a p-value that is corrected.
    step: its cost relative to KD's, the median over the seeds of one round each. temp_bytes: of the compiled training.
    """

    name: str
    chosen: float | None
    finite: int
    accuracy: Float[np.ndarray, " seeds"] | None
    against: dict[str, Comparison]
    step: float | None
    temp_bytes: int | None


def lines(found: Results) -> list[Line]:
    """All rows, the most accurate first, those that are not finite last.

    Each comparison's interval is corrected by Bonferroni, and its p-value by Holm, for all of them together: of every
    row with both baselines.
    """
    values = {name: _accuracy(row) for name, row in found.rows.items()}
    # What was planned counts, whether it came to a comparison or not.
    number = _comparisons(found)
    pairs = [
        (name, one) for name in found.rows for one in BASELINES
        if name != one and (name, one) != BASELINES and values[name] is not None and values[one] is not None
    ]  # fmt: skip
    plain, wide = ({pair: _compared(values, *pair, comparisons=n) for pair in pairs} for n in (1, number))
    unknown: list[float | None] = [None] * (number - len(pairs))
    p_values = stats.holm([one.p_value for one in plain.values()] + unknown)
    against: dict[str, dict[str, Comparison]] = {name: {} for name in found.rows}
    for (name, one), p_value in zip(pairs, p_values, strict=False):
        against[name][one] = wide[name, one]._replace(p_value=p_value)
    made = [
        Line(
            name, row.chosen, sum(run["finite"] for run in row.runs), values[name], against[name],
            _relative(row, found.rows[KD]), row.runs[0]["temp_bytes"] if row.runs else None,
        )
        for name, row in found.rows.items()
    ]  # fmt: skip
    return sorted(made, key=lambda line: -np.inf if line.accuracy is None else line.accuracy.mean(), reverse=True)


def _comparisons(found: Results) -> int:
    """Of every row with both baselines; these two with each other once."""
    return 2 * len(found.rows) - 3


def _accuracy(row: RowResult) -> Float[np.ndarray, " seeds"] | None:
    if not row.runs or not all(run["finite"] for run in row.runs):
        return None
    return np.asarray([run["accuracy"] for run in row.runs], np.float64)


def _compared(values: Mapping[str, Float[np.ndarray, " seeds"] | None], name: str, one: str, **how: int) -> Comparison:
    before, after = values[one], values[name]
    assert before is not None
    assert after is not None
    return stats.paired_comparison(before, after, metric="accuracy", **how)


def _relative(row: RowResult, kd: RowResult) -> float | None:
    """Cost of a training relative to KD's with the same seed, which ran in the same round."""
    known = {run["seed"]: run["cost_s"] for run in kd.runs}
    ratios = [run["cost_s"] / known[run["seed"]] for run in row.runs if known.get(run["seed"])]
    return float(np.median(ratios)) if ratios else None


def header(names: Sequence[str], plan: Plan, dataset: Dataset) -> str:
    """What will be trained."""
    count = sum(len(ROWS[name].values) * plan.trial_seeds + plan.seeds for name in names)
    return "\n".join([
        f"Methods        {len(names)} of {len(ROWS)}, the same teacher, student, budget and data",
        f"Data           {_data(plan, dataset)}",
        f"Trainings      {counted(count, 'student')}, after the teacher",
    ])  # fmt: skip


def _data(plan: Plan, dataset: Dataset) -> str:
    held = len(dataset.train_labels) - len(table.development(dataset).train_labels)
    count = min(plan.examples, len(dataset.train_labels) - held)
    return (
        f"{_name(dataset)}: students on {count:,} images, the teacher on {len(dataset.train_labels) - held:,}, "
        f"{held:,} of the training images as the development split, {len(dataset.test_labels):,} test images"
    )


def _name(dataset: Dataset) -> str:
    """Without the folder, which is another for everybody."""
    kind, _, place = dataset.name.partition(":")
    return f"{kind}:{place.rstrip('/').rpartition('/')[2]}" if place else kind


def text(found: Results, plan: Plan, dataset: Dataset, *, markdown: bool = False) -> str:
    """The table, what it says in sentences, and how it was made."""
    made = lines(found)
    heads = ["method", "chosen", "accuracy (%)", "to none", "p", "to kd", "p", "agreement (%)", "step", "MiB"]
    rows = [_cells(line, found.rows[line.name]) for line in made]
    align = ("left", "left", *("right" for _ in heads[2:]))
    style = "pipe" if markdown else "simple"
    body = tabulate(rows, heads, tablefmt=style, colalign=align, disable_numparse=True)
    return "\n\n".join([body, *conclusions(made, found), *_notes(made, found, plan, dataset)])


def _cells(line: Line, row: RowResult) -> list[str]:
    chosen = "" if line.chosen is None else f"{ROWS[line.name].number} {line.chosen:g}"
    cells = [line.name, chosen]
    if line.accuracy is None:
        told = f"not finite: {line.finite} of {len(row.runs)} seeds" if row.runs else "not finite in any trial"
        return [*cells, told, *[""] * 4, "", _times(line), _mib(line)]
    cells.append(spread(line.accuracy, ".2f", per_cent=True))
    for one in BASELINES:
        cells += _difference(line.against.get(one))
    agreement = 100 * np.mean([run["agreement"] for run in row.runs])
    return [*cells, f"{agreement:.2f}", _times(line), _mib(line)]


def _difference(found: Comparison | None) -> list[str]:
    if found is None:
        return ["", ""]
    digits = stats.digits_that_tell(found, 2, 100.0)
    mean = f"{100 * found.mean_difference:+.{digits}f}"
    if found.margin is None:
        return [mean, ""]
    return [f"{mean} ± {100 * found.margin:.{digits}f}", p_text(found.p_value)]


def p_text(value: float | None) -> str:
    """A p-value in few digits."""
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _times(line: Line) -> str:
    return "" if line.step is None else f"{line.step:.2f} ×"


def _mib(line: Line) -> str:
    return "" if line.temp_bytes is None else f"{line.temp_bytes / 2**20:.1f}"


def conclusions(made: Sequence[Line], found: Results) -> list[str]:
    """What is beyond chance, in sentences."""
    words = {ALONE: "no distillation", KD: "kd"}
    said = []
    for one in BASELINES:
        if one not in found.rows:
            continue
        compared = [line for line in made if one in line.against]
        better, worse = (
            [line.name for line in compared if _is_told(line.against[one]) == sign] for sign in (1, -1)
        )  # fmt: skip
        rest = len(compared) - len(better) - len(worse)
        said.append(
            f"Against {words[one]}, beyond chance after the correction: {_listed('better', better)}; "
            f"{_listed('worse', worse)}; no evidence for {rest} of {len(compared)}."
        )
    lost = [line.name for line in made if line.accuracy is None]
    return [*said, f"Not finite: {', '.join(lost)}."] if lost else said


def _is_told(found: Comparison) -> int:
    """1 for better and −1 for worse where the corrected p-value is below 0.05, else 0."""
    told = found.p_value is not None and found.p_value < 0.05
    return int(np.sign(found.mean_difference)) if told else 0


def _listed(word: str, names: Sequence[str]) -> str:
    return f"{word} {len(names)}" + (f" ({', '.join(names)})" if names else "")


def _notes(made: Sequence[Line], found: Results, plan: Plan, dataset: Dataset) -> list[str]:
    number = _comparisons(found)
    teacher, budget = found.teacher, plan.training
    notes = [
        f"{_data(plan, dataset)}. The teacher's test accuracy is {100 * teacher['test']['accuracy']:.2f} %, on the "
        f"students' training images {100 * teacher['train']['accuracy']:.2f} %.",
        f"Teacher and student are three convolutions of {_widths(plan.teacher_widths)} and {_widths(plan.widths)} "
        f"channels. Every student: Adam, {budget.epochs} epochs, batches of {budget.batch_size}, learning rate "
        f"{budget.learning_rate:g} (cosine), the same for all.",
        f"The number of each method was chosen among 4, with {counted(plan.trial_seeds, 'seed')} each, on the "
        f"development split. ± after an accuracy is the standard deviation over {counted(plan.seeds, 'other seed')}; "
        "differences are in points, paired by seed (same start, same batches), with 95 % intervals corrected by "
        f"Bonferroni and p-values by Holm for {number} comparisons.",
        "step: the time of a training (on a CPU that of its processors) relative to kd's of the same seed, the median "
        "over the seeds. The teacher's answers are kept, so neither has its cost. MiB: temporary memory of the "
        "compiled training, without oneDNN's.",
    ]
    shown = [line.name for line in made]
    places: dict[str, list[str]] = {}
    for name in sorted(shown):
        if ROWS[name].place:
            places.setdefault(ROWS[name].place, []).append(name)
    notes += [f"{place} ({PLACES[place]}), in teacher and student: {', '.join(own)}." for place, own in places.items()]
    notes += [_temperatures(shown)]
    told = [f"{name}: {ROWS[name].note}" for name in sorted(shown) if ROWS[name].note]
    notes += ["; ".join(told) + "."] if told else []
    return [*notes, "Left out: " + "; ".join(f"{name}, as {why}" for name, why in LEFT_OUT.items()) + "."]


def _temperatures(shown: Sequence[str]) -> str:
    """Of the softmaxes that rows compare."""
    setting = Setting(256, 1, np.eye(2, dtype=np.float32))
    found: dict[str, list[str]] = {}
    for name in sorted(name for name in shown if not ROWS[name].place):
        row = ROWS[name]
        for one in walk(row.make(row.values[0] if row.values else 0.0, setting)):
            value: Any = getattr(one, "temperature", None)
            if isinstance(one, TTM | WTTM):
                value = 1 / one.gamma
            if isinstance(one, CTKD):
                found.setdefault("learned", []).append(name)
            elif value is not None:
                told = ", ".join(f"{part:g}" for part in value) if isinstance(value, tuple) else f"{value:g}"
                found.setdefault(told, []).append(name)
    each = [f"{value} for {', '.join(names)}" for value, names in found.items()]
    return f"Temperatures of the softmaxes: {'; '.join(each)}."


def _widths(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))
