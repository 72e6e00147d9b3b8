"""One experiment: teacher, then students alone, then the same students distilled, for all seeds."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kd_jax import errors, stats
from kd_jax.data.dataset import Dataset
from kd_jax.data.mapped import is_mapped
from kd_jax.errors import CheckpointError
from kd_jax.evaluate import Evaluation, evaluate_logits
from kd_jax.experiments import images as of_images
from kd_jax.experiments import stage as stages
from kd_jax.experiments import stage_loop
from kd_jax.experiments.images import Images, Metrics, Settings
from kd_jax.experiments.notebook import fits, recipes
from kd_jax.experiments.notebook.config import Config
from kd_jax.experiments.shell.progress import Progress, StageName
from kd_jax.experiments.stage import Role, Stage
from kd_jax.experiments.stage_loop import StageHistory
from kd_jax.methods import CrossEntropy, Method
from kd_jax.models import Model, count_parameters
from kd_jax.teacher import LiveTeacher
from kd_jax.train.checkpoint import Checkpoint, CheckpointPolicy, Store

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
    each report was, in epochs; None of a teacher that was given and not trained. answers: classes of the test images,
    `[seeds, test examples]`.
    """

    seeds: tuple[int, ...]
    parameters: int
    variables: Any
    evaluations: Evaluation
    answers: Int[np.ndarray, "seeds examples"]
    history: Metrics | None
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
    fits.check(config, dataset)
    trained = [name for name in TITLES if name != "teacher" or recipes.given_teacher(config, dataset) is None]
    restored = _restored(policy.store, trained)
    started = time.perf_counter()
    images: Any = dataset.train_images if is_mapped(dataset) else jnp.asarray(dataset.train_images)
    data = Images(images, jnp.asarray(dataset.train_labels))
    shifts = {"teacher": config.teacher_training.shift, "student": config.shift}
    seen = {name: of_images.padded(data, shift) for name, shift in shifts.items() if name in trained}
    prepared = _prepare(config, dataset, seen, policy)
    compile_s = time.perf_counter() - started
    epoch_s = {name: stages.time_an_epoch(prepared[name], images) for name, images in seen.items()}
    epoch_s["distilled"] = epoch_s["student"]
    left = {n: 1 - (restored[n].step / (s.epochs * s.steps) if n in restored else 0) for n, s in prepared.items()}
    progress.compiled(compile_s, sum(s.epochs * epoch_s[name] * left[name] for name, s in prepared.items()))

    def train(name: str, data: Images, **more: Any) -> TrainedModels:
        history = stage_loop.train_stage(prepared[name], data, progress, policy, restored.get(name))
        return _examined(prepared[name], history, dataset, **more)

    given = recipes.given_teacher(config, dataset)
    taught_by = train("teacher", seen.pop("teacher")) if given is None else _given(given, config, dataset)
    variables = jax.tree.map(lambda leaf: leaf[0], taught_by.variables)
    ask_teacher = partial(of_images.teacher_logits, variables, network=recipes.networks(config, dataset)[0])
    test_logits = ask_teacher(jnp.asarray(dataset.test_images))
    student = train("student", seen["student"], teacher_logits=test_logits)
    predicting = time.perf_counter()
    taught = seen.pop("student")
    if recipes.needs_live_teacher(config):
        taught = taught._replace(teacher=LiveTeacher(recipes.networks(config, dataset)[0], variables))
    else:
        taught = taught._replace(logits=jax.block_until_ready(ask_teacher(data.images, shift=config.shift)))
    teacher_outputs_s = time.perf_counter() - predicting
    distilled = train("distilled", taught, teacher_logits=test_logits)

    comparison = stats.paired_comparison(
        np.asarray(student.evaluations.correct), np.asarray(distilled.evaluations.correct), metric="correct"
    )
    total_s = time.perf_counter() - started
    return Result(config, taught_by, student, distilled, comparison, compile_s, teacher_outputs_s, total_s)


def _restored(store: Store | None, trained: list[str]) -> dict[str, Checkpoint]:
    """The newest good checkpoint of every stage that has one. Raises `CheckpointError`."""
    if store is None:
        return {}
    newest = {name: store.newest(name) for name in trained}
    for before, name in itertools.pairwise(newest):
        if newest[name] and not newest[before]:
            raise CheckpointError(
                f"{store.folder} has checkpoints of the {TITLES[name]} and none of the {TITLES[before]}",
                errors.START_AGAIN,
            )
    return {name: checkpoint for name, checkpoint in newest.items() if checkpoint}


