"""What a sweep found, as a person reads it: the best settings, the test, and what they show."""

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from kd_jax.data.dataset import Dataset
from kd_jax.evaluate import Evaluation
from kd_jax.experiments.notebook import report
from kd_jax.experiments.notebook.conclusion import conclude
from kd_jax.experiments.notebook.config import LATER, Config, make_config
from kd_jax.experiments.notebook.methods import METHODS
from kd_jax.experiments.shell import environment
from kd_jax.experiments.shell.options import option
from kd_jax.experiments.shell.text import counted, spread
from kd_jax.experiments.sweep import grid
from kd_jax.experiments.sweep.grid import ALONE, DISTILLED, SMOOTHED, Grid, Setting
from kd_jax.experiments.sweep.search import Gain, SweepResult, rank

_SHOWN = 10
_MEASURES_EXPLAINED = (
    "NLL is the negative log-likelihood in nats, ECE the calibration error, 'as teacher' how often the answer is the\n"
    "teacher's, KL to teacher the divergence of the student's probabilities from the teacher's, in nats; gains are in\n"
    "images. A 'smoothed' student is one alone on labels that are smoothed by so much."
)
_MEASURE_COLUMNS = ("errors", "NLL", "ECE\n(%)", "as teacher\n(%)", "KL to\nteacher")


def header(asked: Grid, split: Dataset, folder: Path) -> str:
    """What will be trained, how, and where its results go."""
    base, lists = asked.base, asked.lists
    distilled, baselines = grid.distilled(asked), grid.baselines(asked)
    teachers = len({grid.teacher_of(setting, asked) for setting in distilled})
    listed = " × ".join(f"{grid.words(name)} {_values(values)}" for name, values in lists.items())
    fixed = {
        "teacher": "teacher_hidden", "student": "student_hidden", "method": "method", "alpha": "alpha",
        "temperature": "temperature", "epochs": "epochs", "batch": "batch_size", "learning rate": "learning_rate",
        "schedule": "schedule", "warm-up": "warmup", "shift": "shift",
    }  # fmt: skip
    if not any(setting.config.method in METHODS for setting in distilled):
        fixed = {word: name for word, name in fixed.items() if name not in ("alpha", "temperature")}
    fixed |= {"method option": "method_option"} if base.method_option else {}
    if base.shift_share < 1 and (base.shift or "shift" in lists):
        fixed["share of the images shifted"] = "shift_share"
    fixed |= {grid.words(n): n for n, value in LATER.items() if getattr(base, n) != value}
    rest = ", ".join(f"{word} {_value(getattr(base, name))}" for word, name in fixed.items() if name not in lists)
    more = grid.seeds_of_the_test(asked)
    seeds = f"{base.seeds} seeds ({base.seed} to {more[0] - 1}; in the test {more[0]} to {more[-1]})"
    if base.seeds == 1:
        seeds = f"1 seed ({base.seed}; in the test {more[0]}), which cannot tell a gain from noise: see --seeds"
    smoothing = f", smoothing {_values(asked.smoothing)}" if asked.smoothing else ""
    lines = {
        "data": report.data_line(split).replace("test images", "development images (the training set's last)"),
        "grid": f"{listed or 'no list'}: {counted(len(distilled), 'setting')}, {counted(teachers, 'teacher')}",
        "baselines": f"{len(baselines)}, trained on labels alone{smoothing}",
        "each with": seeds,
        "fixed": rest,
        "teachers": report.training_line(base.teacher_training, split)
        + report.regularisation(base)
        + ", but for what is listed" * any(name.startswith("teacher_") and name != "teacher_hidden" for name in lists),
        "trainings": f"{(len(distilled) + len(baselines)) * base.seeds + teachers:,}, and those for the test",
        "device": environment.device_line(environment.describe()),
        "results": f"{folder}/",
    }
    return "\n".join(f"{name:<9} {line}" for name, line in lines.items())


