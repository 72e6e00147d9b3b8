"""The trainings of the table: the teacher, the trials of every method, and its students; each kept once it is done."""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kd_jax.data.batch import Batch
from kd_jax.data.dataset import Dataset
from kd_jax.evaluate import evaluate
from kd_jax.experiments.images import Images, Settings, padded
from kd_jax.experiments.methods import plan as table
from kd_jax.experiments.methods.kept import TEACHER, Found, KeptTrainings
from kd_jax.experiments.methods.networks import BEFORE_RELU, CLASS_MAPS, POOLED, STAGES
from kd_jax.experiments.methods.plan import Part, Parts, Plan
from kd_jax.experiments.methods.rows import MAP, ROWS, Row, Setting
from kd_jax.experiments.notebook import recipes
from kd_jax.experiments.notebook.experiment import TITLES
from kd_jax.experiments.shell.progress import Progress
from kd_jax.experiments.stage import Role
from kd_jax.experiments.trials import Trials, train_trials
from kd_jax.losses.vectors import unit
from kd_jax.methods import CrossEntropy, Method, cohort, members, with_classifier
from kd_jax.models import Model, to_module
from kd_jax.optimizers import adam
from kd_jax.teacher import CachedTeacher, cached
from kd_jax.train.checkpoint import CheckpointPolicy
from kd_jax.train.fit import fit
from kd_jax.train.step import is_finite

PyTree = Any

FEATURES = (*STAGES, BEFORE_RELU, POOLED, CLASS_MAPS)


class RowResult(NamedTuple):
    """What a row gave. chosen: its number; None where there is none to choose, or no trial is finite.

    trials: by number and seed. runs: by seed, none where no trial is finite.
    """

    chosen: float | None
    trials: list[Found]
    runs: list[Found]


class Results(NamedTuple):
    """teacher: its measures on development and test split. parameters: of teacher and student."""

    teacher: Found
    rows: dict[str, RowResult]


class Job(NamedTuple):
    """One training: of a row, with its number and a seed, measured on the part "development" or "test"."""

    row: str
    number: float | None
    seed: int
    part: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.row}-{'' if self.number is None else f'{self.number:g}-'}seed{self.seed}-{self.part}"


class Taught(NamedTuple):
    """The teacher and what it says: of the training images with features, and logits of the other two parts."""

    model: Model
    train: CachedTeacher
    logits: dict[str, CachedTeacher]


def run_table(
    names: Sequence[str], plan: Plan, dataset: Dataset, progress: Progress, policy: CheckpointPolicy,
    kept: KeptTrainings, tell: Callable[["Job", int, int, bool], None] = lambda job, done, total, trained: None,
) -> Results:  # fmt: skip
    """What all rows gave; what is kept is not trained again.

    tell: called after each training, with how many are done, of how many, and whether it was trained now.

    Raises what `train_trials` does for the teacher, and `OutputError` where the folder no longer takes a result. A
    student that is not finite is a result.
    """
    data = table.parts(plan, dataset)
    found = _teacher(plan, dataset, data, progress, policy, kept)
    training = _Students(plan, dataset, data, kept)
    total = sum(len(ROWS[name].values) * plan.trial_seeds + plan.seeds for name in names)
    done = 0

    def trained(job: Job) -> Found:
        nonlocal done
        known = training.known(job)
        result = training.result(job) if known is None else known
        done += 1
        tell(job, done, total, known is None)
        return result

    trials = {name: [trained(job) for job in jobs_of_trials(name, plan)] for name in names}
    chosen = {name: choose(ROWS[name], trials[name]) for name in names}
    runs: dict[str, list[Found]] = {name: [] for name in names}
    # All methods of one seed, and then of the next, so that a machine that gets slower does so for all.
    for seed in plan.all_seeds:
        for name in names:
            if ROWS[name].values and chosen[name] is None:
                done += 1
                continue
            runs[name].append(trained(Job(name, chosen[name], seed, "test")))
    return Results(found, {name: RowResult(chosen[name], trials[name], runs[name]) for name in names})


def jobs_of_trials(name: str, plan: Plan) -> list[Job]:
    """Every number with every seed of the trials."""
    numbers = ROWS[name].values
    return [Job(name, number, seed, "development") for number in numbers for seed in plan.all_trial_seeds]