def _prepare(
    config: Config, dataset: Dataset, seen: Mapping[str, Images], policy: CheckpointPolicy
) -> dict[str, Stage]:
    """The three stages, compiled at once: XLA lets go of Python's lock while it compiles."""
    teacher_network, student_network = recipes.networks(config, dataset)
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    count = len(dataset.train_labels)
    of_each = {
        "teacher": recipes.make_setup(
            teacher_network, config.teacher_training, count, max_norm=config.teacher_max_norm
        ),
        "student": recipes.make_setup(student_network, config.training, count),
        "distilled": recipes.make_setup(student_network, config.training, count),
    }
    taught: dict[str, Any] = {"logits": recipes.abstract_logits(count, dataset.classes, config.shift)}
    if recipes.needs_live_teacher(config):
        given = recipes.given_teacher(config, dataset)
        known = teacher_network.init if given is None else lambda key: given.variables
        taught = {"teacher": LiveTeacher(teacher_network, jax.eval_shape(known, jax.random.key(0)))}
    images = {**seen, "distilled": seen["student"]._replace(**taught)}

    def prepare(name: str) -> Stage:
        own, training = (seeds[:1], config.teacher_training) if name == "teacher" else (seeds, config.training)
        method: Method = config.make_method() if name == "distilled" else CrossEntropy()
        rate, method = jax.tree.map(
            lambda value: jnp.broadcast_to(jnp.asarray(value, jnp.float32), (len(own), *jnp.shape(value))),
            (training.learning_rate, method),
        )
        return stages.prepare(
            StageName(name, TITLES[name]),
            Role.TEACHER if name == "teacher" else Role.STUDENT,
            of_each[name],
            Settings(rate, method),
            own,
            images[name],
            epochs=training.epochs,
            every=policy.every,
        )

    return at_once(prepare, [name for name in of_each if name in images])


def at_once(prepare: Callable[[str], Stage], names: Iterable[str]) -> dict[str, Stage]:
    """Prepares stages in threads: XLA lets go of Python's lock while it compiles."""
    pool = ThreadPoolExecutor()
    try:
        preparing = {name: pool.submit(prepare, name) for name in names}
        return {name: prepared.result() for name, prepared in preparing.items()}
    finally:
        # An interrupt does not wait for what is being compiled.
        pool.shutdown(wait=False, cancel_futures=True)


def _examined(
    stage: Stage,
    history: StageHistory,
    dataset: Dataset,
    *,
    teacher_logits: Float[Array, "examples classes"] | None = None,
) -> TrainedModels:
    """Reads the test set, once."""
    states = history.states
    logits = of_images.predict_each(states.variables, jnp.asarray(dataset.test_images), network=stage.setup.network)
    labels = jnp.asarray(dataset.test_labels)
    evaluations = jax.vmap(evaluate_logits, in_axes=(0, None, None))(logits, labels, teacher_logits)
    steps = stage.epochs * stage.steps
    for measure in jax.tree.leaves(evaluations):
        bad = ~np.isfinite(np.asarray(measure))
        stage_loop.require_finite(stage, bad, "the loss on the test images", f"after the last step, {steps:,},")
    total = steps * len(stage.seeds)
    return TrainedModels(
        seeds=stage.seeds,
        parameters=count_parameters(_one(stage, states.variables)),
        variables=states.variables,
        evaluations=jax.tree.map(np.asarray, evaluations),
        answers=np.asarray(jnp.argmax(logits, axis=-1)),
        history=history.metrics,
        epochs=history.report_epochs,
        timing=StageTiming(stage.compile_s, history.train_s, total, total / history.train_s),
    )


def _given(model: Model, config: Config, dataset: Dataset) -> TrainedModels:
    """A teacher that is not trained. Reads the test set, once."""
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], model.variables)
    labels = jnp.asarray(dataset.test_labels)
    logits = of_images.predict_each(variables, jnp.asarray(dataset.test_images), network=model.network)
    return TrainedModels(
        seeds=(config.seed,),
        parameters=count_parameters(model),
        variables=variables,
        evaluations=jax.tree.map(np.asarray, jax.vmap(evaluate_logits, in_axes=(0, None))(logits, labels)),
        answers=np.asarray(jnp.argmax(logits, axis=-1)),
        history=None,
        epochs=np.zeros(0),
        timing=StageTiming(0.0, 0.0, 0, 0.0),
    )


def _one(stage: Stage, variables: Any) -> Any:
    """The parameters of the first seed."""
    return stage.setup.network.split(jax.tree.map(lambda leaf: leaf[0], variables))[0]
