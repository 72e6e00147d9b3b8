"""One experiment: teacher, then students alone, then the same students distilled, for all seeds."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from numpy.typing import ArrayLike

from kd_jax import memory, stats, train
from kd_jax.config import METHODS, Config, ConfigError
from kd_jax.data import Dataset
from kd_jax.evaluate import Evaluation, evaluate, predict
from kd_jax.methods import KDWeights
from kd_jax.models import Network, Output, count_parameters, mlp
from kd_jax.train import Examples, Hyperparameters, Metrics, Recipe, TrainState

# About this many times a phase tells how far it is; more would cost time, fewer would leave the user waiting.
_REPORTS_PER_EPOCH = 25

# Folded into the seed, so that a teacher and a student of the same seed share nothing.
_TEACHER, _STUDENT = 0, 1


class RunError(RuntimeError):
    """A run that failed; one sentence that says where, and what to change."""


@runtime_checkable
class Progress(Protocol):
    """Who is told how far the experiment is."""

    def compiled(self, seconds: float, estimate: float) -> None:
        """Every program is compiled; training will take about `estimate` seconds."""

    def start(self, phase: str, *, epochs: int, steps: int) -> None:
        """A phase of `epochs` epochs of `steps` steps begins."""

    def advance(self, *, epoch: int, steps: int, metrics: Metrics, seconds: float) -> None:
        """`steps` more steps of `epoch` (from 0) took `seconds`; `metrics` of them are arrays `[seeds]`."""

    def finish(self) -> None:
        """The phase ended, well or not."""


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
    outputs on the training set. total_s: from the start to the end.
    """

    config: Config
    teacher: Trained
    student: Trained
    distilled: Trained
    comparison: stats.Comparison
    compile_s: float
    teacher_outputs_s: float
    total_s: float


class _Phase(NamedTuple):
    name: str
    recipe: Recipe
    hyperparameters: Hyperparameters
    seeds: tuple[int, ...]
    keys: Key[Array, " seeds"]
    init: Callable[..., Any]
    order: Callable[..., Any]
    chunks: Mapping[int, Callable[..., Any]]
    compile_s: float


TITLES = {"teacher": "teacher", "student": "student alone", "distilled": "distilled student"}
"""What a person calls the three kinds of model, in the order of their training."""


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