def choose(row: Row, trials: Sequence[Found]) -> float | None:
    """The number with the fewest errors in the mean over its seeds, then the smallest NLL; None without finite ones."""
    ranked = []
    for number in row.values:
        own = [trial for trial in trials if trial["number"] == number]
        if own and all(trial["finite"] for trial in own):
            ranked.append((np.mean([t["errors"] for t in own]), np.mean([t["nll"] for t in own]), number))
    return min(ranked)[2] if ranked else None


def complete(names: Sequence[str], plan: Plan, kept: KeptTrainings) -> bool:
    """Whether all trainings of the rows are done."""
    if kept.read(TEACHER, {}) is None:
        return False
    for name in names:
        trials = [kept.read(job.name, job._asdict()) for job in jobs_of_trials(name, plan)]
        if None in trials:
            return False
        chosen = choose(ROWS[name], [one for one in trials if one is not None])
        jobs = [Job(name, chosen, seed, "test") for seed in plan.all_seeds]
        if (chosen is not None or not ROWS[name].values) and None in [kept.read(j.name, j._asdict()) for j in jobs]:
            return False
    return True


def _teacher(
    plan: Plan, dataset: Dataset, data: Parts, progress: Progress, policy: CheckpointPolicy, kept: KeptTrainings
) -> Found:
    """Trains the teacher, from its newest checkpoint on, and measures it. Its checkpoints stay, as a sign of a run."""
    known = kept.read(TEACHER, {})
    if known is not None:
        return known
    setup, training = table.teacher_setup(plan, dataset), plan.teacher_training
    settings = [Settings(training.learning_rate, CrossEntropy())]
    trials = Trials(TEACHER, setup, settings, (plan.seed,), Role.TEACHER, training.epochs, TITLES["teacher"])
    seen = Images(jnp.asarray(data.taught.train_images), jnp.asarray(data.taught.train_labels))
    trained = train_trials(trials, padded(seen, training.shift), progress, policy, most=1)
    kept.write_teacher(trained.variables)
    model = kept.read_teacher(table.networks(plan, dataset)[0])
    parts = {"train": data.train, "development": data.development, "test": data.test}
    found: Found = {name: evaluate(model, _batch(part)) for name, part in parts.items()}
    found["seconds"] = trained.train_s
    kept.write(TEACHER, {}, found)
    return found


class _Students:
    """Trains students, of one method after another, with programs that are compiled when they are first needed."""

    def __init__(self, plan: Plan, dataset: Dataset, data: Parts, kept: KeptTrainings) -> None:
        self.plan, self.dataset, self.data, self.kept = plan, dataset, data, kept
        self.student = table.networks(plan, dataset)[1]
        self.programs: dict[str, _Program] = {}
        self.batch = _batch(data.train)
        self.taught: Taught | None = None

    def known(self, job: Job) -> Found | None:
        """What a training gave before; None where it is not done."""
        return self.kept.read(job.name, job._asdict())

    def result(self, job: Job) -> Found:
        """What a training gives, which is kept."""
        found = self._train(job)
        self.kept.write(job.name, job._asdict(), found)
        return found

    def _train(self, job: Job) -> Found:
        taught = self._ask()
        if job.row not in self.programs:
            self.programs[job.row] = self._compile(ROWS[job.row], taught)
        program = self.programs[job.row]
        method = ROWS[job.row].make(0.0 if job.number is None else job.number, program.setting)
        key = jax.random.fold_in(jax.random.key(job.seed), Role.STUDENT)
        started, spent = time.perf_counter(), time.process_time()
        variables, loss, finite = jax.block_until_ready(program.run(key, self.batch, taught.train, method))
        seconds = time.perf_counter() - started
        # Of processors, other programs take no part in it; of other devices it says nothing.
        cost = time.process_time() - spent if jax.default_backend() == "cpu" else seconds
        found: Found = job._asdict() | {
            "finite": bool(finite), "seconds": seconds, "cost_s": cost, "temp_bytes": program.temp_bytes,
            "compile_s": program.compile_s, "loss": [float(one) for one in np.nan_to_num(loss, posinf=0, neginf=0)],
        }  # fmt: skip
        if finite:
            model = Model(program.model.network, variables)
            measured = members(model)[0] if ROWS[job.row].student == "cohort" else model
            part = self.data.development if job.part == "development" else self.data.test
            values = evaluate(measured, _batch(part), teacher=taught.logits[job.part])
            found |= values if all(map(np.isfinite, values.values())) else {"finite": False}
        return found

    def _ask(self) -> Taught:
        """The teacher's answers, once."""
        if self.taught is None:
            model = self.kept.read_teacher(table.networks(self.plan, self.dataset)[0])
            others = {"development": self.data.development, "test": self.data.test}
            logits = {name: cached(model, jnp.asarray(part.images)) for name, part in others.items()}
            self.taught = Taught(model, cached(model, self.batch, features=FEATURES), logits)
        return self.taught

    def _compile(self, row: Row, taught: Taught) -> "_Program":
        return compile_row(row, self.plan, self.student, taught.model, self.batch, taught.train)


