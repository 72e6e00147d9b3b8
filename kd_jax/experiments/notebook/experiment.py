"""One experiment: teacher, then students alone, then the same students distilled, for all seeds."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kd_jax import errors, optimizers, stats, teacher
from kd_jax.data import shifts as augment
from kd_jax.data.dataset import Dataset
from kd_jax.errors import CheckpointError, ConfigError
from kd_jax.evaluate import Evaluation, evaluate, predict
from kd_jax.experiments import stage as stages
from kd_jax.experiments import stage_loop
from kd_jax.experiments.notebook.config import METHODS, Config, Training
from kd_jax.experiments.shell.progress import Progress, StageName
from kd_jax.experiments.stage import Role, Stage
from kd_jax.experiments.stage_loop import StageHistory
from kd_jax.methods.logits import CROSS_ENTROPY, KDWeights, Method
from kd_jax.models.network import Network, Output, count_parameters, mlp
from kd_jax.train import memory
from kd_jax.train.checkpoint import Checkpoint, CheckpointPolicy, Store
from kd_jax.train.step import Examples, Hyperparameters, Metrics, Recipe

TITLES = {"teacher": "teacher", "student": "student alone", "distilled": "distilled student"}
"""What a person calls the three kinds of model, in the order of their training."""


class StageTiming(NamedTuple):
    """compile_s, train_s: seconds; the stages compile at once, so their compile_s overlap.

    steps, steps_per_s: of all seeds together.
    """

    compile_s: float
    train_s: float
    steps: int
    steps_per_s: float


class TrainedModels(NamedTuple):
    """One kind of model after its stage; every array has a leading axis of seeds.

    parameters: the number of them in one model. history: `Metrics` of arrays `[seeds, reports]`, and `epochs` when
    each report was, in epochs. answers: classes of the test images, `[seeds, test examples]`.
    """

    seeds: tuple[int, ...]
    parameters: int
    params: Any
    state: Any
    evaluations: Evaluation
    answers: Int[np.ndarray, "seeds examples"]
    history: Metrics
    epochs: Float[np.ndarray, " reports"]
    timing: StageTiming


class Result(NamedTuple):
    """What an experiment found.

    compile_s: seconds for compiling all stages, which they do at once. teacher_outputs_s: seconds for the teacher's
    outputs on the training set. total_s: from the start to the end; of a resumed run, of the last process.
    """

    config: Config
    teacher: TrainedModels
    student: TrainedModels
    distilled: TrainedModels
    comparison: stats.Comparison
    compile_s: float
    teacher_outputs_s: float
    total_s: float


def models(result: Result) -> dict[str, TrainedModels]:
    """The three kinds of model by name, in the order of their training."""
    return {name: getattr(result, name) for name in TITLES}


def networks(config: Config, dataset: Dataset) -> tuple[Network, Network]:
    """The teacher's and the student's `Network`."""
    sizes = layer_sizes(config.teacher_hidden, dataset)
    teaching = _network(sizes, config.teacher_dropout, config.teacher_input_dropout)
    return teaching, _network(layer_sizes(config.student_hidden, dataset))


def layer_sizes(hidden: tuple[int, ...], dataset: Dataset) -> tuple[int, ...]:
    """Hidden sizes with the number of pixels before and the number of classes after them."""
    return (int(np.prod(dataset.image_shape)), *hidden, dataset.classes)


def make_recipe(
    network: Network, training: Training, examples: int, method: Method = CROSS_ENTROPY, *, max_norm: float = 0.0
) -> Recipe:
    """What is compiled for a training on so many examples."""
    return Recipe(
        network,
        method,
        optimizer(max_norm),
        training.batch_size,
        schedule=schedule(training.schedule, training.epochs * (examples // training.batch_size), training.warmup),
        shift=training.shift,
        shift_share=training.shift_share,
    )


# Equal functions must be the same function, or JAX would compile a program for each.
@cache
def _network(sizes: tuple[int, ...], dropout: float = 0.0, input_dropout: float = 0.0) -> Network:
    """The fully connected network of such layers."""
    return mlp(sizes, dropout=dropout, input_dropout=input_dropout)


@cache
def schedule(name: str, steps: int, warmup: float = 0.0) -> Callable[[Any], Any] | None:
    """The learning rate's factor after so many of all steps; None where it is always 1.

    warmup: the share of the steps in which it rises in a line from 0 to 1; a cosine falls from 1 to 0 in the others.
    """
    rising = min(round(warmup * steps), max(0, steps - 1))
    falling = optax.cosine_decay_schedule(1.0, steps - rising) if name == "cosine" else optax.constant_schedule(1.0)
    if rising:
        return optax.join_schedules([optax.linear_schedule(0.0, 1.0, rising), falling], [rising])
    return falling if name == "cosine" else None


@cache
def optimizer(max_norm: float) -> Callable[..., optax.GradientTransformation]:
    """Adam, with a bound on every unit's squared norm where that is not 0."""
    if not max_norm:
        return optimizers.adam
    return lambda rate: optax.chain(optimizers.adam(rate), optimizers.max_norm(max_norm))


