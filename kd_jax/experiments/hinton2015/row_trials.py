"""Trials of a row: their network, their transfer set, how they are trained, and what they find on the test set."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kd_jax.data.dataset import Dataset
from kd_jax.errors import RunError, SeedsNotFiniteError
from kd_jax.evaluate import evaluate_logits
from kd_jax.experiments import images as of_images
from kd_jax.experiments.hinton2015 import bias
from kd_jax.experiments.hinton2015.plan import CURVE, Plan, RowResult, RowTrials
from kd_jax.experiments.images import Images, Settings
from kd_jax.experiments.notebook import fits, recipes
from kd_jax.experiments.notebook.experiment import TITLES
from kd_jax.experiments.shell.progress import Progress
from kd_jax.experiments.shell.text import plain
from kd_jax.experiments.stage import Role
from kd_jax.experiments.trials import Trials, train_trials
from kd_jax.methods import KD, CrossEntropy, Method
from kd_jax.models import Network, count_parameters, mlp
from kd_jax.train.checkpoint import CheckpointPolicy


def network(row: RowTrials, plan: Plan, dataset: Dataset) -> Network:
    """The network that is trained."""
    sizes = recipes.layer_sizes(row.hidden, dataset)
    if row.of_teacher:
        return mlp(sizes, dropout=plan.teacher_dropout, input_dropout=plan.teacher_input_dropout).network
    return mlp(sizes).network


def transfer_set(row: RowTrials, dataset: Dataset) -> Int[np.ndarray, " rows"]:
    """The training images that are seen, by their rows."""
    labels = dataset.train_labels
    return np.flatnonzero(np.isin(labels, row.kept)) if row.kept is not None else np.arange(len(labels))


def make_trials(row: RowTrials, plan: Plan, dataset: Dataset, own: Network) -> Trials:
    """What is trained. own: its `network`."""
    seeds, role, norm = plan.all_seeds, Role.STUDENT, 0.0
    if row.of_teacher:
        seeds, role, norm = plan.all_seeds[:1], Role.TEACHER, plan.teacher_max_norm
    setup = recipes.make_setup(own, row.training, len(transfer_set(row, dataset)), max_norm=norm)
    methods: list[Method] = [KD(plan.alpha, temperature) for temperature in row.temperatures]
    settings = [Settings(row.training.learning_rate, method) for method in methods or [CrossEntropy()]]
    return Trials(row.name, setup, settings, seeds, role, row.training.epochs, TITLES["teacher"] * row.of_teacher)


def at_once(row: RowTrials, dataset: Dataset, own: Network) -> int:
    """How many trainings fit into memory side by side. Raises `ConfigError` where not even one does."""
    count, taught = len(transfer_set(row, dataset)), bool(row.temperatures)
    remedy = "stop other programs, or use a machine with more memory"
    return fits.at_once(own, row.hidden, row.training, dataset, examples=count, taught=taught, remedy=remedy)


class Taught(NamedTuple):
    """A teacher's logits. test: of the test images, as they are.

    train: the soft targets of all training images, with an axis of views where distilled students see shifted ones.
    averaged: of the test images in the same way as the soft targets, where those are means over shifts; else None.
    """

    train: Float[np.ndarray, "*views examples classes"]
    test: Float[np.ndarray, "tests classes"]
    averaged: Float[np.ndarray, "tests classes"] | None = None


def ask(variables: Any, dataset: Dataset, own: Network, *, averaged: int = 0, shift: int = 0) -> Taught:
    """What a teacher says in evaluation mode.

    averaged: the largest shift of those over which soft targets are averaged. shift: the largest of those for each of
    which there are soft targets. One of them is 0.
    """
    assert not (averaged and shift)

    def said(images: np.ndarray, shift: int) -> Float[np.ndarray, "examples classes"]:
        return np.asarray(of_images.predict(variables, jnp.asarray(images), network=own, shift=shift))

    test, by_mean = said(dataset.test_images, 0), said(dataset.test_images, averaged) if averaged else None
    if shift:
        images = jnp.asarray(dataset.train_images)
        return Taught(np.asarray(of_images.teacher_logits(variables, images, network=own, shift=shift)), test, by_mean)
    return Taught(said(dataset.train_images, averaged), test, by_mean)


def train_row(
    row: RowTrials, plan: Plan, dataset: Dataset, taught: Taught | None, progress: Progress, policy: CheckpointPolicy
) -> tuple[RowResult, Any]:
    """Trains all of them and reads the test set, once; also returns the variables `[settings, seeds, ...]`.

    taught: what the teacher says, of the views that are asked for; None for the teacher itself. Raises what
    `train_trials` does.
    """
    started = time.perf_counter()
    own = network(row, plan, dataset)
    trials, rows = make_trials(row, plan, dataset, own), transfer_set(row, dataset)
    # Before anything of it is in memory, as when it was checked.
    most = at_once(row, dataset, own)
    seen = Images(jnp.asarray(dataset.train_images[rows]), jnp.asarray(dataset.train_labels[rows]))
    if row.temperatures and taught is not None:
        seen = seen._replace(logits=jnp.asarray(taught.train[..., rows, :]))
    try:
        trained = train_trials(trials, of_images.padded(seen, row.training.shift), progress, policy, most=most)
    except SeedsNotFiniteError as error:
        # A row is known by its name, and the recipe's rates are no options here.
        who = "the teacher" if row.of_teacher else row.name
        at = "" if error.temperature is None else f" at T = {error.temperature:g}"
        raise RunError(
            f"{error.what} of {who} with {error.seeds} is not finite {error.when}{at}: choose another --seed"
        ) from None
    images = [jnp.asarray(dataset.test_images)]
    images += [jnp.asarray(dataset.train_images)] * bool(row.moved)
    runs = []
    for setting, temperature in enumerate(row.temperatures or (None,)):
        for place, seed in enumerate(trials.seeds):
            variables = jax.tree.map(lambda leaf, i=(setting, place): leaf[i], trained.variables)
            logits = [of_images.predict(variables, each, network=own) for each in images]
            run: RowResult = {"seed": seed} | ({} if temperature is None else {"temperature": temperature})
            run |= measures(np.asarray(logits[0]), dataset.test_labels, None if taught is None else taught.test)
            if row.moved:
                run["moved"] = moved(np.asarray(logits[0]), np.asarray(logits[1]), dataset, row.moved)
            runs.append(run)
    one = own.split(jax.tree.map(lambda leaf: leaf[0, 0], trained.variables))[0]
    found = {"name": row.name, "parameters": count_parameters(one), "examples": len(rows), "runs": runs}
    if taught is not None and taught.averaged is not None:
        found["taught_by"] = measures(taught.averaged, dataset.test_labels, None)
    found["timing"] = {"train_s": trained.train_s, "total_s": time.perf_counter() - started}
    return found, trained.variables


def measures(
    logits: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
    teacher: Float[np.ndarray, "examples classes"] | None,
) -> RowResult:
    """Of one network: errors, in all and of each class, and the other measures of `Evaluation`. Raises `RunError`."""
    taught = None if teacher is None else jnp.asarray(teacher)
    evaluation = evaluate_logits(jnp.asarray(logits), jnp.asarray(labels), taught)
    found = {name: plain(value) for name, value in evaluation._asdict().items() if value is not None}
    if not all(np.isfinite(value) for value in found.values()):
        raise RunError("a measure of the test images is not finite: choose another --seed")
    return found | {"errors_by_class": _by_class(logits, labels)}


def moved(
    test: Float[np.ndarray, "tests classes"],
    train: Float[np.ndarray, "examples classes"],
    dataset: Dataset,
    classes: tuple[int, ...],
) -> RowResult:
    """Test errors with the biases of `classes` moved, by one offset, so that errors are fewest on a set of images.

    test: those of the test set itself, as in the paper. training: all training images, also those of classes that the
    student never saw; this rule never sees the test set. curve: errors at each offset of `CURVE`.
    """
    on_test = bias.errors(test, dataset.test_labels, classes)
    on_train = bias.errors(train, dataset.train_labels, classes)
    found: RowResult = {}
    for name, chosen_on in (("test", on_test), ("training", on_train)):
        offset = bias.best(chosen_on)
        shifted = test.astype(np.float64)
        shifted[:, list(classes)] += offset
        wrong = _by_class(shifted, dataset.test_labels)
        found[name] = {"offset": offset, "errors": sum(wrong), "errors_by_class": wrong}
    return found | {"curve": bias.at(on_test, CURVE).tolist()}


def _by_class(logits: Float[np.ndarray, "examples classes"], labels: Int[np.ndarray, " examples"]) -> list[int]:
    wrong = labels[logits.argmax(axis=1) != labels]
    return np.bincount(wrong, minlength=logits.shape[1]).tolist()
