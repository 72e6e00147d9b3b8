"""What a `Config` trains: its networks, and the setup of each training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax import optimizers
from kd_jax.data import shifts
from kd_jax.data.dataset import Dataset
from kd_jax.errors import ConfigError
from kd_jax.experiments.images import Setup
from kd_jax.experiments.notebook import own
from kd_jax.experiments.notebook.config import Config, Training
from kd_jax.models import Model, Network, mlp


def networks(config: Config, dataset: Dataset) -> tuple[Network, Network]:
    """The teacher's and the student's `Network`. Raises `ConfigError` for a user's own that cannot be made."""
    taught_by, student = own_models(config, dataset)
    sizes = layer_sizes(config.teacher_hidden, dataset)
    teaching = taught_by or _dense(sizes, config.teacher_dropout, config.teacher_input_dropout)
    return teaching.network, (student or _dense(layer_sizes(config.student_hidden, dataset))).network


@lru_cache(maxsize=256)
def _dense(sizes: tuple[int, ...], dropout: float = 0.0, input_dropout: float = 0.0) -> Model:
    """An `mlp`, which is asked for many times for each of a sweep's settings."""
    return mlp(sizes, dropout=dropout, input_dropout=input_dropout)


def own_models(config: Config, dataset: Dataset) -> tuple[Model | None, Model | None]:
    """The teacher and student that have a name; None where they are fully connected networks of `config`'s sizes."""
    shape, classes = tuple(dataset.image_shape), dataset.classes
    teacher = own.load(config.teacher, "--teacher", shape, classes) if config.teacher else None
    student = own.load(config.student, "--student", shape, classes) if config.student else None
    if student is not None and student.variables is not None:
        raise ConfigError(
            f"--student is {config.student!r}, which has values already, and each seed starts anew: name a class or "
            "a function of rngs"
        )
    return teacher, student


def given_teacher(config: Config, dataset: Dataset) -> Model | None:
    """A teacher that has its values, and is not trained."""
    teacher, _ = own_models(config, dataset)
    return teacher if teacher is not None and teacher.variables is not None else None


def places(config: Config, dataset: Dataset) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many numbers an image makes in each place of the teacher and of the student."""
    models, hidden = own_models(config, dataset), (config.teacher_hidden, config.student_hidden)
    shape, classes = tuple(dataset.image_shape), dataset.classes
    teacher, student = (
        layer_sizes(sizes, dataset) if model is None else own.units(model, shape, classes)
        for model, sizes in zip(models, hidden, strict=True)
    )
    return teacher, student


def layer_sizes(hidden: tuple[int, ...], dataset: Dataset) -> tuple[int, ...]:
    """Hidden sizes with the number of pixels before and the number of classes after them."""
    return (int(np.prod(dataset.image_shape)), *hidden, dataset.classes)


def make_setup(network: Network, training: Training, examples: int, *, max_norm: float = 0.0) -> Setup:
    """What is compiled for a training on so many examples."""
    return Setup(
        network,
        optimizer(max_norm),
        training.batch_size,
        schedule=schedule(training.schedule, training.epochs * (examples // training.batch_size), training.warmup),
        shift=training.shift,
        shift_share=training.shift_share,
    )


@dataclass(frozen=True)
class Schedule:
    """The learning rate's factor after so many of all steps; equal by value.

    rising: steps in which it rises in a line from 0 to 1. name: of what follows in the others, from 1.
    """

    name: str
    steps: int
    rising: int

    def __call__(self, step: Any) -> Any:
        """The factor."""
        left = self.steps - self.rising
        falling = optax.cosine_decay_schedule(1.0, left) if self.name == "cosine" else optax.constant_schedule(1.0)
        if not self.rising:
            return falling(step)
        return optax.join_schedules([optax.linear_schedule(0.0, 1.0, self.rising), falling], [self.rising])(step)


def schedule(name: str, steps: int, warmup: float = 0.0) -> Schedule | None:
    """The learning rate's factor after so many of all steps; None where it is always 1.

    warmup: the share of the steps in which it rises in a line from 0 to 1; a cosine falls from 1 to 0 in the others.
    """
    rising = min(round(warmup * steps), max(0, steps - 1))
    return Schedule(name, steps, rising) if rising or name == "cosine" else None


@dataclass(frozen=True)
class BoundedAdam:
    """Adam with a bound on every unit's squared norm; equal by value."""

    max_norm: float

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        """With a number or a schedule."""
        return optax.chain(optimizers.adam(learning_rate), optimizers.max_norm(self.max_norm))


def optimizer(max_norm: float) -> Callable[..., optax.GradientTransformation]:
    """Adam, with a bound on every unit's squared norm where that is not 0."""
    return BoundedAdam(max_norm) if max_norm else optimizers.adam


def abstract_logits(examples: int, classes: int, shift: int) -> jax.ShapeDtypeStruct:
    """The shapes of what `images.teacher_logits` will give."""
    shape = (shifts.view_count(shift), examples, classes) if shift else (examples, classes)
    return jax.ShapeDtypeStruct(shape, jnp.float32)
