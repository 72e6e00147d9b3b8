"""A whole grid: teachers, baselines and distilled students, compared on a development split; one test at the end."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kd_jax import experiment, group, memory, stats, teacher
from kd_jax.config import METHODS, Config, ConfigError
from kd_jax.data import Dataset
from kd_jax.evaluate import Evaluation, evaluate, predict
from kd_jax.grid import (
    ALONE,
    DISTILLED,
    SMOOTHED,
    Grid,
    Setting,
    alone_of,
    baselines,
    distilled,
    label,
    program_of,
    smoothed_of,
    teacher_of,
)  # fmt: skip
from kd_jax.group import Group
from kd_jax.methods import CROSS_ENTROPY, LABEL_SMOOTHING, KDWeights, SmoothingWeights
from kd_jax.models import Network, count_parameters
from kd_jax.phase import Keeping, Progress, RunError
from kd_jax.train import Examples, Hyperparameters


class Gain(NamedTuple):
    """A distilled setting against a baseline, in correct images, by seed."""

    baseline: Setting
    comparison: stats.Comparison


class Found(NamedTuple):
    """What a sweep found.

    teachers: each one's measures on the development split. students: every setting's there, arrays `[seeds]`, but for
    those that diverged: a number of one of their seeds is not finite.
    gains: of every distilled setting against its baselines, corrected for all of these comparisons. chosen: for each
    width of the students the setting with the fewest errors there, the best of all first. tested: the chosen settings
    and their baselines on the test set, trained anew with `test_seeds`. tested_teachers: their teachers there.
    test_gains: of the chosen ones, corrected for the number of all. examples: in training, development and test.
    """

    grid: Grid
    teachers: dict[Config, Evaluation]
    students: dict[Setting, Evaluation]
    diverged: list[Setting]
    gains: dict[Setting, list[Gain]]
    chosen: tuple[Setting, ...]
    tested: dict[Setting, Evaluation]
    tested_teachers: dict[Config, Evaluation]
    test_gains: dict[Setting, list[Gain]]
    examples: tuple[int, int, int]
    train_s: float
    total_s: float


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
    return _jobs(baselines(grid) + distilled(grid), grid, dataset, seeds(grid))


def test_jobs(settings: Sequence[Setting], grid: Grid, dataset: Dataset) -> list[Job]:
    """The trainings of the chosen setting and its baselines whose students meet the test set. Raises as `jobs` does."""
    return _jobs(settings, grid, dataset, test_seeds(grid), "test-")


def seeds(grid: Grid) -> range:
    """Those that the settings are compared by."""
    return range(grid.base.seed, grid.base.seed + grid.base.seeds)


def test_seeds(grid: Grid) -> range:
    """As many others: the luck of those that the choice was made by is not to count. Raises `ConfigError`."""
    base = grid.base
    if base.seed > 2**31 - 2 * base.seeds:
        raise ConfigError(
            f"--seed is {base.seed}: it must be at most {2**31 - 2 * base.seeds}, as the test takes {base.seeds} seeds "
            "more"
        )
    first = base.seed + base.seeds
    return range(first, first + grid.base.seeds)


def _jobs(settings: Sequence[Setting], grid: Grid, dataset: Dataset, seeds: range, prefix: str = "") -> list[Job]:
    by_program: dict[Any, list[Setting]] = {}
    for setting in settings:
        by_program.setdefault(program_of(setting, grid), []).append(setting)
    found: list[Job] = []
    room = memory.host()
    for number, side_by_side in enumerate(by_program.values()):
        kind, config, _ = side_by_side[0]
        experiment.check(_one_seed(config), dataset)
        network = experiment.networks(config, dataset)[1]
        kept = len(side_by_side) * len(seeds) * _parameter_bytes(network)
        if room is not None and kept > room:
            raise ConfigError(
                f"--seeds is {len(seeds)}: the parameters of {len(side_by_side) * len(seeds):,} students, kept until "
                f"all of them are measured, need {kept / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are free: choose "
                "fewer seeds or settings"
            )
        method = {ALONE: CROSS_ENTROPY, SMOOTHED: LABEL_SMOOTHING, DISTILLED: METHODS[config.method]}[kind]
        recipe = experiment.recipe(network, config.training, len(dataset.train_labels), method)
        name = f"{prefix}{kind.replace(' ', '-')}-{number}"
        trained = [_hyperparameters(setting) for setting in side_by_side]
        one = Group(name, recipe, trained, tuple(seeds), experiment.STUDENT, config.epochs)
        most = _at_once(network, config, dataset)
        found.append(
            Job(side_by_side, one, network, most, teacher_of(side_by_side[0], grid) if kind == DISTILLED else None)
        )
    return found


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

    Of the trainings for the test it counts those of the first setting of each width, as nobody knows which are chosen.
    """
    todo = [(one, 1) for one in teachers(grid, dataset).values()]
    todo += [(job.group, job.most) for job in jobs(grid, dataset)]
    first = {_width(setting): setting for setting in reversed(distilled(grid))}
    tested = [s for one in first.values() for s in (one, alone_of(one, grid), *smoothed_of(one, grid)[:1])]
    todo += [(job.group, job.most) for job in test_jobs(tested, grid, dataset)]
    each, total = {}, 0.0
    for one, most in todo:
        blocks = group.blocks(len(one.settings), len(one.seeds), most)
        each[one.name] = _cost_of_a_step(one) * len(blocks[0].settings) * len(blocks[0].seeds)
        steps = one.epochs * (len(dataset.train_labels) // one.recipe.batch_size)
        total += each[one.name] * len(blocks) * steps
    return each, total


def run(grid: Grid, dataset: Dataset, split: Dataset, progress: Progress, keeping: Keeping) -> Found:
    """The whole sweep. split: `data.development(dataset)`.

    The test images are read once: for the chosen setting and its baselines, trained anew with other seeds, after the
    last epoch. Raises
    `ConfigError`, what `group.run` raises, and `RunError` for a measure that is not finite.
    """
    started = time.perf_counter()
    examples = Examples(jnp.asarray(split.train_images), jnp.asarray(split.train_labels))
    taught = {config: _Teacher(one, examples, progress, keeping) for config, one in teachers(grid, split).items()}
    teachers_measured = {config: one.measured(split) for config, one in taught.items()}
    first = next(iter(taught.values()))
    train_s = sum(one.trained.train_s for one in taught.values())

    def trained(todo: Sequence[Job]) -> Iterator[tuple[Setting, Network, Any, _Teacher]]:
        """Every setting with its network, parameters and teacher: the first one where it has none of its own."""
        nonlocal train_s
        for job in sorted(todo, key=partial(_teachers_in_turn, list(taught))):
            own = taught[job.teacher] if job.teacher else None
            for other in taught.values():
                if other is not own:
                    other.forget_outputs()
            result = group.run(job.group, _given(examples, job, own), progress, keeping, most=job.most, tolerant=True)
            train_s += result.train_s
            for i, setting in enumerate(job.settings):
                parameters = jax.tree.map(lambda leaf, i=i: leaf[i], (result.params, result.state))
                yield setting, job.network, parameters, own or first

    students = {
        setting: _measured(parameters, network, split, own.logits(split.test_images))
        for setting, network, parameters, own in trained(jobs(grid, split))
    }
    students = {setting: students[setting] for setting in baselines(grid) + distilled(grid)}
    diverged = [setting for setting, measured in students.items() if not _is_finite(measured)]
    students = {setting: measured for setting, measured in students.items() if setting not in diverged}
    if not any(setting.kind == DISTILLED for setting in students):
        raise RunError("no distilled student has a finite loss to its end: choose smaller learning rates")
    gains = _gains(grid, students)
    chosen = _best_of_each_width(students)
    compared = {setting: _baselines_of(setting, grid, students) for setting in chosen}
    to_test = list(dict.fromkeys([*chosen, *(one for several in compared.values() for one in several)]))
    again = {setting: rest for setting, *rest in trained(test_jobs(to_test, grid, split))}
    test_logits = {config: one.logits(dataset.test_images) for config, one in taught.items()}
    own = {one: teacher_of(setting, grid) for setting in chosen for one in [*compared[setting], setting]}
    tested = {
        setting: _finite(
            _measured(again[setting][1], again[setting][0], dataset, test_logits[own[setting]]),
            f"student {label(setting, grid)} with the seeds of the test",
        )
        for setting in to_test
    }
    number = sum(map(len, compared.values()))
    return Found(
        grid,
        teachers_measured,
        students,
        diverged,
        gains,
        chosen,
        tested,
        {config: taught[config].measured(dataset) for config in dict.fromkeys(own.values())},
        {setting: [_gain(setting, one, tested, number) for one in several] for setting, several in compared.items()},
        (len(split.train_labels), len(split.test_labels), len(dataset.test_labels)),
        train_s,
        time.perf_counter() - started,
    )


class _Teacher:
    """A trained teacher, whose outputs are computed once for each shift that is asked for."""

    def __init__(self, one: Group, examples: Examples, progress: Progress, keeping: Keeping) -> None:
        given = experiment.given(examples, one.recipe.shift)
        self.trained = group.run(one, given, progress, keeping, most=1)
        self.network = one.recipe.network
        self.parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf[0, 0]), (self.trained.params, self.trained.state))
        self._outputs: tuple[int, Any] | None = None

    def outputs(self, examples: Examples, shift: int) -> Any:
        if self._outputs is None or self._outputs[0] != shift:
            self._outputs = None
            params, state = self.parameters
            found = teacher.outputs(params, state, examples.images, network=self.network, shift=shift)
            self._outputs = (shift, found)
        return self._outputs[1]

    def forget_outputs(self) -> None:
        self._outputs = None

    def logits(self, images: Any) -> Float[Array, "examples classes"]:
        return predict(*self.parameters, jnp.asarray(images), network=self.network)

    def measured(self, split: Dataset) -> Evaluation:
        measured = evaluate(self.logits(split.test_images), jnp.asarray(split.test_labels))
        return _finite(jax.tree.map(np.asarray, measured), "teacher")


