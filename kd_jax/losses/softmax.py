"""Softmaxes of compensated numbers, to rounding also where a probability is near 0 or 1."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import log
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kd_jax.losses.compensated import Compensated, difference, exp, subtract


def first_of_largest(logits: Array) -> Array:
    """The class that `argmax` tells, in a third of its time on a CPU; the number of classes where a logit is NaN."""
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    # Not ==: a program may compute the two in other precisions.
    largest = logits >= jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, places, logits.shape[-1]), axis=-1)


def is_top(logits: Array) -> Array:
    """Whether a class is the first of the largest logits of its row."""
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return places == first_of_largest(logits)[..., None]


def gaps(logits: Array, chosen: Array) -> Compensated:
    """Logits above that of the chosen class of each row."""
    return difference(logits, jnp.sum(jnp.where(chosen, logits, 0), axis=-1, keepdims=True))


def gaps_of_another(logits: Array, chosen: Array) -> Compensated:
    """Logits above that of a class which another network chose; above their largest, if they rule that class out."""
    of_chosen = jnp.sum(jnp.where(chosen, logits, 0), axis=-1, keepdims=True)
    ruled_out = of_chosen < jnp.finfo(logits.dtype).min / 2
    return difference(logits, jnp.where(ruled_out, jnp.max(logits, axis=-1, keepdims=True), of_chosen))


def of_chosen(z: Compensated, chosen: Array) -> Compensated:
    """The value of the chosen class of each row."""
    return Compensated(*(jnp.sum(jnp.where(chosen, part, 0), axis=-1, keepdims=True) for part in z))


def softmax(z: Compensated) -> tuple[Array, Array]:
    """Softmax and its logarithm, each to rounding, also where a probability is near 1 and its logarithm near 0."""
    top = is_top(z.value)
    below = subtract(z, of_chosen(z, top))
    odds = exp(below)
    others = jnp.sum(jnp.where(top, 0, odds), axis=-1, keepdims=True)
    return odds / (1 + others), below.value - jnp.log1p(others)


MANY = 64
"""The number of classes from which on a training step computes losses of float32 in few passes over the logits."""
_TRAINING: ContextVar[bool] = ContextVar("_TRAINING", default=False)


@contextmanager
def in_training() -> Iterator[None]:
    """What is traced within is part of a training step: see `are_many`.

    A function that is itself jitted keeps the form in which it was traced first.
    """
    before = _TRAINING.set(True)
    try:
        yield
    finally:
        _TRAINING.reset(before)


def is_training() -> bool:
    """Whether what is traced now is part of a training step."""
    return _TRAINING.get()


def are_many(logits: Array) -> bool:
    """Whether `pairs.of_many` is to be used: within a training step, of float32, and of many classes.

    Compensated numbers take some thirty passes over the logits, which is a fifth of a step of a language model of
    bytes. Evaluation, and losses that are called by themselves, have them always.
    """
    return is_training() and logits.dtype == jnp.float32 and logits.shape[-1] >= MANY


def largest_exponent(dtype: jnp.dtype) -> float:
    """Beyond this an exponential could overflow. KL is as large there, and the plain form has lost nothing."""
    return min(80.0, log(float(jnp.finfo(dtype).max)) - 8)


@jax.custom_jvp
def exp_minus_1_minus_x(x: Array) -> Array:
    """e^x - 1 - x, to rounding also near 0, where the subtraction would lose it."""
    small = jnp.abs(x) < 0.5
    y = jnp.where(small, x, 0)
    series = jnp.ones_like(x)
    for k in range(15, 2, -1):
        series = 1 + y / k * series
    return jnp.where(small, y * y / 2 * series, jnp.expm1(x) - x)


@exp_minus_1_minus_x.defjvp
def _exp_minus_1_minus_x_jvp(primals: tuple[Array], tangents: tuple[Any]) -> tuple[Array, Array]:
    """e^x - 1."""
    (x,) = primals
    return exp_minus_1_minus_x(x), jnp.expm1(x) * tangents[0]


def slight(x: Array) -> Array:
    """e^x - 1 - x of float32 numbers below 1/2, without an exponential."""
    series = jnp.ones_like(x)
    for k in range(10, 2, -1):
        series = 1 + x * (1 / k) * series
    return x * x / 2 * series
