"""A whole grid: teachers, baselines and distilled students, compared on a development split; one test at the end."""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kd_jax import stats
from kd_jax.data.dataset import Dataset
from kd_jax.errors import RunError
from kd_jax.evaluate import Evaluation, evaluate_logits
from kd_jax.experiments import images as of_images
from kd_jax.experiments.images import Images
from kd_jax.experiments.notebook.config import Config
from kd_jax.experiments.shell.progress import Progress
from kd_jax.experiments.sweep import plan
from kd_jax.experiments.sweep.grid import (
    DISTILLED,
    Grid,
    Setting,
    alone_of,
    baselines,
    distilled,
    label,
    smoothed_of,
    teacher_of,
)
from kd_jax.experiments.sweep.plan import PlanEntry
from kd_jax.experiments.trials import Trials, blocks, train_trials
from kd_jax.models import Network
from kd_jax.teacher import LiveTeacher
from kd_jax.train.checkpoint import CheckpointPolicy


class Gain(NamedTuple):
    """A distilled setting against a baseline, in correct images, by seed."""

    baseline: Setting
    comparison: stats.Comparison


class SweepResult(NamedTuple):
    """What a sweep found.

    teachers: each one's measures on the development split, but for those that diverged. students: every setting's
    there, arrays `[seeds]`, but for those that diverged: a number of one of their seeds, or of their teacher, is not
    finite.
    gains: of every distilled setting against its baselines, corrected for `looked_at` comparisons: with the student
    alone and with that of every label smoothing, of which the best counts. chosen: for each
    width of the students the setting with the fewest errors there, the best of all first. tested: the chosen settings
    and their baselines on the test set, trained anew with `seeds_of_the_test`, but for those that then diverged.
    tested_teachers: their teachers there.
    test_gains: of the chosen ones, corrected for the number of all. parameters: of each width. examples: in training,
    development and test.
    """

    grid: Grid
    teachers: dict[Config, Evaluation]
    students: dict[Setting, Evaluation]
    diverged: list[Setting]
    gains: dict[Setting, list[Gain]]
    looked_at: int
    chosen: tuple[Setting, ...]
    tested: dict[Setting, Evaluation]
    diverged_in_test: list[Setting]
    tested_teachers: dict[Config, Evaluation]
    test_gains: dict[Setting, list[Gain]]
    parameters: dict[tuple[int, ...], int]
    examples: tuple[int, int, int]
    train_s: float
    total_s: float


def run_sweep(
    grid: Grid, dataset: Dataset, split: Dataset, progress: Progress, policy: CheckpointPolicy
) -> SweepResult:
    """The whole sweep. split: `development(dataset)`.

    The test images are read once: after the last epoch, for the chosen settings and their baselines, trained anew with
    other seeds. Raises `ConfigError`, what `train_trials` raises, and `RunError` where every teacher, or every
    distilled student, diverges.
    """
    started = time.perf_counter()
    training = _Training(grid, split, progress, policy)
    entries = plan.student_entries(grid, split)
    students, diverged = _compared(grid, training, entries, split)
    chosen = _best_of_each_width(students)
    compared = {setting: _baselines_of(setting, grid, students) for setting in chosen}
    again = plan.entries_of_the_test(entries, [*chosen, *itertools.chain(*compared.values())], grid)
    _keep_the_choice(policy, again, grid)
    teachers = {one: teacher_of(setting, grid) for setting in chosen for one in [setting, *compared[setting]]}
    tested, teachers_tested = _tested(training, again, teachers, dataset)
    finite = {setting: measured for setting, measured in tested.items() if _is_finite(measured)}
    pairs = {s: [one for one in several if {s, one} <= set(finite)] for s, several in compared.items()}
    number = sum(map(len, pairs.values()))
    return SweepResult(
        grid,
        training.measured,
        students,
        diverged,
        *_gains(grid, students),
        chosen,
        finite,
        [setting for setting in tested if setting not in finite],
        teachers_tested,
        {setting: [_gain(setting, one, finite, number) for one in several] for setting, several in pairs.items()},
        {entry.settings[0].config.student_hidden: plan.parameters(entry.network) for entry in entries},
        (len(split.train_labels), len(split.test_labels), len(dataset.test_labels)),
        training.train_s,
        time.perf_counter() - started,
    )


