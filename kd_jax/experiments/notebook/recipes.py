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
from kd_jax.experiments.notebook import own, views
from kd_jax.experiments.notebook.config import Config, Training
from kd_jax.models import Model, Network, mlp


def networks(config: Config, dataset: Dataset) -> tuple[Network, Network]:
    """The teacher's and the student's `Network`. Raises `ConfigError` for a user's own that cannot be made."""
    taught_by, student = own_models(config, dataset)
    sizes = layer_sizes(config.teacher_hidden, dataset)
    teaching = _dense(sizes, config.teacher_dropout, config.teacher_input_dropout)
    taught_by = taught_by or views.seen(teaching, config.teacher_training, dataset)
    student = student or views.seen(_dense(layer_sizes(config.student_hidden, dataset)), config.training, dataset)
    return taught_by.network, student.network


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
    return (
        teacher and views.seen(teacher, config.teacher_training, dataset),
        student and views.seen(student, config.training, dataset),
    )


def needs_live_teacher(config: Config) -> bool:
    """Whether students need more of their teacher than its logits of every image, or of every shift of it."""
    return config.augment != "none" or bool(config.make_method().teacher_features)


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
    of_epoch = examples // training.batch_size
    return Setup(
        network,
        optimizer(max_norm, training.optimizer, training.momentum, training.weight_decay),
        training.batch_size,
        schedule=schedule(
            training.schedule, training.epochs * of_epoch, training.warmup,
            tuple(epoch * of_epoch for epoch in training.milestones), training.milestone_factor,
        ),
        shift=training.shift,
        shift_share=training.shift_share,
        prepare=views.prepare(training),
    )  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """The learning rate's factor after so many of all steps; equal by value.

    rising: steps in which it rises in a line from 0 to 1. name: of what follows in the others, from 1. milestones:
    steps of all, after each of which `steps` multiplies it by factor.
    """

    name: str
    steps: int
    rising: int
    milestones: tuple[int, ...] = ()
    factor: float = 0.1

    def __call__(self, step: Any) -> Any:
        """The factor."""
        if self.name == "steps":
            falling = self._stepped
        elif self.name == "cosine":
            falling = optax.cosine_decay_schedule(1.0, self.steps - self.rising)
        else:
            falling = optax.constant_schedule(1.0)
        if not self.rising:
            return falling(step)
        return optax.join_schedules([optax.linear_schedule(0.0, 1.0, self.rising), falling], [self.rising])(step)

    def _stepped(self, step: Any) -> Any:
        """Of steps after the rising ones."""
        passed = jnp.sum(
            jnp.asarray(step, jnp.float32)[None] + self.rising >= jnp.asarray(self.milestones, jnp.float32)
        )
        return jnp.asarray([self.factor**number for number in range(len(self.milestones) + 1)])[passed]


def schedule(
    name: str, steps: int, warmup: float = 0.0, milestones: tuple[int, ...] = (), factor: float = 0.1
) -> Schedule | None:
    """The learning rate's factor after so many of all steps; None where it is always 1.

    warmup: the share of the steps in which it rises in a line from 0 to 1; a cosine falls from 1 to 0 in the others.
    milestones, factor: of `steps`, in steps.
    """
    rising = min(round(warmup * steps), max(0, steps - 1))
    if name == "steps":
        return Schedule(name, steps, rising, milestones, factor)
    return Schedule(name, steps, rising) if rising or name == "cosine" else None


@dataclass(frozen=True)
class Optimizer:
    """An optimiser of a number or a schedule; equal by value.

    sgd is PyTorch's: the weight decay is a part of the gradient, and momentum sums gradients, without a factor 1 − m.
    adam decays weights apart from its moments, by the learning rate times the decay, as AdamW does (Loshchilov and
    Hutter, 2019). max_norm: on every unit's squared norm, 0 for none.
    """

    name: str
    momentum: float
    weight_decay: float
    max_norm: float

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        """With a number or a schedule."""
        decay = self.weight_decay
        if self.name == "sgd":
            parts = [optax.add_decayed_weights(decay), optax.sgd(learning_rate, self.momentum or None)]
        elif decay:
            rate = optax.scale_by_learning_rate(learning_rate, flip_sign=False)
            parts = [optimizers.adam(1.0), optax.add_decayed_weights(-decay), rate]
        else:
            parts = [optimizers.adam(learning_rate)]
        if self.max_norm:
            parts.append(optimizers.max_norm(self.max_norm))
        return optax.chain(*parts)


def optimizer(
    max_norm: float, name: str = "adam", momentum: float = 0.9, weight_decay: float = 0.0
) -> Callable[..., optax.GradientTransformation]:
    """Adam or SGD, with a bound on every unit's squared norm where that is not 0."""
    if name == "adam" and not weight_decay and not max_norm:
        return optimizers.adam
    return Optimizer(name, momentum, weight_decay, max_norm)


def abstract_logits(examples: int, classes: int, shift: int) -> jax.ShapeDtypeStruct:
    """The shapes of what `images.teacher_logits` will give."""
    shape = (shifts.view_count(shift), examples, classes) if shift else (examples, classes)
    return jax.ShapeDtypeStruct(shape, jnp.float32)
