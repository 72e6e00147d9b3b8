"""What a `Config` trains: its networks, and the recipe of each training."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax import optimizers
from kd_jax.data import shifts
from kd_jax.data.dataset import Dataset
from kd_jax.experiments.notebook.config import Config, Training
from kd_jax.methods.logits import CROSS_ENTROPY, Method
from kd_jax.models.network import Network, Output, mlp
from kd_jax.train.step import Examples, Recipe


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
    return examples._replace(images=shifts.pad(examples.images, shift)) if shift else examples


def abstract_outputs(examples: int, classes: int, shift: int) -> Output:
    """The shapes of what `teacher.outputs` will give."""
    shape = (shifts.view_count(shift), examples, classes) if shift else (examples, classes)
    return Output(jax.ShapeDtypeStruct(shape, jnp.float32))  # type: ignore[arg-type]


# Equal functions must be the same function, or JAX would compile a program for each.
@cache
def _network(sizes: tuple[int, ...], dropout: float = 0.0, input_dropout: float = 0.0) -> Network:
    """The fully connected network of such layers."""
    return mlp(sizes, dropout=dropout, input_dropout=input_dropout)