class _Program(NamedTuple):
    """A training, compiled: `run(key, batch, teacher, method) -> (variables, loss of each epoch, whether finite)`."""

    run: Callable[..., tuple[PyTree, Float[Array, " epochs"], Array]]
    model: Model
    setting: Setting
    temp_bytes: int | None
    compile_s: float


def compile_row(row: Row, plan: Plan, student: Model, teacher: Model, batch: Batch, answers: CachedTeacher) -> _Program:
    """One program for all numbers and seeds of a row."""
    started = time.perf_counter()
    model, setting = student_of(row, student, teacher, batch), setting_of(plan, teacher, batch)
    training = plan.training
    optimizer = optimizer_of(training, len(batch.labels) // training.batch_size * training.epochs)

    def train(key: Any, batch: Batch, teacher: CachedTeacher, method: Method) -> tuple[PyTree, Array, Array]:
        state, history = fit(
            key, batch, model, method=method, optimizer=optimizer, epochs=training.epochs,
            batch_size=training.batch_size, teacher=teacher,
        )  # fmt: skip
        finite = jnp.all(jnp.isfinite(history["loss"])) & is_finite(state, model.network)
        return state.variables, history["loss"], finite

    method = row.make(row.values[0] if row.values else 0.0, setting)
    compiled = jax.jit(train).lower(jax.random.key(0), batch, answers, method).compile()
    memory = compiled.memory_analysis()
    return _Program(
        compiled, model, setting, None if memory is None else memory.temp_size_in_bytes, time.perf_counter() - started
    )


def student_of(row: Row, student: Model, teacher: Model, batch: Batch) -> Model:
    """The student that a row trains."""
    if row.student == "cohort":
        return cohort([student, student])
    if row.student == "simkd":
        kernel, bias = classifier_of(teacher)
        images = jax.ShapeDtypeStruct((2, *batch.inputs.shape[1:]), jnp.float32)
        return with_classifier(
            student, teacher, images, feature=MAP, teacher_feature=MAP, kernel=kernel, bias=bias
        )  # fmt: skip
    return student


def setting_of(plan: Plan, teacher: Model, batch: Batch) -> Setting:
    """What some methods are made of."""
    columns = unit(classifier_of(teacher)[0].T)
    count, training = len(batch.labels), plan.training
    return Setting(count, count // training.batch_size * training.epochs, (1 + columns @ columns.T) / 2)


def classifier_of(model: Model) -> tuple[Float[Array, "channels classes"], Float[Array, " classes"]]:
    """The last layer's kernel and bias."""
    module: Any = to_module(model)
    kernel = module.classes.kernel[...]
    return jnp.reshape(kernel, kernel.shape[-2:]), module.classes.bias[...]


@lru_cache(maxsize=16)
def optimizer_of(training: Any, steps: int) -> Any:
    """Adam with the schedule of a training of so many steps."""
    factor = recipes.schedule(training.schedule, steps, training.warmup)

    def rate(count: Array) -> Array:
        whole = jnp.float32(training.learning_rate)
        return whole if factor is None else whole * jnp.asarray(factor(count.astype(jnp.float32)), jnp.float32)

    return adam(rate)


def _batch(part: Part) -> Batch:
    labels = jnp.asarray(part.labels, jnp.int32)
    return Batch(jnp.asarray(part.images), labels, indices=jnp.arange(len(labels), dtype=jnp.int32))
