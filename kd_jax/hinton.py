"""Hinton, Vinyals and Dean (2015), https://arxiv.org/abs/1503.02531, section 3: its rows, and how each is trained.

The paper gives no optimiser, number of epochs, weights of the losses or max-norm. What stands here was found on a
development split, the last 10,000 training images; the rows themselves train on all 60,000.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kd_jax import bias, experiment, group, memory
from kd_jax.config import Training
from kd_jax.data import Dataset
from kd_jax.evaluate import evaluate, predict
from kd_jax.methods import CROSS_ENTROPY, KD, KDWeights
from kd_jax.models import Network, Output, count_parameters, mlp
from kd_jax.phase import Keeping, NotFiniteError, Progress, RunError
from kd_jax.report import plain
from kd_jax.teacher import outputs
from kd_jax.train import Examples, Hyperparameters

# The recipe.
TEACHER_HIDDEN = (1200, 1200)
TEACHER_TRAINING = Training(epochs=120, batch_size=256, learning_rate=2e-3, schedule="cosine", shift=2)
TEACHER_DROPOUT, TEACHER_INPUT_DROPOUT, TEACHER_MAX_NORM = 0.5, 0.0, 15.0
ALONE_TRAINING = Training(epochs=15, batch_size=128, learning_rate=1e-3, schedule="cosine", shift=0)
DISTILLED_TRAINING = ALONE_TRAINING._replace(epochs=30, learning_rate=3e-3)
SMALL_ALONE_TRAINING = ALONE_TRAINING._replace(epochs=30)
SMALL_DISTILLED_TRAINING = DISTILLED_TRAINING
ALPHA, TEMPERATURE = 0.02, 20.0
AVERAGED_SHIFT = 1
SHIFTED_ALONE_TRAINING = ALONE_TRAINING._replace(epochs=30, shift=2)
SHIFTED_TRAINING = DISTILLED_TRAINING._replace(shift=2)
TEMPERATURES = (1.0, 2.5, 4.0, 8.0, 20.0)
MIDDLE_TEMPERATURES = (2.5, 8.0, 20.0)
LARGE_TEMPERATURES = (8.0, 20.0)
SEEDS, SEED = 10, 42

QUICK_SEEDS, QUICK_EPOCHS = 3, 0.2
"""Of the quick version: its seeds, and the share of the epochs."""

ROWS = ("teacher", "alone", "distilled", "temperature", "no3", "only78", "averaged", "shifted")
"""The last two are not in the paper. averaged: the same students, taught by the teacher's mean logits over shifts of
each image. shifted: students that see shifted images, alone and distilled; the paper's transfer set has none."""

PAPER: dict[str, dict[str, float]] = {
    "teacher": {"errors": 67},
    "alone": {"errors": 146},
    "distilled": {"errors": 74},
    "no3": {"errors": 206, "errors_left_out": 133, "offset": 3.5, "moved": 109, "moved_left_out": 14},
    "only78": {"errors": 4730, "offset": -7.6, "moved": 1320},
}
"""The paper's single runs, of 10,000. Rates (47.3 % and 13.2 %) are counts here. moved: with the biases moved by
`offset`, which the paper chose on the test set. errors_left_out: those on the 1,010 threes."""

# Offsets of the plotted curve.
CURVE = np.round(np.arange(-20, 20.05, 0.1), 1)


class Width(NamedTuple):
    """Students with two hidden layers of `units`, alone and distilled at each of the temperatures."""

    units: int
    temperatures: tuple[float, ...]
    alone: Training
    distilled: Training