def _teachers_in_turn(known: list[Config], job: Job) -> tuple[int, int]:
    """A key that puts jobs with the same teacher and the same views together, so that few outputs are kept at once."""
    return known.index(job.teacher) + 1 if job.teacher else 0, job.group.recipe.shift


def _given(examples: Examples, job: Job, own: _Teacher | None) -> Examples:
    shift = job.group.recipe.shift
    given = experiment.given(examples, shift)
    return given._replace(teacher=own.outputs(examples, shift)) if own else given


def _measured(
    parameters: Any, network: Network, dataset: Dataset, teacher_logits: Float[Array, "examples classes"]
) -> Evaluation:
    """Measures of every seed on the test part of `dataset`."""
    images, labels = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    found = _evaluate_each(parameters, images, labels, teacher_logits, network=network)
    return jax.tree.map(np.asarray, found)


def _is_finite(measured: Evaluation) -> bool:
    return all(np.isfinite(values).all() for values in measured if values is not None)


def _finite(measured: Evaluation, who: str) -> Evaluation:
    """What was measured. Raises `RunError` for what is no number, which would be neither ranked nor written."""
    if not _is_finite(measured):
        raise RunError(f"a measure of the {who} is not finite after the last step: choose a smaller learning rate")
    return measured


@partial(jax.jit, static_argnames="network")
def _evaluate_each(
    parameters: Any, images: Array, labels: Int[Array, " examples"], teacher_logits: Array, *, network: Network
) -> Evaluation:
    def one(own: Any) -> Evaluation:
        return evaluate(predict(*own, images, network=network), labels, teacher_logits)

    return jax.lax.map(one, parameters)


