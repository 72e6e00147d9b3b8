"""What `hinton`'s rows gave: tables beside the paper's numbers, comparisons, and files."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from kd_jax.data.dataset import Dataset
from kd_jax.experiments.hinton2015 import plan as hinton
from kd_jax.experiments.hinton2015 import plots as hinton_plots
from kd_jax.experiments.hinton2015.plan import PAPER, Found, Part, Plan
from kd_jax.experiments.notebook import report
from kd_jax.experiments.notebook.config import Training
from kd_jax.stats import paired_comparison, summarise

CSV = "results.csv"
Parts = Mapping[str, Found]

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


class Contrast(NamedTuple):
    """A comparison of two ways to train, paired by seed. p_corrected: by Holm's method, for those of one width."""

    what: str
    n: int
    mean_difference: float
    ci95: tuple[float, float] | None
    p_value: float | None
    p_corrected: float | None


def lines(found: Parts, plan: Plan) -> list[Line]:
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


def temperature_errors(found: Parts, plan: Plan) -> dict[int, dict[float | None, list[int]]]:
    """Errors of every seed by units and temperature, None for those alone; widths that are not done are left out."""
    given: dict[int, dict[float | None, list[int]]] = {}
    for width in plan.widths:
        names = [f"{kind}-{width.units}" for kind in ("alone", "distilled", "temperature")]
        own: dict[float | None, list[int]] = {}
        for run in (run for name in names if name in found for run in found[name]["runs"]):
            own.setdefault(run.get("temperature"), []).append(run["errors"])
        if {None, *width.temperatures} <= set(own):
            given[width.units] = {t: own[t] for t in sorted(own, key=lambda t: 0 if t is None else t)}
    return given


def contrasts(found: Parts, plan: Plan) -> list[Contrast]:
    """Distilled against alone, others against distilled, T = 20 against 8; and of the smallest width the better T."""
    main = plan.widths[0].units
    alone, distilled, own = f"alone-{main}", f"distilled-{main}", f"{main} units, T = {plan.temperature:g}"
    against = (
        (f"{own} against alone", alone, distilled),
        (f"{main} units, mean logits over shifts against those of one view", distilled, "averaged"),
        (f"{own} against alone, both with shifts", "alone-shifted", "distilled-shifted"),
        (f"{own}, with shifts in the transfer set against without", distilled, "distilled-shifted"),
    )
    errors = {name: [run["errors"] for run in part["runs"]] for name, part in found.items()}
    pairs = {main: [(what, errors[a], errors[b]) for what, a, b in against if a in errors and b in errors]}
    by_width, smallest = temperature_errors(found, plan), min(width.units for width in plan.widths)
    for units, of_width in by_width.items():
        if units != smallest and {8.0, 20.0} <= set(of_width):
            what = f"{units} units, T = 20 against T = 8"
            pairs.setdefault(units, []).append((what, of_width[8.0], of_width[20.0]))
    given = [contrast for several in pairs.values() for contrast in _contrasts(several)]
    return given + (_better_against_others(smallest, by_width[smallest]) if smallest in by_width else [])