class _Training:
    """Trains the teachers, and then whatever students it is given.

    taught: the teachers. measured: each one's measures on the development split. Those that diverge are left out.

    Raises what `train_trials` does; `RunError` where all of them diverge.
    """

    def __init__(self, grid: Grid, split: Dataset, progress: Progress, policy: CheckpointPolicy) -> None:
        self.data = Images(jnp.asarray(split.train_images), jnp.asarray(split.train_labels))
        self.progress, self.policy = progress, policy
        self.taught: dict[Config, _Teacher] = {}
        self.measured: dict[Config, Evaluation] = {}
        failures = []
        for config, trials in plan.teacher_trials(grid, split).items():
            try:
                taught = _Teacher(trials, self.data, progress, policy)
                self.measured[config] = _of_teacher(taught.logits(split.test_images), split)
                self.taught[config] = taught
            except RunError as error:
                failures.append(error)
                self._pass_over(trials, 1)
        if not self.taught:
            raise failures[0]
        self.train_s = sum(one.trained.train_s for one in self.taught.values())

    def train(self, entries: Sequence[PlanEntry], then: Callable[[Setting, Network, Any], None]) -> None:
        """Tells `then` of every setting its network and its variables `[seeds, ...]`, entry by entry.

        Settings whose teacher diverged are passed over.
        """
        possible = []
        for entry in entries:
            if entry.teacher is None or entry.teacher in self.taught:
                possible.append(entry)
            else:
                self._pass_over(entry.trials, entry.most)
        for entry in sorted(possible, key=partial(_teachers_in_turn, list(self.taught))):
            own = self.taught[entry.teacher] if entry.teacher else None
            for other in self.taught.values():
                if other is not own:
                    other.forget_outputs()
            given = _given(self.data, entry, own)
            result = train_trials(entry.trials, given, self.progress, self.policy, most=entry.most, tolerant=True)
            self.train_s += result.train_s
            for i, setting in enumerate(entry.settings):
                then(setting, entry.network, jax.tree.map(lambda leaf, i=i: leaf[i], result.variables))
            # Before those of the next entry are there.
            del given, result

    def _pass_over(self, trials: Trials, most: int) -> None:
        """Tells that nothing of the trials is left to do: for the time that is left, not for the speed."""
        number = len(blocks(len(trials.settings), len(trials.seeds), most))
        steps = number * (len(self.data.labels) // trials.setup.batch_size)
        self.progress.start(trials.stage_name(0), epochs=trials.epochs, steps=steps, done=trials.epochs * steps)


def _compared(
    grid: Grid, training: _Training, entries: Sequence[PlanEntry], split: Dataset
) -> tuple[dict[Setting, Evaluation], list[Setting]]:
    """Every setting's measures on the development split, and those that diverged. Raises `RunError` if all of them did.

    A baseline is compared with the first teacher, where there are several.
    """
    logits = {config: one.logits(split.test_images) for config, one in training.taught.items()}
    first = next(iter(logits))
    own = {setting: entry.teacher or first for entry in entries for setting in entry.settings}
    measured: dict[Setting, Evaluation] = {}

    def measure(setting: Setting, network: Network, variables: Any) -> None:
        measured[setting] = _measured(variables, network, split, logits[own[setting]])

    training.train(entries, measure)
    ordered = [*baselines(grid), *distilled(grid)]
    students = {s: measured[s] for s in ordered if s in measured and _is_finite(measured[s])}
    if not any(setting.kind == DISTILLED for setting in students):
        raise RunError("no distilled student has a finite loss to its end: choose smaller learning rates")
    return students, [setting for setting in ordered if setting not in students]


def _tested(
    training: _Training, entries: Sequence[PlanEntry], teachers: dict[Setting, Config], dataset: Dataset
) -> tuple[dict[Setting, Evaluation], dict[Config, Evaluation]]:
    """Measures on the test set, after the last epoch: of every setting, with its own of `teachers`, and of these."""
    trained: dict[Setting, tuple[Network, Any]] = {}

    def keep(setting: Setting, network: Network, variables: Any) -> None:
        trained[setting] = network, variables

    training.train(entries, keep)
    logits = {one: training.taught[one].logits(dataset.test_images) for one in dict.fromkeys(teachers.values())}
    tested = {}
    for setting, own in teachers.items():
        network, variables = trained[setting]
        tested[setting] = _measured(variables, network, dataset, logits[own])
    return tested, {config: _of_teacher(own, dataset) for config, own in logits.items()}


def _keep_the_choice(policy: CheckpointPolicy, entries: Sequence[PlanEntry], grid: Grid) -> None:
    """Forgets checkpoints of another choice, such as that of an earlier version: their shapes are the same."""
    if policy.store is None:
        return
    choice = {entry.trials.name: [label(setting, grid) for setting in entry.settings] for entry in entries}
    before = policy.store.notes.get("tested", {})
    for name in before:
        if choice.get(name) != before[name]:
            policy.store.forget(name)
    policy.store.note(tested=choice)


class _Teacher:
    """A trained teacher, whose outputs are computed once for each shift that is asked for."""

    def __init__(self, trials: Trials, data: Images, progress: Progress, policy: CheckpointPolicy) -> None:
        padded = of_images.padded(data, trials.setup.shift)
        self.trained = train_trials(trials, padded, progress, policy, most=1)
        self.network = trials.setup.network
        self.variables = jax.tree.map(lambda leaf: jnp.asarray(leaf[0, 0]), self.trained.variables)
        self._outputs: tuple[int, Any] | None = None

    def outputs(self, data: Images, shift: int) -> Float[Array, "..."]:
        if self._outputs is None or self._outputs[0] != shift:
            self._outputs = None
            found = of_images.teacher_logits(self.variables, data.images, network=self.network, shift=shift)
            self._outputs = (shift, found)
        return self._outputs[1]

    def forget_outputs(self) -> None:
        self._outputs = None

    def logits(self, images: Any) -> Float[Array, "examples classes"]:
        return of_images.predict(self.variables, jnp.asarray(images), network=self.network)


def _of_teacher(logits: Float[Array, "examples classes"], dataset: Dataset) -> Evaluation:
    """What a teacher's logits of the test part are worth. Raises `RunError` for what would not be written."""
    measured: Evaluation = jax.tree.map(np.asarray, evaluate_logits(logits, jnp.asarray(dataset.test_labels)))
    if not _is_finite(measured):
        raise RunError(
            "a measure of the teacher is not finite after the last step: choose a smaller --teacher-learning-rate"
        )
    return measured


def _teachers_in_turn(known: list[Config], entry: PlanEntry) -> tuple[int, int]:
    """A key that puts those with the same teacher and the same views together, so that few outputs are kept at once."""
    return known.index(entry.teacher) + 1 if entry.teacher else 0, entry.trials.setup.shift


def _given(data: Images, entry: PlanEntry, own: _Teacher | None) -> Images:
    shift = entry.trials.setup.shift
    given = of_images.padded(data, shift)
    if own and entry.trials.setup.prepare is not None:
        return given._replace(teacher=LiveTeacher(own.network, own.variables))
    return given._replace(logits=own.outputs(data, shift)) if own else given


def _measured(
    variables: Any, network: Network, dataset: Dataset, teacher_logits: Float[Array, "examples classes"]
) -> Evaluation:
    """Measures of every seed on the test part of `dataset`."""
    images, labels = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    found = _evaluate_each(variables, images, labels, teacher_logits, network=network)
    return jax.tree.map(np.asarray, found)


def _is_finite(measured: Evaluation) -> bool:
    return all(np.isfinite(values).all() for values in measured if values is not None)


@partial(jax.jit, static_argnames="network")
def _evaluate_each(
    variables: Any, images: Array, labels: Int[Array, " examples"], teacher_logits: Array, *, network: Network
) -> Evaluation:
    def one(own: Any) -> Evaluation:
        return evaluate_logits(of_images.predict(own, images, network=network), labels, teacher_logits)

    return jax.lax.map(one, variables)


def _gains(grid: Grid, students: dict[Setting, Evaluation]) -> tuple[dict[Setting, list[Gain]], int]:
    """`SweepResult.gains` and `SweepResult.looked_at`."""
    settings = [setting for setting in distilled(grid) if setting in students]
    compared = {setting: _baselines_of(setting, grid, students, best=False) for setting in settings}
    number = sum(one in students for s in settings for one in [alone_of(s, grid), *smoothed_of(s, grid)])
    return {s: [_gain(s, baseline, students, number) for baseline in compared[s]] for s in settings}, number


def _baselines_of(
    setting: Setting, grid: Grid, students: dict[Setting, Evaluation], *, best: bool = True
) -> list[Setting]:
    """The student alone and the one with the best smoothing, both trained as `setting`; and the best of that width."""
    found = [one for one in [alone_of(setting, grid)] if one in students]
    smoothed = [one for one in smoothed_of(setting, grid) if one in students]
    found += [_best(smoothed, students)] if smoothed else []
    every = [one for one in students if one.kind != DISTILLED and _same_width(one, setting)]
    found += [_best(every, students)] if best and every else []
    return list(dict.fromkeys(found))


def _best_of_each_width(students: dict[Setting, Evaluation]) -> tuple[Setting, ...]:
    """Wider students make fewer errors; the best of all would answer for the widest alone."""
    settings = [setting for setting in students if setting.kind == DISTILLED]
    best: dict[tuple[int, ...], Setting] = {}
    for setting in sorted(settings, key=lambda setting: rank(students[setting])):
        best.setdefault(setting.config.student_hidden, setting)
    return tuple(best.values())


def _same_width(one: Setting, other: Setting) -> bool:
    return one.config.student_hidden == other.config.student_hidden


def _best(settings: Sequence[Setting], students: dict[Setting, Evaluation]) -> Setting:
    return min(settings, key=lambda s: rank(students[s]))


def rank(measured: Evaluation) -> tuple[float, float]:
    """What settings are chosen by: the fewest errors in the mean over the seeds, then the smallest NLL."""
    return float(np.mean(measured.errors)), float(np.mean(measured.nll))


def _gain(setting: Setting, baseline: Setting, measured: dict[Setting, Evaluation], comparisons: int) -> Gain:
    before, after = measured[baseline].correct, measured[setting].correct
    return Gain(baseline, stats.paired_comparison(before, after, metric="correct", comparisons=comparisons))
