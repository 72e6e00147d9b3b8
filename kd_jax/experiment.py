"""One experiment: teacher, then students alone, then the same students distilled, for all seeds."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kd_jax import memory, phase, stats
from kd_jax.checkpoint import Checkpoint, CheckpointError, Store
from kd_jax.config import METHODS, Config, ConfigError
from kd_jax.data import Dataset
from kd_jax.evaluate import Evaluation, evaluate, predict
from kd_jax.methods import KDWeights
from kd_jax.models import Network, Output, count_parameters, mlp
from kd_jax.phase import TITLES, Course, Keeping, Phase, Progress
from kd_jax.train import Examples, Hyperparameters, Metrics, Recipe

# Folded into the seed, so that a teacher and a student of the same seed share nothing.
_TEACHER, _STUDENT = 0, 1


class PhaseTiming(NamedTuple):
    """compile_s, train_s: seconds; the phases compile at once, so their compile_s overlap.

    steps, steps_per_s: of all seeds together.
    """

    compile_s: float
    train_s: float
    steps: int
    steps_per_s: float


class Trained(NamedTuple):
    """One kind of model after its phase; every array has a leading axis of seeds.

    parameters: the number of them in one model. history: `Metrics` of arrays `[seeds, reports]`, and `epochs` the
    moment of each report, in epochs. answers: classes of the test images, `[seeds, test examples]`.
    """

    seeds: tuple[int, ...]
    parameters: int
    params: Any
    state: Any
    evaluations: Evaluation
    answers: Int[np.ndarray, "seeds examples"]
    history: Metrics
    epochs: Float[np.ndarray, " reports"]
    timing: PhaseTiming


class Result(NamedTuple):
    """What an experiment found.

    compile_s: seconds for compiling all phases, which they do at once. teacher_outputs_s: seconds for the teacher's
    outputs on the training set. total_s: from the start to the end; of a resumed run, of the last process.
    """

    config: Config
    teacher: Trained
    student: Trained
    distilled: Trained
    comparison: stats.Comparison
    compile_s: float
    teacher_outputs_s: float
    total_s: float


def models(result: Result) -> dict[str, Trained]:
    """The three kinds of model by name, in the order of their training."""
    return {name: getattr(result, name) for name in TITLES}


def networks(config: Config, dataset: Dataset) -> tuple[Network, Network]:
    """The teacher's and the student's `Network`."""
    teacher = mlp(layer_sizes(config.teacher_hidden, dataset), dropout=config.teacher_dropout)
    return teacher, mlp(layer_sizes(config.student_hidden, dataset))


def layer_sizes(hidden: tuple[int, ...], dataset: Dataset) -> tuple[int, ...]:
    """Hidden sizes with the number of pixels before and the number of classes after them."""
    return (int(np.prod(dataset.image_shape)), *hidden, dataset.classes)


def run(config: Config, dataset: Dataset, progress: Progress, keeping: Keeping = Keeping()) -> Result:  # noqa: B008
    """The whole experiment, from the newest checkpoints on where the store of `keeping` has some.

    The test images are read once, after the last epoch of each phase. Raises `ConfigError` where `config` does not fit
    `dataset`, `RunError` where a run fails, and what `phase.run` and `Store.newest` raise.
    """
    check(config, dataset)
    restored = _restored(keeping.store)
    started = time.perf_counter()
    examples = Examples(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
    phases = _prepare(config, dataset, examples, keeping)
    compile_s = time.perf_counter() - started
    trials = {name: phase.trial(prepared, examples) for name, prepared in phases.items() if name != "distilled"}
    trials["distilled"] = trials["student"]
    left = {
        name: 1 - (restored[name].step / (p.epochs * p.steps) if name in restored else 0) for name, p in phases.items()
    }
    progress.compiled(compile_s, config.epochs * sum(trials[name] * left[name] for name in phases))

    def train(name: str, examples: Examples, **more: Any) -> Trained:
        course = phase.run(phases[name], examples, progress, keeping, restored.get(name))
        return _examined(phases[name], course, dataset, **more)

    teacher = train("teacher", examples)
    teacher_params, teacher_state = jax.tree.map(lambda leaf: leaf[0], (teacher.params, teacher.state))
    predict_teacher = partial(predict, teacher_params, teacher_state, network=phases["teacher"].recipe.network)
    test_logits = predict_teacher(jnp.asarray(dataset.test_images))
    student = train("student", examples, teacher_logits=test_logits)
    predicting = time.perf_counter()
    taught = examples._replace(teacher=Output(jax.block_until_ready(predict_teacher(examples.images))))
    teacher_outputs_s = time.perf_counter() - predicting
    distilled = train("distilled", taught, teacher_logits=test_logits)

    comparison = stats.paired_comparison(
        np.asarray(student.evaluations.correct), np.asarray(distilled.evaluations.correct), metric="correct"
    )
    total_s = time.perf_counter() - started
    return Result(config, teacher, student, distilled, comparison, compile_s, teacher_outputs_s, total_s)


def _restored(store: Store | None) -> dict[str, Checkpoint]:
    """The newest good checkpoint of every phase that has one. Raises `CheckpointError`."""
    if store is None:
        return {}
    newest = {name: store.newest(name) for name in TITLES}
    for before, name in itertools.pairwise(newest):
        if newest[name] and not newest[before]:
            raise CheckpointError(
                f"{store.folder} has checkpoints of the {TITLES[name]} and none of the {TITLES[before]}: "
                "start the run again, in another folder or with --overwrite"
            )
    return {name: checkpoint for name, checkpoint in newest.items() if checkpoint}


def _prepare(config: Config, dataset: Dataset, examples: Examples, keeping: Keeping) -> dict[str, Phase]:
    """The three phases, compiled at once: XLA lets go of Python's lock while it compiles."""
    teacher_network, student_network = networks(config, dataset)
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    shape = (len(dataset.train_labels), dataset.classes)
    untaught = examples._replace(teacher=jax.eval_shape(lambda: Output(jnp.zeros(shape, jnp.float32))))
    recipes = {
        "teacher": Recipe(teacher_network, batch_size=config.batch_size),
        "student": Recipe(student_network, batch_size=config.batch_size),
        "distilled": Recipe(student_network, METHODS[config.method], batch_size=config.batch_size),
    }

    def prepare(name: str) -> Phase:
        own = seeds[:1] if name == "teacher" else seeds
        rate, alpha, temperature = (
            jnp.full(len(own), value, jnp.float32) for value in (config.learning_rate, config.alpha, config.temperature)
        )
        hyperparameters = Hyperparameters(rate, KDWeights(alpha, temperature) if name == "distilled" else ())
        given = untaught if name == "distilled" else examples
        role = _TEACHER if name == "teacher" else _STUDENT
        return phase.prepare(
            name, recipes[name], hyperparameters, own, role, given, epochs=config.epochs, every=keeping.every
        )

    pool = ThreadPoolExecutor()
    try:
        preparing = {name: pool.submit(prepare, name) for name in recipes}
        return {name: prepared.result() for name, prepared in preparing.items()}
    finally:
        # An interrupt does not wait for what is being compiled.
        pool.shutdown(wait=False, cancel_futures=True)