class Plan(NamedTuple):
    """Everything that is trained. widths: the first is that of the students of all rows but `temperature`.

    left_out: the class without which `no3` is distilled. only: the classes with which alone `only78` is.
    averaged_shift: by how many pixels at most an image is shifted for the mean logits of `averaged`. shifted_alone and
    shifted_distilled: of the row `shifted`.
    """

    teacher_hidden: tuple[int, ...] = TEACHER_HIDDEN
    teacher_training: Training = TEACHER_TRAINING
    teacher_dropout: float = TEACHER_DROPOUT
    teacher_input_dropout: float = TEACHER_INPUT_DROPOUT
    teacher_max_norm: float = TEACHER_MAX_NORM
    widths: tuple[Width, ...] = (
        Width(800, LARGE_TEMPERATURES, ALONE_TRAINING, DISTILLED_TRAINING),
        Width(300, MIDDLE_TEMPERATURES, SMALL_ALONE_TRAINING, SMALL_DISTILLED_TRAINING),
        Width(30, TEMPERATURES, SMALL_ALONE_TRAINING, SMALL_DISTILLED_TRAINING),
    )
    alpha: float = ALPHA
    temperature: float = TEMPERATURE
    left_out: int = 3
    only: tuple[int, ...] = (7, 8)
    averaged_shift: int = AVERAGED_SHIFT
    shifted_alone: Training = SHIFTED_ALONE_TRAINING
    shifted_distilled: Training = SHIFTED_TRAINING
    seeds: int = SEEDS
    seed: int = SEED
    quick: bool = False

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The students' seeds; the first is the teacher's, too."""
        return tuple(range(self.seed, self.seed + self.seeds))


PLAN = Plan()


class Part(NamedTuple):
    """Trainings of one recipe: what is trained, kept and read again as one.

    temperatures: each is trained with all seeds; without any, on labels alone. kept: the only classes of the transfer
    set; None for all. moved: classes whose biases are moved afterwards, by one offset. averaged: by how many pixels at
    most an image is shifted for the teacher's mean logits; 0 for those of the image itself.
    """

    name: str
    hidden: tuple[int, ...]
    training: Training
    temperatures: tuple[float, ...] = ()
    kept: tuple[int, ...] | None = None
    moved: tuple[int, ...] = ()
    averaged: int = 0


Found = dict[str, Any]
"""What a part gave, as JSON holds it."""


def quick(plan: Plan) -> Plan:
    """The plan with fewer epochs."""

    def shorter(training: Training) -> Training:
        return training._replace(epochs=max(1, round(QUICK_EPOCHS * training.epochs)))

    widths = tuple(w._replace(alone=shorter(w.alone), distilled=shorter(w.distilled)) for w in plan.widths)
    return plan._replace(
        teacher_training=shorter(plan.teacher_training),
        shifted_alone=shorter(plan.shifted_alone),
        shifted_distilled=shorter(plan.shifted_distilled),
        widths=widths,
        quick=True,
    )


def as_dict(value: Any) -> Any:
    """A plan or a part by names, as JSON holds them; the widths by their units."""
    if hasattr(value, "_asdict"):
        return {name: as_dict(own) for name, own in value._asdict().items()}
    if isinstance(value, tuple) and value and isinstance(value[0], Width):
        return {str(width.units): as_dict(width) for width in value}
    return list(value) if isinstance(value, tuple) else value


def parts(plan: Plan, classes: int) -> dict[str, Part]:
    """Every part by its name, in the order of their training: the teacher first."""
    main = plan.widths[0]
    hidden = (main.units, main.units)
    all_but = tuple(c for c in range(classes) if c != plan.left_out)
    main_part = partial(Part, hidden=hidden, training=main.distilled, temperatures=(plan.temperature,))
    found = [
        Part("teacher", plan.teacher_hidden, plan.teacher_training),
        Part(f"alone-{main.units}", hidden, main.alone),
        main_part(f"distilled-{main.units}"),
        main_part("no3", kept=all_but, moved=(plan.left_out,)),
        main_part("only78", kept=plan.only, moved=plan.only),
    ]
    for width in reversed(plan.widths[1:]):
        own = (width.units, width.units)
        found += [
            Part(f"alone-{width.units}", own, width.alone),
            Part(f"distilled-{width.units}", own, width.distilled, width.temperatures),
        ]
    others = tuple(t for t in main.temperatures if t != plan.temperature)
    found += [Part(f"temperature-{main.units}", hidden, main.distilled, others)] if others else []
    # Last, as they are not the paper's.
    found += [
        main_part("averaged", averaged=plan.averaged_shift),
        Part("alone-shifted", hidden, plan.shifted_alone),
        main_part("distilled-shifted", training=plan.shifted_distilled),
    ]
    return {part.name: part for part in found}


def parts_of(row: str, plan: Plan, classes: int) -> tuple[str, ...]:
    """The names of a row's parts; rows share some."""
    units = plan.widths[0].units
    if row == "temperature":
        names = [f"{kind}-{width.units}" for kind in ("alone", "distilled", "temperature") for width in plan.widths]
        return tuple(name for name in parts(plan, classes) if name in names)
    several = {
        "alone": (f"alone-{units}",),
        "distilled": (f"distilled-{units}",),
        "shifted": ("alone-shifted", "distilled-shifted"),
    }
    return several.get(row, (row,))