def padded(examples: Examples, shift: int) -> Examples:
    """The examples as a training with such a shift takes them."""
    return examples._replace(images=augment.pad(examples.images, shift)) if shift else examples


def abstract_outputs(examples: int, classes: int, shift: int) -> Output:
    """The shapes of what `teacher.outputs` will give."""
    shape = (augment.view_count(shift), examples, classes) if shift else (examples, classes)
    return Output(jax.ShapeDtypeStruct(shape, jnp.float32))  # type: ignore[arg-type]


def teacher_bytes(examples: int, classes: int, shift: int) -> int:
    """What `teacher.outputs` will take."""
    return sum(4 * leaf.size for leaf in jax.tree.leaves(abstract_outputs(examples, classes, shift)))


def run_experiment(
    config: Config,
    dataset: Dataset,
    progress: Progress,
    policy: CheckpointPolicy = CheckpointPolicy(),  # noqa: B008
) -> Result:
    """The whole experiment, from the newest checkpoints on where the store of `policy` has some.

    The test images are read once, after the last epoch of each stage. Raises `ConfigError` where `config` does not fit
    `dataset`, `RunError` where a run fails, and what `train_stage` and `Store.newest` raise.
    """
    check(config, dataset)
    restored = _restored(policy.store)
    started = time.perf_counter()
    examples = Examples(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
    seen = {"teacher": padded(examples, config.teacher_training.shift), "student": padded(examples, config.shift)}
    prepared = _prepare(config, dataset, seen, policy)
    compile_s = time.perf_counter() - started
    epoch_s = {name: stages.time_an_epoch(prepared[name], images) for name, images in seen.items()}
    epoch_s["distilled"] = epoch_s["student"]
    left = {n: 1 - (restored[n].step / (s.epochs * s.steps) if n in restored else 0) for n, s in prepared.items()}
    progress.compiled(compile_s, sum(s.epochs * epoch_s[name] * left[name] for name, s in prepared.items()))

    def train(name: str, examples: Examples, **more: Any) -> TrainedModels:
        history = stage_loop.train_stage(prepared[name], examples, progress, policy, restored.get(name))
        return _examined(prepared[name], history, dataset, **more)

    taught_by = train("teacher", seen.pop("teacher"))
    teacher_params, teacher_state = jax.tree.map(lambda leaf: leaf[0], (taught_by.params, taught_by.state))
    ask_teacher = partial(teacher.outputs, teacher_params, teacher_state, network=prepared["teacher"].recipe.network)
    test_logits = ask_teacher(jnp.asarray(dataset.test_images)).logits
    student = train("student", seen["student"], teacher_logits=test_logits)
    predicting = time.perf_counter()
    outputs = jax.block_until_ready(ask_teacher(examples.images, shift=config.shift))
    taught = seen.pop("student")._replace(teacher=outputs)
    teacher_outputs_s = time.perf_counter() - predicting
    distilled = train("distilled", taught, teacher_logits=test_logits)

    comparison = stats.paired_comparison(
        np.asarray(student.evaluations.correct), np.asarray(distilled.evaluations.correct), metric="correct"
    )
    total_s = time.perf_counter() - started
    return Result(config, taught_by, student, distilled, comparison, compile_s, teacher_outputs_s, total_s)


def _restored(store: Store | None) -> dict[str, Checkpoint]:
    """The newest good checkpoint of every stage that has one. Raises `CheckpointError`."""
    if store is None:
        return {}
    newest = {name: store.newest(name) for name in TITLES}
    for before, name in itertools.pairwise(newest):
        if newest[name] and not newest[before]:
            raise CheckpointError(
                f"{store.folder} has checkpoints of the {TITLES[name]} and none of the {TITLES[before]}",
                errors.START_AGAIN,
            )
    return {name: checkpoint for name, checkpoint in newest.items() if checkpoint}


def _prepare(
    config: Config, dataset: Dataset, seen: Mapping[str, Examples], policy: CheckpointPolicy
) -> dict[str, Stage]:
    """The three stages, compiled at once: XLA lets go of Python's lock while it compiles."""
    teacher_network, student_network = networks(config, dataset)
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    count = len(dataset.train_labels)
    recipes = {
        "teacher": make_recipe(teacher_network, config.teacher_training, count, max_norm=config.teacher_max_norm),
        "student": make_recipe(student_network, config.training, count),
        "distilled": make_recipe(student_network, config.training, count, METHODS[config.method]),
    }
    outputs = abstract_outputs(count, dataset.classes, config.shift)
    images = {**seen, "distilled": seen["student"]._replace(teacher=outputs)}

    def prepare(name: str) -> Stage:
        own, training = (seeds[:1], config.teacher_training) if name == "teacher" else (seeds, config.training)
        rate, alpha, temperature = (
            jnp.full(len(own), value, jnp.float32)
            for value in (training.learning_rate, config.alpha, config.temperature)
        )
        hyperparameters = Hyperparameters(rate, KDWeights(alpha, temperature) if name == "distilled" else ())
        return stages.prepare(
            StageName(name, TITLES[name]),
            Role.TEACHER if name == "teacher" else Role.STUDENT,
            recipes[name],
            hyperparameters,
            own,
            images[name],
            epochs=training.epochs,
            every=policy.every,
        )

    return at_once(prepare, recipes)


def at_once(prepare: Callable[[str], Stage], names: Iterable[str]) -> dict[str, Stage]:
    """Prepares stages in threads: XLA lets go of Python's lock while it compiles."""
    pool = ThreadPoolExecutor()
    try:
        preparing = {name: pool.submit(prepare, name) for name in names}
        return {name: prepared.result() for name, prepared in preparing.items()}
    finally:
        # An interrupt does not wait for what is being compiled.
        pool.shutdown(wait=False, cancel_futures=True)


def check(config: Config, dataset: Dataset) -> None:
    """Raises `ConfigError` where `config` does not fit `dataset`, or the networks do not fit into memory."""
    config.check_against(len(dataset.train_labels))
    _check_shifts(config, dataset)
    free = memory.available()
    if free is None:
        return
    taught = teacher_bytes(len(dataset.train_labels), dataset.classes, config.shift)
    if config.shift and taught > free:
        raise ConfigError(
            f"--shift is {config.shift}: the teacher's outputs for all {augment.view_count(config.shift)} views need "
            f"{_gib(taught)}, and {_gib(free)} are free: choose a smaller one, or 0"
        )
    for role, room, sizes, training, network, seeds in zip(
        ("teacher", "student"),
        (free, free - taught),
        (config.teacher_hidden, config.student_hidden),
        (config.teacher_training, config.training),
        networks(config, dataset),
        (1, config.seeds),
        strict=True,
    ):
        layers, examples, tests = layer_sizes(sizes, dataset), len(dataset.train_labels), len(dataset.test_labels)
        one = memory.needed(network, layers, examples=examples, test_examples=tests)
        needs, batch = f"that needs {{}}, and {_gib(max(0, room))} are free:", training.batch_size
        if one.fixed > room:
            shown = " ".join(map(str, sizes))
            raise ConfigError(f"--{role}-hidden is {shown}: {needs.format(_gib(one.fixed))} choose smaller sizes")
        if one.total(batch) > room:
            most = (room - one.fixed) // one.per_image
            own = role == "teacher" and config.teacher_batch_size is not None
            raise ConfigError(
                f"--{'teacher-' * own}batch-size is {batch}: {needs.format(_gib(one.total(batch)))} "
                f"it must be at most {most:,}"
            )
        if seeds * one.total(batch) > room:
            most = room // one.total(batch)
            raise ConfigError(
                f"--seeds is {seeds}: {needs.format(_gib(seeds * one.total(batch)))} it must be at most {most:,}"
            )


def _check_shifts(config: Config, dataset: Dataset) -> None:
    smallest = min(dataset.image_shape[:2])
    for name, shift in (("--shift", config.shift), ("--teacher-shift", config.teacher_training.shift)):
        if shift >= smallest:
            raise ConfigError(
                f"{name} is {shift}: it must be below the {smallest} pixels of the images' shorter side, or 0"
            )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _examined(
    stage: Stage,
    history: StageHistory,
    dataset: Dataset,
    *,
    teacher_logits: Float[Array, "examples classes"] | None = None,
) -> TrainedModels:
    """Reads the test set, once."""
    states = history.states
    logits = jax.vmap(partial(predict, network=stage.recipe.network), in_axes=(0, 0, None))(
        states.params, states.state, jnp.asarray(dataset.test_images)
    )
    labels = jnp.asarray(dataset.test_labels)
    evaluations = jax.vmap(evaluate, in_axes=(0, None, None))(logits, labels, teacher_logits)
    steps = stage.epochs * stage.steps
    for measure in jax.tree.leaves(evaluations):
        bad = ~np.isfinite(np.asarray(measure))
        stage_loop.require_finite(stage, bad, "the loss on the test images", f"after the last step, {steps:,},")
    total = steps * len(stage.seeds)
    return TrainedModels(
        seeds=stage.seeds,
        parameters=count_parameters(jax.tree.map(lambda leaf: leaf[0], states.params)),
        params=states.params,
        state=states.state,
        evaluations=jax.tree.map(np.asarray, evaluations),
        answers=np.asarray(jnp.argmax(logits, axis=-1)),
        history=history.metrics,
        epochs=history.report_epochs,
        timing=StageTiming(stage.compile_s, history.train_s, total, total / history.train_s),
    )
