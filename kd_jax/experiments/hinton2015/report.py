"""What the rows gave, as a person reads it: tables beside the paper's numbers, and comparisons."""

from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from kd_jax.data.dataset import Dataset
from kd_jax.experiments.hinton2015 import plan as hinton
from kd_jax.experiments.hinton2015.contrasts import contrasts, sentence, temperature_errors
from kd_jax.experiments.hinton2015.plan import PAPER, Plan, Results, RowResult, RowTrials
from kd_jax.experiments.notebook import report
from kd_jax.experiments.notebook.config import Training
from kd_jax.experiments.shell import environment
from kd_jax.experiments.shell.text import listed, spread

BIAS_RULE = (
    "The offset chosen on training images has the fewest errors on all training images, with labels, those of classes "
    "that the student never saw included; it never sees the test set. The offset chosen on the test set is the paper's "
    "way: its errors are too good to be true."
)

AVERAGED = (
    "The row averaged is not in the paper. Its soft targets are the mean of the teacher's logits over all views of an "
    "image that is shifted by at most so many pixels (test-time augmentation), as the teacher may know more of shifted "
    "images than its answer to one tells. The students see no shifted image."
)

SHIFTED = (
    "The row shifted is not in the paper, whose transfer set has no translations. Its students see every image shifted "
    "anew, as the teacher does, and the soft targets of those distilled are the teacher's logits of the shifted image."
)


class Line(NamedTuple):
    """One line of the table. errors, left_out, offsets: one for each seed; left_out: those on the class left out.

    paper: errors, those on the class left out, and the offset, where the paper gives them.
    """

    row: str
    setup: str
    errors: list[int]
    paper: float | None
    left_out: list[int] | None = None
    paper_left_out: float | None = None
    offsets: list[float] | None = None
    paper_offset: float | None = None


def lines(found: Results, plan: Plan) -> list[Line]:
    """The table, without the row `temperature`."""
    main = plan.widths[0].units
    layers = "-".join(map(str, plan.teacher_hidden))
    inputs = f" ({plan.teacher_input_dropout:g} of the inputs)" if plan.teacher_input_dropout else ""
    dropout = f"dropout {plan.teacher_dropout:g}{inputs}, squared norms of at most {plan.teacher_max_norm:g}"
    setups = {
        "teacher": f"{layers} hidden, {dropout}, shifts of {plan.teacher_training.shift}",
        f"alone-{main}": f"{main}-{main} hidden, labels alone",
        f"distilled-{main}": f"{main}-{main} hidden, T = {plan.temperature:g}",
        "averaged": f"distilled from mean logits over shifts of up to {plan.averaged_shift}",
        "alone-shifted": f"labels alone, shifts of {plan.shifted_alone.shift}",
        "distilled-shifted": f"distilled, shifts of {plan.shifted_distilled.shift} in the transfer set",
        "no3": f"distilled, no {plan.left_out}s in the transfer set",
        "only78": f"distilled, only {'s and '.join(map(str, plan.only))}s in the transfer set",
    }
    given: list[Line] = []
    for name, setup in setups.items():
        if name not in found:
            continue
        row, runs = "shifted" if name.endswith("-shifted") else name.removesuffix(f"-{main}"), found[name]["runs"]
        paper = PAPER.get(row, {})
        errors = [run["errors"] for run in runs]
        if row not in ("no3", "only78"):
            given.append(Line(row, setup, errors, paper.get("errors")))
            if "taught_by" in found[name]:
                given.append(
                    Line(row, "the teacher itself, by its mean logits", [found[name]["taught_by"]["errors"]], None)
                )
            continue
        own = plan.left_out if row == "no3" else None
        line = Line(row, setup, errors, paper["errors"], _of_class(runs, own), paper.get("errors_left_out"))
        given.append(line)
        for way, where in (("test", "the test set, as in the paper"), ("training", "training images")):
            moved = [run["moved"][way] for run in runs]
            # The paper has only the first way.
            own_paper = paper if way == "test" else {}
            given.append(
                Line(
                    row,
                    f"the same, biases moved, chosen on {where}",
                    [one["errors"] for one in moved],
                    own_paper.get("moved"),
                    _of_class(moved, own),
                    own_paper.get("moved_left_out"),
                    [one["offset"] for one in moved],
                    own_paper.get("offset"),
                )
            )
    return given