def trainings(part: Part, plan: Plan) -> int:
    """How many networks a part trains."""
    return (1 if part.name == "teacher" else plan.seeds) * max(1, len(part.temperatures))


def network(part: Part, plan: Plan, dataset: Dataset) -> Network:
    """A part's network."""
    sizes = experiment.layer_sizes(part.hidden, dataset)
    if part.name == "teacher":
        return mlp(sizes, dropout=plan.teacher_dropout, input_dropout=plan.teacher_input_dropout)
    return mlp(sizes)


def transfer_set(part: Part, dataset: Dataset) -> Int[np.ndarray, " rows"]:
    """The training images that a part sees, by their rows."""
    labels = dataset.train_labels
    return np.flatnonzero(np.isin(labels, part.kept)) if part.kept is not None else np.arange(len(labels))


def make_group(part: Part, plan: Plan, dataset: Dataset, own: Network) -> group.Group:
    """What is trained for a part. own: its `network`."""
    seeds, role, norm = plan.all_seeds, experiment.STUDENT, 0.0
    if part.name == "teacher":
        seeds, role, norm = plan.all_seeds[:1], experiment.TEACHER, plan.teacher_max_norm
    method = KD if part.temperatures else CROSS_ENTROPY
    count = len(transfer_set(part, dataset))
    recipe = experiment.recipe(own, part.training, count, method, max_norm=norm)
    weights: list[Any] = [KDWeights(plan.alpha, temperature) for temperature in part.temperatures] or [()]
    settings = [Hyperparameters(part.training.learning_rate, own) for own in weights]
    return group.Group(part.name, recipe, settings, seeds, role, part.training.epochs)


def at_once(part: Part, dataset: Dataset, own: Network) -> int:
    """How many trainings of a part fit into memory side by side. Raises `ConfigError` where not even one does."""
    layers, tests = experiment.layer_sizes(part.hidden, dataset), len(dataset.test_labels)
    count = len(transfer_set(part, dataset))
    one = memory.needed(own, layers, examples=count, test_examples=tests)
    taught = experiment.teacher_bytes(count, dataset.classes, part.training.shift) if part.temperatures else 0
    remedy = "stop other programs, or use a machine with more memory"
    return group.trainings_at_once(one, part.training.batch_size, beside=taught, remedy=remedy)