def _gains(grid: Grid, students: dict[Setting, Evaluation]) -> dict[Setting, list[Gain]]:
    settings = [setting for setting in distilled(grid) if setting in students]
    compared = {setting: _baselines_of(setting, grid, students, best=False) for setting in settings}
    number = sum(map(len, compared.values()))
    return {s: [_gain(s, baseline, students, number) for baseline in compared[s]] for s in settings}


def _baselines_of(
    setting: Setting, grid: Grid, students: dict[Setting, Evaluation], *, best: bool = True
) -> list[Setting]:
    """The student alone and the one with the best smoothing, both trained as `setting`; and the best of that width."""
    found = [one for one in [alone_of(setting, grid)] if one in students]
    smoothed = [one for one in smoothed_of(setting, grid) if one in students]
    found += [_best(smoothed, students)] if smoothed else []
    every = [one for one in students if one.kind != DISTILLED and _width(one) == _width(setting)]
    found += [_best(every, students)] if best and every else []
    return list(dict.fromkeys(found))


def _best_of_each_width(students: dict[Setting, Evaluation]) -> tuple[Setting, ...]:
    """Wider students make fewer errors; the best of all would answer for the widest alone."""
    settings = [setting for setting in students if setting.kind == DISTILLED]
    widths = dict.fromkeys(map(_width, settings))
    best = [_best([setting for setting in settings if _width(setting) == width], students) for width in widths]
    return tuple(sorted(best, key=lambda setting: rank(students[setting])))


def _width(setting: Setting) -> tuple[int, ...]:
    return setting.config.student_hidden


def _best(settings: Sequence[Setting], students: dict[Setting, Evaluation]) -> Setting:
    return min(settings, key=lambda s: rank(students[s]))


def rank(measured: Evaluation) -> tuple[float, float]:
    """What settings are chosen by: the fewest errors in the mean over the seeds, then the smallest NLL."""
    return float(np.mean(measured.errors)), float(np.mean(measured.nll))


def _gain(setting: Setting, baseline: Setting, measured: dict[Setting, Evaluation], comparisons: int) -> Gain:
    before, after = measured[baseline].correct, measured[setting].correct
    return Gain(baseline, stats.paired_comparison(before, after, metric="correct", comparisons=comparisons))


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


def _parameter_bytes(network: Network) -> int:
    params, _ = jax.eval_shape(network.init, jax.random.key(0))
    return 4 * count_parameters(params)


def _cost_of_a_step(one: Group) -> float:
    """Multiplications and parameters moved, roughly."""
    size = _parameter_bytes(one.recipe.network) // 4
    return float(size * (one.recipe.batch_size + 16) + 20_000 * one.recipe.batch_size)