def check(config: Config, dataset: Dataset) -> None:
    """Raises `ConfigError` where `config` does not fit `dataset`, or the networks do not fit into memory."""
    config.check_against(len(dataset.train_labels))
    free = memory.available()
    if free is None:
        return
    hidden = {"--teacher-hidden": config.teacher_hidden, "--student-hidden": config.student_hidden}
    for (name, sizes), network, seeds in zip(hidden.items(), networks(config, dataset), (1, config.seeds), strict=True):
        layers, examples, tests = layer_sizes(sizes, dataset), len(dataset.train_labels), len(dataset.test_labels)
        one = memory.needed(network, layers, examples=examples, test_examples=tests)
        needs, batch = f"that needs {{}}, and {_gib(free)} are free:", config.batch_size
        if one.fixed > free:
            shown = " ".join(map(str, sizes))
            raise ConfigError(f"{name} is {shown}: {needs.format(_gib(one.fixed))} choose smaller sizes")
        if one.total(batch) > free:
            most = (free - one.fixed) // one.per_image
            raise ConfigError(
                f"--batch-size is {batch}: {needs.format(_gib(one.total(batch)))} it must be at most {most:,}"
            )
        if seeds * one.total(batch) > free:
            most = free // one.total(batch)
            raise ConfigError(
                f"--seeds is {seeds}: {needs.format(_gib(seeds * one.total(batch)))} it must be at most {most:,}"
            )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _examined(
    trained: Phase,
    course: Course,
    dataset: Dataset,
    *,
    teacher_logits: Float[Array, "examples classes"] | None = None,
) -> Trained:
    """Reads the test set, once."""
    states = course.states
    logits = jax.vmap(partial(predict, network=trained.recipe.network), in_axes=(0, 0, None))(
        states.params, states.state, jnp.asarray(dataset.test_images)
    )
    labels = jnp.asarray(dataset.test_labels)
    evaluations = jax.vmap(evaluate, in_axes=(0, None, None))(logits, labels, teacher_logits)
    steps = trained.epochs * trained.steps
    for measure in jax.tree.leaves(evaluations):
        bad = ~np.isfinite(np.asarray(measure))
        phase.require_finite(trained, bad, "the loss on the test images", f"after the last step, {steps:,},")
    total = steps * len(trained.seeds)
    return Trained(
        seeds=trained.seeds,
        parameters=count_parameters(jax.tree.map(lambda leaf: leaf[0], states.params)),
        params=states.params,
        state=states.state,
        evaluations=jax.tree.map(np.asarray, evaluations),
        answers=np.asarray(jnp.argmax(logits, axis=-1)),
        history=course.history,
        epochs=course.moments,
        timing=PhaseTiming(trained.compile_s, course.train_s, total, total / course.train_s),
    )
