"""What a sweep trains, as groups: teachers, every setting for the choice, and the chosen ones for the test."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from kd_jax.data.dataset import Dataset
from kd_jax.experiments import trials as group
from kd_jax.experiments.notebook import experiment
from kd_jax.experiments.notebook.config import METHODS, Config, ConfigError
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
from kd_jax.experiments.trials import Group
from kd_jax.methods.logits import CROSS_ENTROPY, LABEL_SMOOTHING, KDWeights, SmoothingWeights
from kd_jax.models.network import Network, count_parameters
from kd_jax.train import memory
from kd_jax.train.step import Hyperparameters


class Job(NamedTuple):
    """Settings that train side by side. group: what is trained. teacher: of distilled settings."""

    settings: list[Setting]
    group: Group
    network: Network
    most: int
    teacher: Config | None


def jobs(grid: Grid, dataset: Dataset) -> list[Job]:
    """All trainings of students, as few programs as there can be. dataset: the development split's.

    Raises `ConfigError` where a setting does not fit the data, or one training or what is kept of all the memory.
    """
    by_program: dict[Any, list[Setting]] = {}
    for setting in baselines(grid) + distilled(grid):
        by_program.setdefault(program_of(setting, grid), []).append(setting)
    found: list[Job] = []
    room = memory.host()
    for number, settings in enumerate(by_program.values()):
        kind, config, _ = settings[0]
        experiment.check(_one_seed(config), dataset)
        network = experiment.networks(config, dataset)[1]
        # In blocks, and put together.
        kept = 2 * 4 * len(settings) * config.seeds * parameters(network)
        if room is not None and kept > room:
            raise ConfigError(
                f"--seeds is {config.seeds}: the parameters of {len(settings) * config.seeds:,} students, kept until "
                f"all of them are measured, need {kept / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are free: choose "
                "fewer seeds or settings"
            )
        method = {ALONE: CROSS_ENTROPY, SMOOTHED: LABEL_SMOOTHING, DISTILLED: METHODS[config.method]}[kind]
        recipe = experiment.recipe(network, config.training, len(dataset.train_labels), method)
        name, given = f"{kind.replace(' ', '-')}-{number}", [_hyperparameters(setting) for setting in settings]
        one = Group(name, recipe, given, tuple(seeds(grid)), experiment.STUDENT, config.epochs)
        most, own = _at_once(network, config, dataset), teacher_of(settings[0], grid) if kind == DISTILLED else None
        found.append(Job(settings, one, network, most, own))
    return found


def jobs_of_the_test(todo: Sequence[Job], settings: Sequence[Setting], grid: Grid) -> list[Job]:
    """Those of `jobs` that train any of `settings`, with these alone and with other seeds."""
    found = []
    for job in todo:
        own = [setting for setting in job.settings if setting in settings]
        given = [_hyperparameters(setting) for setting in own]
        again = job.group._replace(name=_name_in_the_test(job), settings=given, seeds=tuple(seeds_of_the_test(grid)))
        found += [job._replace(settings=own, group=again)] if own else []
    return found


def _name_in_the_test(job: Job) -> str:
    return f"test-{job.group.name}"


def teachers(grid: Grid, dataset: Dataset) -> dict[Config, Group]:
    """The teachers to train. Raises as `jobs` does."""
    found = {}
    for number, config in enumerate(dict.fromkeys(teacher_of(setting, grid) for setting in distilled(grid))):
        experiment.check(_one_seed(config), dataset)
        training = config.teacher_training
        recipe = experiment.recipe(
            experiment.networks(config, dataset)[0],
            training,
            len(dataset.train_labels),
            max_norm=config.teacher_max_norm,
        )
        settings = [Hyperparameters(training.learning_rate)]
        found[config] = Group(
            f"teacher-{number}", recipe, settings, (config.seed,), experiment.TEACHER, training.epochs
        )
    return found


def costs(grid: Grid, dataset: Dataset) -> tuple[dict[str, float], float]:
    """For the progress bar: what a step of a block of trainings costs, by the group's name, and everything together.

    Of the trainings for the test, which nobody knows yet, the dearest of each kind and width counts.
    """
    each, total = {}, 0.0
    dearest: dict[Any, float] = {}
    for one, most in [(one, 1) for one in teachers(grid, dataset).values()]:
        each[one.name], whole = _cost(one, most, dataset)
        total += whole
    for job in jobs(grid, dataset):
        each[job.group.name], whole = _cost(job.group, job.most, dataset)
        total += whole
        tested = job.group._replace(settings=job.group.settings[:1])
        each[_name_in_the_test(job)], whole = _cost(tested, job.most, dataset)
        like = job.settings[0].kind, job.settings[0].config.student_hidden
        dearest[like] = max(whole, dearest.get(like, 0.0))
    return each, total + sum(dearest.values())


def _cost(one: Group, most: int, dataset: Dataset) -> tuple[float, float]:
    """Of a step of a block, and of the whole group."""
    blocks = group.blocks(len(one.settings), len(one.seeds), most)
    each = _cost_of_a_step(one) * len(blocks[0].settings) * len(blocks[0].seeds)
    return each, each * len(blocks) * one.epochs * (len(dataset.train_labels) // one.recipe.batch_size)


def _hyperparameters(setting: Setting) -> Hyperparameters:
    config = setting.config
    weights: Any = ()
    if setting.kind == DISTILLED:
        weights = KDWeights(config.alpha, config.temperature)
    elif setting.kind == SMOOTHED:
        weights = SmoothingWeights(setting.smoothing)
    return Hyperparameters(config.learning_rate, weights)


def _one_seed(config: Config) -> Config:
    """For checks: a sweep splits its seeds so that they fit."""
    return dataclasses.replace(config, seeds=1)


def _at_once(network: Network, config: Config, dataset: Dataset) -> int:
    layers, examples = experiment.layer_sizes(config.student_hidden, dataset), len(dataset.train_labels)
    one = memory.needed(network, layers, examples=examples, test_examples=len(dataset.test_labels))
    taught = experiment.teacher_bytes(examples, dataset.classes, config.shift)
    return group.trainings_at_once(one, config.batch_size, beside=taught)


def parameters(network: Network) -> int:
    """How many a network has."""
    return count_parameters(jax.eval_shape(network.init, jax.random.key(0))[0])


def _cost_of_a_step(one: Group) -> float:
    """Multiplications and parameters moved, roughly."""
    size = parameters(one.recipe.network)
    return float(size * (one.recipe.batch_size + 16) + 20_000 * one.recipe.batch_size)
