"""What a sweep trains: teachers, every setting for the choice, and the chosen ones for the test."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from kd_jax.data.dataset import Dataset
from kd_jax.experiments.images import Settings
from kd_jax.experiments.notebook import fits, recipes
from kd_jax.experiments.notebook.config import Config
from kd_jax.experiments.notebook.experiment import TITLES
from kd_jax.experiments.stage import Role
from kd_jax.experiments.sweep.grid import (  # fmt: skip
    ALONE,
    DISTILLED,
    SMOOTHED,
    Grid,
    Setting,
    baselines,
    distilled,
    program_of,
    seeds,
    seeds_of_the_test,
    teacher_of,
)
from kd_jax.experiments.trials import Trials, blocks
from kd_jax.methods import CrossEntropy, LabelSmoothing, Method
from kd_jax.models import Network, count_parameters


class PlanEntry(NamedTuple):
    """Settings that train side by side, as `trials`. most: at once. teacher: of distilled settings."""

    settings: list[Setting]
    trials: Trials
    network: Network
    most: int
    teacher: Config | None


def student_entries(grid: Grid, dataset: Dataset) -> list[PlanEntry]:
    """All trainings of students, as few programs as there can be. dataset: the development split's.

    Raises `ConfigError` where a setting does not fit the data, or one training or what is kept of all the memory.
    """
    by_program: dict[Any, list[Setting]] = {}
    for setting in baselines(grid) + distilled(grid):
        by_program.setdefault(program_of(setting, grid), []).append(setting)
    entries: list[PlanEntry] = []
    for number, settings in enumerate(by_program.values()):
        kind, config, _ = settings[0]
        fits.check(_one_seed(config), dataset)
        network = recipes.networks(config, dataset)[1]
        students = len(settings) * config.seeds
        whose, remedy = f"{students:,} students, kept until all of them are measured,", "choose fewer seeds or settings"
        fits.check_kept(network, students, whose, seeds=config.seeds, remedy=remedy)
        setup = recipes.make_setup(network, config.training, len(dataset.train_labels))
        name, given = f"{kind.replace(' ', '-')}-{number}", [_settings(setting) for setting in settings]
        title = TITLES["distilled"] if kind == DISTILLED else ""
        trials = Trials(name, setup, given, tuple(seeds(grid)), Role.STUDENT, config.epochs, title)
        teacher = teacher_of(settings[0], grid) if kind == DISTILLED else None
        count = len(dataset.train_labels)
        most = fits.at_once(network, config.student_hidden, config.training, dataset, examples=count)
        entries.append(PlanEntry(settings, trials, network, most, teacher))
    return entries


def entries_of_the_test(entries: Sequence[PlanEntry], settings: Sequence[Setting], grid: Grid) -> list[PlanEntry]:
    """Those of the `entries` that train any of `settings`, with these alone and with other seeds."""
    again = []
    for entry in entries:
        tested = [setting for setting in entry.settings if setting in settings]
        if tested:
            given = [_settings(setting) for setting in tested]
            trials = _in_the_test(entry.trials)._replace(settings=given, seeds=tuple(seeds_of_the_test(grid)))
            again.append(entry._replace(settings=tested, trials=trials))
    return again


def _in_the_test(trials: Trials) -> Trials:
    return trials._replace(name=f"test-{trials.name}", title="")


def teacher_trials(grid: Grid, dataset: Dataset) -> dict[Config, Trials]:
    """The teachers to train. Raises as `student_entries` does."""
    trials = {}
    for number, config in enumerate(dict.fromkeys(teacher_of(setting, grid) for setting in distilled(grid))):
        fits.check(_one_seed(config), dataset)
        training = config.teacher_training
        setup = recipes.make_setup(
            recipes.networks(config, dataset)[0],
            training,
            len(dataset.train_labels),
            max_norm=config.teacher_max_norm,
        )
        settings = [Settings(training.learning_rate, CrossEntropy())]
        title = TITLES["teacher"]
        trials[config] = Trials(
            f"teacher-{number}", setup, settings, (config.seed,), Role.TEACHER, training.epochs, title
        )
    return trials


def costs(grid: Grid, dataset: Dataset) -> tuple[dict[str, float], float]:
    """For the progress bar: what a step of a block costs, by the name of the trials, and everything together.

    Of the trainings for the test, which nobody knows yet, the dearest of each kind and width counts.
    """
    each, total = {}, 0.0
    dearest: dict[Any, float] = {}
    for trials in teacher_trials(grid, dataset).values():
        each[trials.name], whole = _cost(trials, 1, dataset)
        total += whole
    for entry in student_entries(grid, dataset):
        each[entry.trials.name], whole = _cost(entry.trials, entry.most, dataset)
        total += whole
        tested = _in_the_test(entry.trials)._replace(settings=entry.trials.settings[:1])
        each[tested.name], whole = _cost(tested, entry.most, dataset)
        like = entry.settings[0].kind, entry.settings[0].config.student_hidden
        dearest[like] = max(whole, dearest.get(like, 0.0))
    return each, total + sum(dearest.values())


def words(grid: Grid, dataset: Dataset) -> dict[str, str]:
    """What the progress bar calls the trials, by their name: their kind, and which of that kind they are.

    How many the test has is not known before.
    """
    entries = student_entries(grid, dataset)
    named = _counted("teacher", list(teacher_trials(grid, dataset).values()))
    for kind in (ALONE, SMOOTHED, DISTILLED):
        named |= _counted(kind, [entry.trials for entry in entries if entry.settings[0].kind == kind])
    return named | {_in_the_test(entry.trials).name: f"test: {entry.settings[0].kind}" for entry in entries}


def _counted(kind: str, several: Sequence[Trials]) -> dict[str, str]:
    if len(several) == 1:
        return {several[0].name: kind}
    return {trials.name: f"{kind} {place} of {len(several)}" for place, trials in enumerate(several, start=1)}


def _cost(trials: Trials, most: int, dataset: Dataset) -> tuple[float, float]:
    """Of a step of a block, and of all trials."""
    parts = blocks(len(trials.settings), len(trials.seeds), most)
    each = _cost_of_a_step(trials) * len(parts[0].settings) * len(parts[0].seeds)
    return each, each * len(parts) * trials.epochs * (len(dataset.train_labels) // trials.setup.batch_size)


def _settings(setting: Setting) -> Settings:
    config = setting.config
    method: Method = CrossEntropy()
    if setting.kind == DISTILLED:
        method = config.make_method()
    elif setting.kind == SMOOTHED:
        method = LabelSmoothing(setting.smoothing)
    return Settings(config.learning_rate, method)


def _one_seed(config: Config) -> Config:
    """For checks: a sweep splits its seeds so that they fit."""
    return dataclasses.replace(config, seeds=1)


def parameters(network: Network) -> int:
    """How many a network has."""
    return count_parameters(network.split(jax.eval_shape(network.init, jax.random.key(0)))[0])


def _cost_of_a_step(trials: Trials) -> float:
    """Multiplications and parameters moved, roughly."""
    size = parameters(trials.setup.network)
    return float(size * (trials.setup.batch_size + 16) + 20_000 * trials.setup.batch_size)