def run(config: Config, dataset: Dataset, progress: Progress) -> Result:
    """The whole experiment. Raises `ConfigError` where `config` does not fit `dataset`, `RunError` where a run fails.

    The test images are read once, after the last epoch of each phase.
    """
    check(config, dataset)
    started = time.perf_counter()
    examples = Examples(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
    teacher_network, student_network = networks(config, dataset)
    teacher_recipe = Recipe(teacher_network, batch_size=config.batch_size)
    alone_recipe = Recipe(student_network, batch_size=config.batch_size)
    distilled_recipe = Recipe(student_network, METHODS[config.method], batch_size=config.batch_size)
    alone = Hyperparameters(jnp.float32(config.learning_rate))
    weights = KDWeights(jnp.float32(config.alpha), jnp.float32(config.temperature))
    distilling = alone._replace(weights=weights)
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    shape = (len(dataset.train_labels), dataset.classes)
    untaught = examples._replace(teacher=jax.eval_shape(lambda: Output(jnp.zeros(shape, jnp.float32))))

    # XLA lets go of Python's lock while it compiles.
    pool = ThreadPoolExecutor()
    try:
        preparing = [
            pool.submit(_prepare, "teacher", teacher_recipe, alone, (config.seed,), _TEACHER, examples),
            pool.submit(_prepare, "student", alone_recipe, alone, seeds, _STUDENT, examples),
            pool.submit(_prepare, "distilled", distilled_recipe, distilling, seeds, _STUDENT, untaught),
        ]
        teacher_phase, student_phase, distilled_phase = [prepared.result() for prepared in preparing]
    finally:
        # An interrupt does not wait for what is being compiled.
        pool.shutdown(wait=False, cancel_futures=True)
    compile_s = time.perf_counter() - started
    estimate = config.epochs * (_trial(teacher_phase, examples) + 2 * _trial(student_phase, examples))
    progress.compiled(compile_s, estimate)

    teacher = _train(teacher_phase, examples, config, dataset, progress)
    teacher_params, teacher_state = jax.tree.map(lambda leaf: leaf[0], (teacher.params, teacher.state))
    predict_teacher = partial(predict, teacher_params, teacher_state, network=teacher_network)
    test_logits = predict_teacher(jnp.asarray(dataset.test_images))
    student = _train(student_phase, examples, config, dataset, progress, teacher_logits=test_logits)
    predicting = time.perf_counter()
    taught = examples._replace(teacher=Output(jax.block_until_ready(predict_teacher(examples.images))))
    teacher_outputs_s = time.perf_counter() - predicting
    distilled = _train(distilled_phase, taught, config, dataset, progress, teacher_logits=test_logits)

    comparison = stats.paired_comparison(
        np.asarray(student.evaluations.correct), np.asarray(distilled.evaluations.correct), metric="correct"
    )
    total_s = time.perf_counter() - started
    return Result(config, teacher, student, distilled, comparison, compile_s, teacher_outputs_s, total_s)


def check(config: Config, dataset: Dataset) -> None:
    """Raises `ConfigError` where `config` does not fit `dataset`, or the networks do not fit into memory."""
    config.check_against(len(dataset.train_labels))
    free = memory.available()
    if free is None:
        return
    sizes = {"examples": len(dataset.train_labels), "test_examples": len(dataset.test_labels)}
    teacher, student = [memory.needed(n, classes=dataset.classes, **sizes) for n in networks(config, dataset)]
    if teacher > free:
        raise ConfigError(
            f"--teacher-hidden is {' '.join(map(str, config.teacher_hidden))}: that needs {_gib(teacher)}, "
            f"and {_gib(free)} are free: choose smaller sizes"
        )
    if student > free:
        raise ConfigError(
            f"--student-hidden is {' '.join(map(str, config.student_hidden))}: that needs {_gib(student)}, "
            f"and {_gib(free)} are free: choose smaller sizes"
        )
    if config.seeds * student > free:
        raise ConfigError(
            f"--seeds is {config.seeds}: that needs {_gib(config.seeds * student)}, and {_gib(free)} are free: "
            f"it must be at most {free // student:,}"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


@partial(jax.jit, static_argnames="recipe")
def _init(keys: Key[Array, " seeds"], hyperparameters: Hyperparameters, *, recipe: Recipe) -> TrainState:
    return jax.vmap(lambda key: train.init(key, hyperparameters, recipe=recipe))(keys)


@partial(jax.jit, static_argnames=("examples", "batch_size"))
def _order(
    keys: Key[Array, " seeds"], epoch: Int[Array, ""], *, examples: int, batch_size: int
) -> Int[Array, "seeds steps batch"]:
    return jax.vmap(lambda key: train.epoch_order(key, epoch, examples=examples, batch_size=batch_size))(keys)


@partial(jax.jit, static_argnames=("recipe", "steps"), donate_argnums=0)
def _train_chunk(
    states: TrainState,
    keys: Key[Array, " seeds"],
    examples: Examples,
    order: Int[Array, "seeds all_steps batch"],
    start: Int[Array, ""],
    hyperparameters: Hyperparameters,
    *,
    recipe: Recipe,
    steps: int,
) -> tuple[TrainState, Metrics]:
    """`steps` steps of an epoch from `start` on, of all seeds together."""
    rows = jax.lax.dynamic_slice_in_dim(order, start, steps, axis=1)

    def one_seed(state: TrainState, key: Key[Array, ""], own: Array) -> tuple[TrainState, Metrics]:
        return train.train_steps(state, key, examples, own, hyperparameters, recipe=recipe)

    if len(keys) > 1:
        return jax.vmap(one_seed)(states, keys, rows)
    # On a CPU a batched matrix product is slower, also with a batch of one: a teacher would train at half its speed.
    alone = jax.tree.map(lambda leaf: leaf[0], (states, keys, rows))
    return jax.tree.map(lambda leaf: leaf[None], one_seed(*alone))


def chunk_lengths(steps: int, reports: int = _REPORTS_PER_EPOCH) -> list[int]:
    """An epoch of `steps` steps in about `reports` chunks; equal ones where they divide it, else the last is shorter.

    Each distinct length is a program to compile, so there are at most two.
    """
    fewest = -(-steps // max(1, steps // reports))
    for chunks in range(min(fewest, steps), min(2 * reports, steps) + 1):
        if steps % chunks == 0:
            return [steps // chunks] * chunks
    length = -(-steps // reports)
    return [length] * (steps // length) + [steps % length] * (steps % length > 0)


def _prepare(
    name: str, recipe: Recipe, hyperparameters: Hyperparameters, seeds: tuple[int, ...], role: int, examples: Examples
) -> _Phase:
    """Compiles what a phase runs, before anything is trained."""
    started = time.perf_counter()
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), role))(jnp.asarray(seeds))
    count, batch_size = len(examples.labels), recipe.batch_size
    init = _init.lower(keys, hyperparameters, recipe=recipe).compile()
    order = _order.lower(keys, jnp.int32(0), examples=count, batch_size=batch_size).compile()
    states = jax.eval_shape(partial(_init, recipe=recipe), keys, hyperparameters)
    orders = jax.ShapeDtypeStruct((len(seeds), count // batch_size, batch_size), jnp.int32)
    chunks = {
        steps: _train_chunk.lower(
            states, keys, examples, orders, jnp.int32(0), hyperparameters, recipe=recipe, steps=steps
        ).compile()
        for steps in sorted(set(chunk_lengths(count // batch_size)))
    }
    return _Phase(name, recipe, hyperparameters, seeds, keys, init, order, chunks, time.perf_counter() - started)


def _steps(phase: _Phase, examples: Examples) -> int:
    return len(examples.labels) // phase.recipe.batch_size


def _trial(phase: _Phase, examples: Examples) -> float:
    """Seconds that an epoch would take, from a chunk of it that is thrown away."""
    states, order = phase.init(phase.keys, phase.hyperparameters), phase.order(phase.keys, jnp.int32(0))
    length = max(phase.chunks)
    jax.block_until_ready((states, order))
    started = time.perf_counter()
    jax.block_until_ready(
        phase.chunks[length](states, phase.keys, examples, order, jnp.int32(0), phase.hyperparameters)
    )
    return (time.perf_counter() - started) * _steps(phase, examples) / length


def _chunks(phase: _Phase, examples: Examples, epochs: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, first step, number of steps) of every chunk of a phase."""
    for epoch in range(epochs):
        start = 0
        for length in chunk_lengths(_steps(phase, examples)):
            yield epoch, start, length
            start += length


def _train(
    phase: _Phase,
    examples: Examples,
    config: Config,
    dataset: Dataset,
    progress: Progress,
    *,
    teacher_logits: Float[Array, "examples classes"] | None = None,
) -> Trained:
    """Trains all seeds of a phase, and reads the test set once at the end."""
    steps = _steps(phase, examples)
    progress.start(phase.name, epochs=config.epochs, steps=steps)
    started = time.perf_counter()
    try:
        states, history, moments = _train_chunks(phase, examples, config, progress)
    finally:
        progress.finish()
    train_s = time.perf_counter() - started
    logits = jax.vmap(partial(predict, network=phase.recipe.network), in_axes=(0, 0, None))(
        states.params, states.state, jnp.asarray(dataset.test_images)
    )
    labels = jnp.asarray(dataset.test_labels)
    evaluations = jax.vmap(evaluate, in_axes=(0, None, None))(logits, labels, teacher_logits)
    for measure in jax.tree.leaves(evaluations):
        _check_finite(phase, measure, f"after its last step, {config.epochs * steps:,},")
    total = config.epochs * steps * len(phase.seeds)
    return Trained(
        seeds=phase.seeds,
        parameters=count_parameters(jax.tree.map(lambda leaf: leaf[0], states.params)),
        params=states.params,
        state=states.state,
        evaluations=jax.tree.map(np.asarray, evaluations),
        answers=np.asarray(jnp.argmax(logits, axis=-1)),
        history=history,
        epochs=moments,
        timing=PhaseTiming(phase.compile_s, train_s, total, total / train_s),
    )


def _train_chunks(
    phase: _Phase, examples: Examples, config: Config, progress: Progress
) -> tuple[TrainState, Metrics, Float[np.ndarray, " reports"]]:
    states, order = phase.init(phase.keys, phase.hyperparameters), None
    history, moments, per_epoch = [], [], _steps(phase, examples)
    for epoch, start, length in _chunks(phase, examples, config.epochs):
        began = time.perf_counter()
        if start == 0:
            order = phase.order(phase.keys, jnp.int32(epoch))
        states, metrics = phase.chunks[length](
            states, phase.keys, examples, order, jnp.int32(start), phase.hyperparameters
        )
        metrics = jax.tree.map(np.asarray, metrics)
        first = epoch * per_epoch + start
        _check_finite(phase, metrics.loss, f"between steps {first:,} and {first + length:,}")
        history.append(metrics)
        moments.append(epoch + (start + length) / per_epoch)
        progress.advance(epoch=epoch, steps=length, metrics=metrics, seconds=time.perf_counter() - began)
    return states, jax.tree.map(lambda *values: np.stack(values, axis=-1), *history), np.asarray(moments)


def _check_finite(phase: _Phase, values: ArrayLike, when: str) -> None:
    """Raises `RunError` unless the values, one for each seed, are finite."""
    bad = ~np.isfinite(np.asarray(values))
    if bad.any():
        rate, weights = float(phase.hyperparameters.learning_rate), phase.hyperparameters.weights
        soft = f" and --temperature {float(weights.temperature):g}" if isinstance(weights, KDWeights) else ""
        other = " or another temperature" if soft else ""
        raise RunError(
            f"the loss of the {TITLES[phase.name]} with seed {phase.seeds[int(np.argmax(bad))]} is not finite {when} "
            f"at --learning-rate {rate:g}{soft}: choose a smaller learning rate{other}"
        )
