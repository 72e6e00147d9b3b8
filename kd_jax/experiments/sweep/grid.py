"""A grid of settings: every combination of the listed options, and the two baselines that each is paired with."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from kd_jax.errors import ConfigError
from kd_jax.experiments.notebook.config import Config, Training, check_steps
from kd_jax.experiments.shell.options import option

ALONE, SMOOTHED, DISTILLED = "alone", "label smoothing", "distilled"
"""The three kinds of student: labels alone, smoothed labels, a teacher."""

SINGLE = ("dataset", "preset", "seeds", "seed")
"""Options of which a sweep has one value."""

# What a compiled program takes as arrays.
_ARRAYS = ("learning_rate", "temperature", "alpha")
_TEACHER = tuple(name for name in Config.__dataclass_fields__ if name.startswith("teacher_"))
# What only a student with a teacher depends on.
_DISTILLATION = ("method", "method_option", "temperature", "alpha", *_TEACHER)


class Setting(NamedTuple):
    """One way to train a student. config: with single values everywhere. smoothing: of the labels, where smoothed."""

    kind: str
    config: Config
    smoothing: float = 0.0


class Grid(NamedTuple):
    """base: what no list is given for, the teacher's training resolved. lists: the listed options' values."""

    base: Config
    lists: dict[str, tuple[Any, ...]]
    smoothing: tuple[float, ...]


def make_grid(base: Config, lists: Mapping[str, tuple[Any, ...]], smoothing: tuple[float, ...]) -> Grid:
    """A checked `Grid`. The teacher's training is that of `base` where no option or list of its own is given.

    Raises `ConfigError` for a value that is out of its bounds or given twice.
    """
    pinned = {f"teacher_{name}": getattr(base.teacher_training, name) for name in Training._fields}
    # In one order, whatever that of the options: trainings are told apart by their place.
    ordered = {name: lists[name] for name in Config.__dataclass_fields__ if name in lists}
    grid = Grid(dataclasses.replace(base, **pinned), ordered, smoothing)
    if base.student or base.teacher:
        raise ConfigError(
            f"--preset is {base.preset}, which has networks of its own, and a sweep trains fully connected ones: use "
            "python -m kd_jax.run, or kd.compare from Python"
        )
    for setting in distilled(grid):
        check_steps(setting.config.training)
        if setting.config.make_method().teacher_features:
            raise ConfigError(
                f"--method is {setting.config.method}, which compares features, and a sweep keeps the teacher's logits "
                "alone: use python -m kd_jax.run, or kd.compare from Python"
            )
    for value in smoothing:
        if not 0 < value <= 1:
            raise ConfigError(f"--label-smoothing is {value}: it must be above 0 and at most 1")
    for name, values in {**lists, "label_smoothing": smoothing}.items():
        # What is trained is float32, which holds whatever is within its bounds.
        known = [np.float32(value) if isinstance(value, float) else value for value in values]
        twice = [values[i] for i, value in enumerate(known) if value in known[:i]]
        if twice:
            layers = ", and join the layers of one network by commas: 20,20" * name.endswith("hidden")
            raise ConfigError(f"{option(name)} has {shown(twice[0])} twice: give each value once{layers}")
    return grid


def distilled(grid: Grid) -> list[Setting]:
    """Every combination of the listed values, the last option running fastest. Raises `ConfigError`."""
    return [
        Setting(DISTILLED, dataclasses.replace(grid.base, **dict(zip(grid.lists, values, strict=True))))
        for values in itertools.product(*grid.lists.values())
    ]


def baselines(grid: Grid) -> list[Setting]:
    """The students without a teacher: for every training in the grid one alone, and one for each label smoothing."""
    alone = list(dict.fromkeys(alone_of(setting, grid) for setting in distilled(grid)))
    return alone + [Setting(SMOOTHED, one.config, value) for one in alone for value in grid.smoothing]


def alone_of(setting: Setting, grid: Grid) -> Setting:
    """The student on hard labels alone that was trained as `setting` was."""
    return Setting(ALONE, dataclasses.replace(setting.config, **{n: getattr(grid.base, n) for n in _DISTILLATION}))


def smoothed_of(setting: Setting, grid: Grid) -> list[Setting]:
    """The students on smoothed labels that were trained as `setting` was."""
    return [Setting(SMOOTHED, alone_of(setting, grid).config, value) for value in grid.smoothing]


def teacher_of(setting: Setting, grid: Grid) -> Config:
    """What the setting's teacher depends on; equal for settings with the same teacher."""
    return dataclasses.replace(grid.base, **{name: getattr(setting.config, name) for name in _TEACHER})


def program_of(setting: Setting, grid: Grid) -> tuple[str, Config]:
    """What is compiled for a setting; equal for settings that train side by side."""
    return setting.kind, dataclasses.replace(setting.config, **{name: getattr(grid.base, name) for name in _ARRAYS})


def seeds(grid: Grid) -> range:
    """Those that the settings are compared by."""
    return range(grid.base.seed, grid.base.seed + grid.base.seeds)


def seeds_of_the_test(grid: Grid) -> range:
    """As many others: the luck of those that the choice was made by is not to count."""
    first = grid.base.seed + grid.base.seeds
    return range(first, first + grid.base.seeds)


def first_unused_seed(grid: Grid) -> int:
    """The first of as many seeds that neither the choice nor the test knows. Raises `ConfigError`."""
    base = grid.base
    most = 2**31 - 3 * base.seeds
    if base.seed > most:
        raise ConfigError(
            f"--seed is {base.seed}: it must be at most {most}, as the test takes {base.seeds} seeds more and whoever "
            "trains the chosen setting again as many"
        )
    return base.seed + 2 * base.seeds


def of_the_distillation(name: str) -> bool:
    """Whether an option changes only how students are distilled, or their teacher, and so no baseline."""
    return name in _DISTILLATION


def describe(setting: Setting, grid: Grid) -> dict[str, Any]:
    """The listed options' values that a setting depends on, by name."""
    names = [name for name in grid.lists if setting.kind == DISTILLED or name not in _DISTILLATION]
    found = {name: getattr(setting.config, name) for name in names}
    return found | ({"label_smoothing": setting.smoothing} if setting.kind == SMOOTHED else {})


def label(setting: Setting, grid: Grid) -> str:
    """A setting in a few words."""
    found = describe(setting, grid)
    smoothed = f"with labels smoothed by {shown(found.pop('label_smoothing', 0))}"
    kind = {ALONE: "alone", SMOOTHED: smoothed, DISTILLED: "distilled"}[setting.kind]
    return ", ".join([kind, *(f"{words(name)} {shown(value)}" for name, value in found.items())])


def words(name: str) -> str:
    """A field of `Config` as it is read in a table."""
    return name.replace("_", " ").replace("warmup", "warm-up")


def shown(value: Any) -> str:
    """A value of an option as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)