def train(
    part: Part, plan: Plan, dataset: Dataset, taught: "Taught | None", progress: Progress, keeping: Keeping
) -> tuple[Found, Any]:
    """Trains a part and reads the test set, once; also returns the parameters and states `[settings, seeds, ...]`.

    taught: what the teacher says, of the views that the part asks for; None for the teacher itself. Raises what
    `group.run` does.
    """
    started = time.perf_counter()
    own = network(part, plan, dataset)
    asked, rows = make_group(part, plan, dataset, own), transfer_set(part, dataset)
    seen = Examples(jnp.asarray(dataset.train_images[rows]), jnp.asarray(dataset.train_labels[rows]))
    if part.temperatures and taught is not None:
        seen = seen._replace(teacher=Output(jnp.asarray(taught.train[..., rows, :])))
    most = at_once(part, dataset, own)
    try:
        trained = group.run(asked, experiment.given(seen, part.training.shift), progress, keeping, most=most)
    except NotFiniteError as error:
        # A part is known by its name, and the recipe's rates are no options here.
        who = "the teacher" if part.name == "teacher" else part.name
        at = "" if error.temperature is None else f" at T = {error.temperature:g}"
        raise RunError(
            f"{error.what} of {who} with {error.seeds} is not finite {error.when}{at}: choose another --seed"
        ) from None
    images = [jnp.asarray(dataset.test_images)]
    images += [jnp.asarray(dataset.train_images)] * bool(part.moved)
    runs = []
    for setting, temperature in enumerate(part.temperatures or (None,)):
        for place, seed in enumerate(asked.seeds):
            params, state = jax.tree.map(lambda leaf, i=(setting, place): leaf[i], (trained.params, trained.state))
            logits = [predict(params, state, each, network=own) for each in images]
            run: Found = {"seed": seed} | ({} if temperature is None else {"temperature": temperature})
            run |= measures(np.asarray(logits[0]), dataset.test_labels, None if taught is None else taught.test)
            if part.moved:
                run["moved"] = moved(np.asarray(logits[0]), np.asarray(logits[1]), dataset, part.moved)
            runs.append(run)
    one = jax.tree.map(lambda leaf: leaf[0, 0], trained.params)
    found = {"name": part.name, "parameters": count_parameters(one), "examples": len(rows), "runs": runs}
    if taught is not None and taught.averaged is not None:
        found["taught_by"] = measures(taught.averaged, dataset.test_labels, None)
    found["timing"] = {"train_s": trained.train_s, "total_s": time.perf_counter() - started}
    return found, (trained.params, trained.state)


class Taught(NamedTuple):
    """A teacher's logits. test: of the test images, as they are.

    train: the soft targets of all training images; `[views, examples, classes]` where the students see shifted ones.
    averaged: of the test images in the same way as the soft targets, where those are means over shifts; else None.
    """

    train: Float[np.ndarray, "*views examples classes"]
    test: Float[np.ndarray, "tests classes"]
    averaged: Float[np.ndarray, "tests classes"] | None = None


def ask(params: Any, state: Any, dataset: Dataset, own: Network, *, averaged: int = 0, shift: int = 0) -> Taught:
    """What a teacher says in evaluation mode.

    averaged: the largest shift of those over which soft targets are averaged. shift: the largest of those for each of
    which there are soft targets. One of them is 0.
    """

    def said(images: np.ndarray, shift: int) -> Float[np.ndarray, "examples classes"]:
        return np.asarray(predict(params, state, jnp.asarray(images), network=own, shift=shift))

    test, by_mean = said(dataset.test_images, 0), said(dataset.test_images, averaged) if averaged else None
    if shift:
        images = jnp.asarray(dataset.train_images)
        return Taught(np.asarray(outputs(params, state, images, network=own, shift=shift).logits), test, by_mean)
    return Taught(said(dataset.train_images, averaged), test, by_mean)


def measures(
    logits: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
    teacher: Float[np.ndarray, "examples classes"] | None,
) -> Found:
    """Of one network: errors, in all and of each class, and the other measures of `Evaluation`. Raises `RunError`."""
    evaluation = evaluate(jnp.asarray(logits), jnp.asarray(labels), None if teacher is None else jnp.asarray(teacher))
    found = {name: plain(value) for name, value in evaluation._asdict().items() if value is not None}
    if not all(np.isfinite(value) for value in found.values()):
        raise RunError("a measure of the test images is not finite: choose another --seed")
    return found | {"errors_by_class": _by_class(logits, labels)}


def moved(
    test: Float[np.ndarray, "tests classes"],
    train: Float[np.ndarray, "examples classes"],
    dataset: Dataset,
    classes: tuple[int, ...],
) -> Found:
    """Test errors with the biases of `classes` moved, by one offset, so that errors are fewest on a set of images.

    test: those of the test set itself, as in the paper. training: all training images, also those of classes that the
    student never saw; this rule never sees the test set. curve: errors at each offset of `CURVE`.
    """
    on_test = bias.errors(test, dataset.test_labels, classes)
    on_train = bias.errors(train, dataset.train_labels, classes)
    found: Found = {}
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


def wanted(rows: tuple[str, ...], plan: Plan, classes: int) -> list[Part]:
    """The parts of some rows, the teacher first, since all others are compared with it."""
    names = {"teacher"}.union(*(parts_of(row, plan, classes) for row in rows))
    return [part for name, part in parts(plan, classes).items() if name in names]