def text(found: SweepResult, *, markdown: bool = False) -> str:
    """The tables and what they say; Markdown, or plain for a terminal."""
    style = "pipe" if markdown else "simple"
    train, development, test = found.examples
    compared, several = sum(map(len, found.test_gains.values())), found.grid.base.seeds > 1
    of_each = " of each student" * (len(found.chosen) > 1)
    best, whole, seed = "best of them" if of_each else "chosen setting", train + development, found.grid.base.seed
    others = _range_words(grid.seeds_of_the_test(found.grid))
    shown = len(found.gains) if len(found.gains) <= _SHOWN else f"the best {_SHOWN} of {len(found.gains)}"
    others_shown = " and the best of each student" * (len(_distilled_shown(found)) > min(_SHOWN, len(found.gains)))
    all_of_them = len(_baselines(found)) == len(_baselines_shown(found))
    baselines = "the baselines" if all_of_them else "their baselines, the best baseline of all"
    corrected = "These intervals and p-values are corrected for their number, too." if compared > 1 and several else ""
    parts = [
        f"On the development split ({development:,} images; {_seed_words(found)}; {shown} distilled "
        f"setting{'s' * (shown != 1)}{others_shown}, {baselines} and the teacher{'s' * (len(found.teachers) > 1)}):",
        _development_table(found, style),
        _MEASURES_EXPLAINED + _first_teacher(found),
        _diverged(found.diverged, found.grid),
        _explanation(found) if several else "",
        _best_of_all(found),
        f"On the test set ({test:,} images, read once), the setting with the fewest errors{of_each} and\n"
        f"its baselines, trained anew on {train:,} images with {others}, which had no say in the choice;\n"
        f"the teacher is the same (seed {seed}):",
        _test_table(found, style),
        _diverged(found.diverged_in_test, found.grid),
        "\n".join(conclusions(found)),
        " ".join(filter(None, (corrected, _few(found) if several else ""))),
        f"To train the {best} on all {whole:,} images, with a teacher and seeds that were not used here:\n\n"
        f"    {command_of(found)}",
    ]
    return "\n\n".join(filter(None, parts))


