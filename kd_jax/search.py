"""A whole grid: teachers, baselines and distilled students, compared on a development split; one test at the end."""

import dataclasses
import time
from collections.abc import Callable, Sequence
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
    and their baselines on the test set, trained anew with `seeds_of_the_test`, but for those that then diverged.
    tested_teachers: their teachers there.
    test_gains: of the chosen ones, corrected for the number of all. examples: in training, development and test.
    """

    grid: Grid
    teachers: dict[Config, Evaluation]
    students: dict[Setting, Evaluation]
    diverged: list[Setting]
    gains: dict[Setting, list[Gain]]
    chosen: tuple[Setting, ...]
    tested: dict[Setting, Evaluation]
    diverged_in_test: list[Setting]
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
        kept = 2 * len(settings) * config.seeds * _parameter_bytes(network)
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
        like = job.settings[0].kind, _width(job.settings[0])
        dearest[like] = max(whole, dearest.get(like, 0.0))
    return each, total + sum(dearest.values())


def _cost(one: Group, most: int, dataset: Dataset) -> tuple[float, float]:
    """Of a step of a block, and of the whole group."""
    blocks = group.blocks(len(one.settings), len(one.seeds), most)
    each = _cost_of_a_step(one) * len(blocks[0].settings) * len(blocks[0].seeds)
    return each, each * len(blocks) * one.epochs * (len(dataset.train_labels) // one.recipe.batch_size)


def run(grid: Grid, dataset: Dataset, split: Dataset, progress: Progress, keeping: Keeping) -> Found:
    """The whole sweep. split: `data.development(dataset)`.

    The test images are read once: after the last epoch, for the chosen settings and their baselines, trained anew with
    other seeds. Raises `ConfigError`, what `group.run` raises, and `RunError` for a teacher's measure, or every
    distilled student's, that is not finite.
    """
    started = time.perf_counter()
    examples = Examples(jnp.asarray(split.train_images), jnp.asarray(split.train_labels))
    taught = {config: _Teacher(one, examples, progress, keeping) for config, one in teachers(grid, split).items()}
    heard = {config: one.logits(split.test_images) for config, one in taught.items()}
    teachers_measured = {config: _of_teacher(logits, split) for config, logits in heard.items()}
    first = next(iter(taught))
    train_s = sum(one.trained.train_s for one in taught.values())

    def train(todo: Sequence[Job], then: Callable[[Setting, Network, Any, Config], None]) -> None:
        """Trains the jobs; `then` is told every setting's network, parameters and teacher, the first if it has none."""
        nonlocal train_s
        for job in sorted(todo, key=partial(_teachers_in_turn, list(taught))):
            own = taught[job.teacher] if job.teacher else None
            for other in taught.values():
                if other is not own:
                    other.forget_outputs()
            result = group.run(job.group, _given(examples, job, own), progress, keeping, most=job.most, tolerant=True)
            train_s += result.train_s
            for i, setting in enumerate(job.settings):
                own_parameters = jax.tree.map(lambda leaf, i=i: leaf[i], (result.params, result.state))
                then(setting, job.network, own_parameters, job.teacher or first)
            del result

    measured: dict[Setting, Evaluation] = {}

    def measure(setting: Setting, network: Network, parameters: Any, own: Config) -> None:
        measured[setting] = _measured(parameters, network, split, heard[own])

    todo = jobs(grid, split)
    train(todo, measure)
    ordered = {setting: measured[setting] for setting in baselines(grid) + distilled(grid)}
    students = {setting: own for setting, own in ordered.items() if _is_finite(own)}
    if not any(setting.kind == DISTILLED for setting in students):
        raise RunError("no distilled student has a finite loss to its end: choose smaller learning rates")
    chosen = _best_of_each_width(students)
    compared = {setting: _baselines_of(setting, grid, students) for setting in chosen}
    to_test = list(dict.fromkeys([*chosen, *(one for several in compared.values() for one in several)]))
    _keep_the_choice(keeping, jobs_of_the_test(todo, to_test, grid), grid)
    trained: dict[Setting, tuple[Network, Any]] = {}
    train(
        jobs_of_the_test(todo, to_test, grid),
        lambda setting, network, parameters, own: trained.update({setting: (network, parameters)}),
    )
    own = {one: teacher_of(setting, grid) for setting in chosen for one in [*compared[setting], setting]}
    asked = {config: taught[config].logits(dataset.test_images) for config in dict.fromkeys(own.values())}
    tested = {}
    for setting in to_test:
        network, parameters = trained[setting]
        tested[setting] = _measured(parameters, network, dataset, asked[own[setting]])
    finite = {setting: found for setting, found in tested.items() if _is_finite(found)}
    pairs = {s: [one for one in several if {s, one} <= set(finite)] for s, several in compared.items()}
    number = sum(map(len, pairs.values()))
    return Found(
        grid,
        teachers_measured,
        students,
        [setting for setting in ordered if setting not in students],
        _gains(grid, students),
        chosen,
        finite,
        [setting for setting in tested if setting not in finite],
        {config: _of_teacher(logits, dataset) for config, logits in asked.items()},
        {setting: [_gain(setting, one, finite, number) for one in several] for setting, several in pairs.items()},
        (len(split.train_labels), len(split.test_labels), len(dataset.test_labels)),
        train_s,
        time.perf_counter() - started,
    )


def _keep_the_choice(keeping: Keeping, todo: Sequence[Job], grid: Grid) -> None:
    """Forgets checkpoints of another choice, such as that of an earlier version: their shapes are the same."""
    if keeping.store is None:
        return
    choice = {job.group.name: [label(setting, grid) for setting in job.settings] for job in todo}
    before = keeping.store.notes.get("tested", {})
    for name in before:
        if choice.get(name) != before[name]:
            keeping.store.forget(name)
    keeping.store.note(tested=choice)


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


def _of_teacher(logits: Float[Array, "examples classes"], dataset: Dataset) -> Evaluation:
    """What a teacher's logits of the test part are worth. Raises `RunError` for what would not be written."""
    measured: Evaluation = jax.tree.map(np.asarray, evaluate(logits, jnp.asarray(dataset.test_labels)))
    if not _is_finite(measured):
        raise RunError("a measure of the teacher is not finite after the last step: choose a smaller learning rate")
    return measured


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