def text(found: Results, plan: Plan, dataset: Dataset, *, markdown: bool = False) -> str:
    """The tables and what they mean."""
    style, of = "pipe" if markdown else "simple", f"{len(dataset.test_labels):,}"
    parts = ["Quick version: fewer seeds and epochs than the full one, so more errors."] if plan.quick else []
    rows = [
        [
            line.row, line.setup, "" if line.paper is None else f"{line.paper:,.0f}",
            spread(line.errors, ",.0f"), str(len(line.errors)),
            "" if line.paper_left_out is None else f"{line.paper_left_out:g}",
            "" if line.left_out is None else spread(line.left_out, ",.0f"),
            "" if line.paper_offset is None else f"{line.paper_offset:+g}",
            "" if line.offsets is None else spread(line.offsets, "+.1f"),
        ]
        for line in lines(found, plan)
    ]  # fmt: skip
    heads = ["row", "set-up", "paper", f"errors of {of}", "n", f"paper, {plan.left_out}s", f"of {plan.left_out}s"]
    heads += ["paper, offset", "offset"]
    kept = [place for place, head in enumerate(heads) if place < 5 or any(row[place] for row in rows)]
    heads, rows = [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]
    align = ("left", "left", *["right"] * (len(heads) - 2))
    parts.append(tabulate(rows, heads, tablefmt=style, colalign=align, disable_numparse=True))
    by_width = temperature_errors(found, plan)
    if by_width:
        columns: list[float | None] = [None, *sorted({t for own in by_width.values() for t in own if t is not None})]
        heads = ["units a layer", *("alone" if t is None else f"T = {t:g}" for t in columns)]
        rows = [[f"{u}", *(spread(own[t], ",.0f") if t in own else "" for t in columns)] for u, own in by_width.items()]
        align = ("right",) * len(heads)
        table = tabulate(rows, heads, tablefmt=style, colalign=align, disable_numparse=True)
        parts.append(f"Errors of {of}, by temperature:\n\n{table}")
    compared = [sentence(contrast) for contrast in contrasts(found, plan)]
    if compared:
        bullet = "- " if markdown else ""
        parts.append("Differences of errors:\n" + "\n" * markdown + "\n".join(bullet + each for each in compared))
    parts.append(
        "± is the standard deviation over n seeds of the students, which all have one teacher; the paper's numbers are "
        "single runs, whose own chance is about the square root of the errors. Differences are paired by seed (the "
        "same first parameters, and the same images in each batch while both train), their intervals and p-values by "
        "Student's t; where several of one width are looked at, p is also corrected for that by Holm's method (and for "
        "the choice of the better of two by the same errors), and the intervals are not."
    )
    if "averaged" in found:
        parts.append(AVERAGED)
    if any(name.endswith("-shifted") for name in found):
        parts.append(SHIFTED)
    if any(line.offsets for line in lines(found, plan)):
        parts.append(BIAS_RULE)
    if markdown:
        trained = [row for name, row in hinton.all_trials(plan, dataset.classes).items() if name in found]
        parts.append(listed({"data": report.data_line(dataset)} | set_up(trained, plan, dataset)))
    return "\n\n".join(parts)


def header(rows: tuple[str, ...], plan: Plan, dataset: Dataset, folder: Path) -> str:
    """What will be trained, how, and where its results go."""
    texts = {
        "data": report.data_line(dataset),
        "rows": f"{', '.join(rows)}{' (quick version)' if plan.quick else ''}",
        **set_up(hinton.wanted(rows, plan, dataset.classes), plan, dataset),
        "device": environment.device_line(environment.describe()),
        "results": f"{folder}/",
    }
    return "\n".join(f"{name:<9} {line}" for name, line in texts.items() if line)


def set_up(trained: list[RowTrials], plan: Plan, dataset: Dataset) -> dict[str, str]:
    """How rows, the teacher first, are trained, by name; empty where nothing is of that name."""
    seeds = f"{plan.seeds} seeds from {plan.seed} on" if plan.seeds > 1 else f"1 seed ({plan.seed})"
    distilled = [row for row in trained if row.temperatures]
    temperatures = sorted({temperature for row in distilled for temperature in row.temperatures})
    weights = f"alpha {plan.alpha:g}, T = {', '.join(f'{temperature:g}' for temperature in temperatures)}"
    return {
        "teacher": _trainings(trained[:1], dataset),
        "alone": _trainings([row for row in trained[1:] if not row.temperatures], dataset),
        "distilled": f"{weights}; {_trainings(distilled, dataset)}" if distilled else "",
        "students": seeds if trained[1:] else "",
    }


def _trainings(rows: list[RowTrials], dataset: Dataset) -> str:
    """How rows are trained; where not all are trained alike, with their units."""
    units: dict[Training, list[int]] = {}
    for row in rows:
        own = units.setdefault(row.training, [])
        if row.hidden[0] not in own:
            own.append(row.hidden[0])
    texts = [report.training_line(training, dataset) for training in units]
    if len(texts) > 1:
        named = (
            f"{' and '.join(map(str, own))} units{', shifted' * bool(training.shift)}: {text}"
            for (training, own), text in zip(units.items(), texts, strict=True)
        )
        return "; ".join(named)
    return "".join(texts)


def _of_class(runs: list[RowResult], own: int | None) -> list[int] | None:
    return None if own is None else [run["errors_by_class"][own] for run in runs]