def text(found: Parts, plan: Plan, dataset: Dataset, *, markdown: bool = False) -> str:
    """The tables and what they mean."""
    style, of = "pipe" if markdown else "simple", f"{len(dataset.test_labels):,}"
    parts = ["Quick version: fewer seeds and epochs than the full one, so more errors."] if plan.quick else []
    rows = [
        [
            line.row, line.setup, "" if line.paper is None else f"{line.paper:,.0f}",
            spread(line.errors), str(len(line.errors)),
            "" if line.paper_left_out is None else f"{line.paper_left_out:g}",
            "" if line.left_out is None else spread(line.left_out),
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
        rows = [[f"{u}", *(spread(own[t]) if t in own else "" for t in columns)] for u, own in by_width.items()]
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
        trained = [part for name, part in hinton.parts(plan, dataset.classes).items() if name in found]
        parts.append(report.listed({"data": report.data_line(dataset)} | recipe(trained, plan, dataset)))
    return "\n\n".join(parts)


def sentence(contrast: Contrast) -> str:
    """A comparison as a person reads it."""
    said = f"{contrast.what}: {contrast.mean_difference:+.1f}".replace("-", "−")
    if contrast.ci95 is None:
        return f"{said} (n = {contrast.n}: too few or too alike to give an interval)"
    low, high = (f"{value:+.1f}".replace("-", "−") for value in contrast.ci95)
    corrected = f", corrected {contrast.p_corrected:.2g}" if contrast.p_corrected != contrast.p_value else ""
    return f"{said} (95 % interval {low} to {high}, n = {contrast.n}, p = {contrast.p_value:.2g}{corrected})"


def write(found: Parts, plan: Plan, dataset: Dataset, folder: Path) -> list[str]:
    """Writes every file of the result, results.json last, and returns their names. Raises `OutputError`."""
    try:
        (folder / report.RESULTS).unlink(missing_ok=True)
        drawn = hinton_plots.write(found, plan, lines(found, plan), temperature_errors(found, plan), folder)
        (folder / report.TABLE).write_text(text(found, plan, dataset, markdown=True) + "\n", encoding="utf-8")
        (folder / CSV).write_text(_as_csv(found), encoding="utf-8")
        report.write_whole(folder / report.RESULTS, report.as_text(as_json(found, plan, dataset)))
    except OSError as error:
        raise report.not_written(folder, error) from None
    return [report.RESULTS, report.TABLE, CSV, *drawn]


def as_json(found: Parts, plan: Plan, dataset: Dataset) -> dict[str, Any]:
    """The content of results.json."""
    parts_of = {row: list(hinton.parts_of(row, plan, dataset.classes)) for row in hinton.ROWS}
    rows = {
        row: {
            "paper": PAPER.get(row),
            "parts": names,
            "seconds": sum(found[name]["timing"]["total_s"] for name in names),
        }
        for row, names in parts_of.items()
        if all(name in found for name in names)
    }
    return {
        "config": hinton.as_dict(plan),
        "data": report.data_json(dataset),
        "environment": report.environment(),
        "rows": rows,
        "table": [line._asdict() | {"summary": summarise(line.errors)._asdict()} for line in lines(found, plan)],
        "comparisons": [contrast._asdict() for contrast in contrasts(found, plan)],
        "parts": {name: _without_curves(part) for name, part in found.items()},
        "timing": {"total_s": sum(part["timing"]["total_s"] for part in found.values())},
    }


def header(rows: tuple[str, ...], plan: Plan, dataset: Dataset, folder: Path) -> str:
    """What will be trained, how, and where its results go."""
    texts = {
        "data": report.data_line(dataset),
        "rows": f"{', '.join(rows)}{' (quick version)' if plan.quick else ''}",
        **recipe(hinton.wanted(rows, plan, dataset.classes), plan, dataset),
        "device": report.device_line(report.environment()),
        "results": f"{folder}/",
    }
    return "\n".join(f"{name:<9} {line}" for name, line in texts.items() if line)


def recipe(trained: list[Part], plan: Plan, dataset: Dataset) -> dict[str, str]:
    """How parts, the teacher first, are trained, by name; empty where nothing is of that name."""
    seeds = f"{plan.seeds} seeds from {plan.seed} on" if plan.seeds > 1 else f"1 seed ({plan.seed})"
    distilled = [part for part in trained if part.temperatures]
    temperatures = sorted({temperature for part in distilled for temperature in part.temperatures})
    weights = f"alpha {plan.alpha:g}, T = {', '.join(f'{temperature:g}' for temperature in temperatures)}"
    return {
        "teacher": _trainings(trained[:1], dataset),
        "alone": _trainings([part for part in trained[1:] if not part.temperatures], dataset),
        "distilled": f"{weights}; {_trainings(distilled, dataset)}" if distilled else "",
        "students": seeds if trained[1:] else "",
    }


def spread(values: list[int] | list[float], form: str = ",.0f") -> str:
    """Mean ± standard deviation."""
    summary = summarise(values)
    mean = format(summary.mean, form)
    return mean if summary.sd is None else f"{mean} ± {format(summary.sd, form.replace('+', ''))}"


def _trainings(parts: list[Part], dataset: Dataset) -> str:
    """How parts are trained; where not all are trained alike, with their units."""
    units: dict[Training, list[int]] = {}
    for part in parts:
        own = units.setdefault(part.training, [])
        if part.hidden[0] not in own:
            own.append(part.hidden[0])
    texts = [report.training_line(training, dataset) for training in units]
    if len(texts) > 1:
        named = (
            f"{' and '.join(map(str, own))} units{', shifted' * bool(training.shift)}: {text}"
            for (training, own), text in zip(units.items(), texts, strict=True)
        )
        return "; ".join(named)
    return "".join(texts)


def _of_class(runs: list[Found], own: int | None) -> list[int] | None:
    return None if own is None else [run["errors_by_class"][own] for run in runs]


def _contrasts(pairs: list[tuple[str, list[int], list[int]]]) -> list[Contrast]:
    """Of `(what, baseline, treatment)`, with p-values corrected for their number (Holm 1979)."""
    compared = [(what, paired_comparison(before, after, metric="errors")) for what, before, after in pairs]
    known = sorted((c.p_value, i) for i, (_, c) in enumerate(compared) if c.p_value is not None)
    corrected: dict[int, float] = {}
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[place] = largest
    return [
        Contrast(what, c.n, c.mean_difference, c.ci95, c.p_value, corrected.get(i))
        for i, (what, c) in enumerate(compared)
    ]


def _better_against_others(units: int, own: Mapping[float | None, list[int]]) -> list[Contrast]:
    """The better of T = 2.5 and 4 against every other temperature.

    Which of them is better is known from the same errors, so p is corrected for what the other would have been told by.
    """
    candidates = sorted((t for t in (2.5, 4.0) if t in own), key=lambda t: np.mean(own[t]))
    pairs: dict[frozenset[float], tuple[str, list[int], list[int]]] = {}
    for one in candidates:
        what = f"{units} units, T = {one:g}, the better of 2.5 and 4, against T = "
        for t in (t for t in own if t is not None and t != one):
            pairs.setdefault(frozenset((one, t)), (f"{what}{t:g}", own[t], own[one]))
    known = zip(pairs, _contrasts(list(pairs.values())), strict=True)
    return [contrast for pair, contrast in known if candidates[0] in pair]


def _without_curves(part: Found) -> Found:
    """A part as results.json holds it; the errors at many offsets are in rows/PART.json and in the plot."""
    runs = [
        run | {"moved": {way: run["moved"][way] for way in ("test", "training")}} if "moved" in run else run
        for run in part["runs"]
    ]
    return part | {"runs": runs}


def _as_csv(found: Parts) -> str:
    """A line for every training."""
    names = ["part", "seed", "temperature", "errors", "accuracy", "nll", "ece", "teacher_agreement", "kl_to_teacher"]
    names += [f"{way}_{what}" for way in ("test", "training") for what in ("offset", "errors")]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*names, "errors_by_class"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for part in found.values():
        for run in part["runs"]:
            ways = {way: run["moved"][way] for way in ("test", "training") if "moved" in run}
            moved = {f"{way}_{name}": value for way, one in ways.items() for name, value in one.items()}
            by_class = " ".join(map(str, run["errors_by_class"]))
            writer.writerow({"part": part["name"], **run, **moved, "errors_by_class": by_class})
    return file.getvalue()
