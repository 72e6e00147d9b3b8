"""What the table of methods trains: the networks, the data of each part, the budget, the trials and the seeds."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from kd_jax import models
from kd_jax.data.dataset import Dataset, development
from kd_jax.errors import ConfigError, DataError
from kd_jax.experiments.images import Setup
from kd_jax.experiments.methods.networks import Classifier
from kd_jax.experiments.methods.rows import ALONE, KD, LEFT_OUT, OF_KD, ROWS
from kd_jax.experiments.notebook import methods as known_methods
from kd_jax.experiments.notebook import recipes
from kd_jax.experiments.notebook.config import Training
from kd_jax.methods import catalogue
from kd_jax.models import Model

QUICK_SEEDS = 3


class Plan(NamedTuple):
    """Everything that is trained.

    teacher_training: on all training images but the development split. training: of every student, on the first
    `examples` of these. trial_seeds: of each trial; others than the students'. seed: the teacher's, and the first of
    the students'.

    Of the learning rates 0.01, 0.03 and 0.06 the student without a teacher did best with the last two (78.9, 80.6 and
    80.8 % of Fashion-MNIST's development split after 10 epochs, one seed). More images leave less to gain.
    """

    teacher_widths: tuple[int, ...] = (8, 64, 128)
    teacher_training: Training = Training(8, 128, 0.01, "cosine", 0, warmup=0.1)
    widths: tuple[int, ...] = (8, 16, 32)
    training: Training = Training(30, 32, 0.03, "cosine", 0, warmup=0.1)
    examples: int = 2000
    trial_seeds: int = 2
    seeds: int = 10
    seed: int = 42
    quick: bool = False

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Of the students that are compared."""
        return tuple(range(self.seed, self.seed + self.seeds))

    @property
    def all_trial_seeds(self) -> tuple[int, ...]:
        """Of the trials: none of `all_seeds`."""
        first = self.seed + self.seeds
        return tuple(range(first, first + self.trial_seeds))


PLAN = Plan()


def quick(plan: Plan) -> Plan:
    """The plan with fewer epochs and one seed for each trial."""
    return plan._replace(
        teacher_training=plan.teacher_training._replace(epochs=max(1, plan.teacher_training.epochs * 3 // 8)),
        training=plan.training._replace(epochs=max(1, plan.training.epochs // 3)),
        trial_seeds=1,
        quick=True,
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """By names, as JSON holds it."""
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in plan._asdict().items()}
    return found | {name: getattr(plan, name)._asdict() for name in ("teacher_training", "training")}


def find(names: list[str]) -> tuple[str, ...]:
    """Names of rows, however they are written, in the table's order; the two that all are compared with always.

    Raises `ConfigError` for a method that there is not, and for one that has no row.
    """
    known = {**known_methods.known(), **dict.fromkeys(OF_KD, known_methods.known()[KD])}
    chosen = [catalogue.find(name, known) for name in names]
    for name in chosen:
        if name in LEFT_OUT:
            raise ConfigError(f"--methods has {name}, which the table leaves out ({LEFT_OUT[name]}): choose another")
    twice = next((name for name in chosen if chosen.count(name) > 1), None)
    if twice:
        raise ConfigError(f"--methods has {twice} twice: give each method once")
    return tuple(name for name in ROWS if name in {ALONE, KD, *chosen})


class Part(NamedTuple):
    """Images as numbers in [0, 1], and their labels."""

    images: np.ndarray
    labels: np.ndarray


class Parts(NamedTuple):
    """train: what students are trained on. development: what the trials are measured on. test: read at the end.

    taught: what the teacher is trained on, as a `Dataset`.
    """

    train: Part
    development: Part
    test: Part
    taught: Dataset


def parts(plan: Plan, dataset: Dataset) -> Parts:
    """The parts of a data set. Raises `DataError` where it has too few examples for them or for a batch."""
    split = development(dataset)
    count = min(plan.examples, len(split.train_labels))
    most = max(plan.training.batch_size, plan.teacher_training.batch_size)
    if count < most:
        raise DataError(f"{dataset.name} has {count} examples to train on: the table's batches need at least {most}")
    return Parts(
        _part(split.train_images[:count], split.train_labels[:count]),
        _part(split.test_images, split.test_labels),
        _part(dataset.test_images, dataset.test_labels),
        split,
    )


def _part(images: np.ndarray, labels: np.ndarray) -> Part:
    return Part(images.astype(np.float32) / np.float32(255), labels)


@lru_cache(maxsize=16)
def network(widths: tuple[int, ...], channels: int, classes: int) -> Model:
    """A network of the table, without variables."""

    def make(rngs: nnx.Rngs) -> Classifier:
        return Classifier(widths, channels, classes, rngs)

    return models.from_nnx(make)


def networks(plan: Plan, dataset: Dataset) -> tuple[Model, Model]:
    """Teacher and student."""
    channels, classes = dataset.image_shape[-1], dataset.classes
    return network(plan.teacher_widths, channels, classes), network(plan.widths, channels, classes)


def teacher_setup(plan: Plan, dataset: Dataset) -> Setup:
    """How the teacher is trained."""
    teacher, _ = networks(plan, dataset)
    return recipes.make_setup(teacher.network, plan.teacher_training, len(development(dataset).train_labels))