def command_of(found: SweepResult) -> str:
    """The command that trains the best setting, and its baseline, with seeds that the sweep has not seen."""
    config = dataclasses.replace(found.chosen[0].config, seed=grid.first_unused_seed(found.grid))
    preset = make_config(config.preset)
    words = ["python -m kd_jax.run"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        usual = Config().preset if field.name == "preset" else getattr(preset, field.name)
        if field.name.startswith("teacher_") and usual is None:
            # As the students are trained.
            usual = getattr(config, field.name.removeprefix("teacher_"))
        if value != usual or field.name in found.grid.lists:
            words += [option(field.name), repr(value) if isinstance(value, float) else grid.shown(value)]
    return " ".join([words[0], *map(shlex.quote, words[1:])])


def _range_words(seeds: Sequence[int]) -> str:
    return f"the seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"the seed {seeds[0]}"


def conclusions(found: SweepResult) -> list[str]:
    """A sentence for each baseline on the test set."""
    of = found.examples[2]
    return [
        conclude(gain.comparison, of=of, against=f"the student {grid.label(gain.baseline, found.grid)}")
        for gains in found.test_gains.values()
        for gain in gains
    ]


def _seed_words(found: SweepResult) -> str:
    seeds = found.grid.base.seeds
    return f"mean ± sd of {seeds} seeds" if seeds > 1 else "1 seed, which cannot tell a gain from noise"


def _explanation(found: SweepResult) -> str:
    number, smoothings = found.looked_at, len(found.grid.smoothing)
    looked_at = f"; {number} were looked at"
    if smoothings > 1:
        looked_at = f";\n{number} were looked at (with each of {smoothings} smoothings, of which the best counts)"
    corrected = (
        f"{looked_at},\n"
        f"so every interval is at the level 1 − 0.05/{number}, and all hold at once with at least 95 % (Bonferroni)"
        if number > 1
        else ""
    )
    few = f"\n{_few(found)}" if _few(found) else ""
    return (
        f"The gains are mean differences of correct images, seed by seed, ± half the 95 % interval{corrected}.\n"
        "A gain whose interval includes 0 is no evidence, and the best of many settings looks better than\n"
        "it is: the test below was not used to choose, and its students have other seeds."
        f"{few}"
    )


def _few(found: SweepResult) -> str:
    few = found.grid.base.seeds < 5
    return "Intervals of so few seeds are wide, or right by luck: use --seeds 5 or more." if few else ""


def _best_of_all(found: SweepResult) -> str:
    """Said where it is no distilled student."""
    best = min(found.students, key=lambda s: rank(found.students[s]))
    whose = grid.label(best, found.grid)
    return "" if best.kind == grid.DISTILLED else f"Here no distilled setting is better than the student {whose}."


def _diverged(settings: Sequence[Setting], asked: Grid) -> str:
    if not settings:
        return ""
    some = "; ".join(grid.label(setting, asked) for setting in settings[:_SHOWN])
    more = "; …" * (len(settings) > _SHOWN)
    whose = "one of their seeds, or of their teacher,"
    return f"{len(settings)} left out, since a number of {whose} is not finite: {some}{more}."


def _development_table(found: SweepResult, style: str) -> str:
    rows = [
        [*_student(s, found.grid), *_measures(found.students[s]), *_gain_cells(found.gains.get(s, []), found)]
        for s in [*_distilled_shown(found), *_baselines_shown(found)]
    ]
    blank = [""] * len(_gain_columns(found))
    for config, measured in sorted(found.teachers.items(), key=lambda item: rank(item[1]))[:_SHOWN]:
        rows.append([*_teacher(config, found.grid), *_measures(measured), *blank])
    return _tabulated(rows, [*_setting_columns(found.grid), *_MEASURE_COLUMNS, *_gain_columns(found)], style)


def _best(settings: Iterable[Setting], found: SweepResult) -> list[Setting]:
    return sorted(settings, key=lambda s: rank(found.students[s]))[:_SHOWN]


def _distilled_shown(found: SweepResult) -> list[Setting]:
    """The best, and those that are chosen, of narrow students too."""
    best = _best(found.gains, found)
    return best + [setting for setting in found.chosen if setting not in best]


def _baselines(found: SweepResult) -> list[Setting]:
    return [setting for setting in grid.baselines(found.grid) if setting in found.students]


def _baselines_shown(found: SweepResult) -> list[Setting]:
    """All where they are few, else those that the gains that are shown are against, and the best of all."""
    known = _baselines(found)
    if len(known) > _SHOWN:
        against = {gain.baseline for setting in _distilled_shown(found) for gain in found.gains[setting]}
        kept = {*against, _best(known, found)[0]}
        known = [setting for setting in known if setting in kept]
    return sorted(known, key=lambda s: rank(found.students[s]))


def _first_teacher(found: SweepResult) -> str:
    """Which teacher the baselines, which have none, are held against."""
    if len(found.teachers) < 2:
        return ""
    first = next(iter(found.teachers))
    names = [name for name in found.grid.lists if name.startswith("teacher_")]
    named = ", ".join(f"{grid.words(name)} {_value(getattr(first, name))}" for name in names)
    return f"\nHere baselines are compared with the first teacher ({named})."


def _test_table(found: SweepResult, style: str) -> str:
    """Every student's settings together, with its parameters where there are several."""
    several = len(found.chosen) > 1
    rows = []
    for setting, measured in found.tested.items():
        size = [f"{found.parameters[setting.config.student_hidden]:,}"] if several else []
        gains = _gain_cells(found.test_gains.get(setting, []), found)
        rows.append([*_student(setting, found.grid), *size, *_measures(measured), *gains])
    blank = [""] * len(_gain_columns(found))
    for config, measured in found.tested_teachers.items():
        rows.append([*_teacher(config, found.grid), *[""] * several, *_measures(measured), *blank])
    columns = [*_setting_columns(found.grid), *["parameters"] * several, *_MEASURE_COLUMNS, *_gain_columns(found)]
    return _tabulated(rows, columns, style)


def _gain_columns(found: SweepResult) -> list[str]:
    return ["gain on\nalone", "gain on\nsmoothed"][: 2 if found.grid.smoothing else 1]


def _gain_cells(gains: Sequence[Gain], found: SweepResult) -> list[str]:
    """Against the first baseline of either kind."""
    by_kind = {gain.baseline.kind: _gain(gain) for gain in reversed(gains)}
    return [by_kind.get(kind, "") for kind in (ALONE, SMOOTHED)][: len(_gain_columns(found))]


def _tabulated(rows: list[list[str]], columns: list[str], style: str) -> str:
    if style == "pipe":
        columns = [column.replace("\n", " ") for column in columns]
    align = ["left"] + ["right"] * (len(columns) - 1)
    return tabulate(rows, columns, tablefmt=style, colalign=align, disable_numparse=True)


def _setting_columns(asked: Grid) -> list[str]:
    """What is trained, and the listed options; a long name has two lines in a terminal."""
    return ["", *(grid.words(name).replace(" ", "\n") for name in asked.lists)]


def _student(setting: Setting, asked: Grid) -> list[str]:
    values = grid.describe(setting, asked)
    smoothed = f"smoothed {_value(setting.smoothing)}"
    kind = {ALONE: "alone", SMOOTHED: smoothed, DISTILLED: "distilled"}[setting.kind]
    return [kind, *(_value(values[name]) if name in values else "" for name in asked.lists)]


def _teacher(config: Config, asked: Grid) -> list[str]:
    values = [_value(getattr(config, name)) if name.startswith("teacher_") else "" for name in asked.lists]
    return ["teacher", *values]


def _measures(measured: Evaluation) -> list[str]:
    """Of all seeds, or of one teacher, which has no teacher itself."""

    def cell(values: Any, form: str, *, per_cent: bool = False) -> str:
        if values is None:
            return ""
        # Students that all but diverged.
        form = ".3g" if np.abs(values).max() >= 1e6 else form
        return spread(np.atleast_1d(values), form, per_cent=per_cent)

    return [
        cell(measured.errors, ".1f"),
        cell(measured.nll, ".3f"),
        cell(measured.ece, ".2f", per_cent=True),
        cell(measured.teacher_agreement, ".2f", per_cent=True),
        cell(measured.kl_to_teacher, ".3f"),
    ]


def _gain(gain: Gain) -> str:
    margin = "" if gain.comparison.margin is None else f" ± {gain.comparison.margin:.1f}"
    return f"{gain.comparison.mean_difference:+.1f}{margin}".replace("-", "−")


def _values(values: tuple[Any, ...]) -> str:
    return " ".join(map(_value, values))


def _value(value: Any) -> str:
    return grid.shown(value)
