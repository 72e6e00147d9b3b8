"""Vectors and batches of them: lengths without a division by 0, and examples that may be absent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from kd_jax.errors import ShapeError

BLOCK = 2**24
"""Where an intermediate array would have more elements than this, examples are taken in blocks."""


def dot(a: Array, b: Array) -> Array:
    """a bᵀ over the last axis of both, `[..., n, m]`, in full precision: similarities are often compared closely."""
    return jnp.matmul(a, jnp.swapaxes(b, -1, -2), precision=jax.lax.Precision.HIGHEST)


def unit(vectors: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Vectors divided by their L2 norm; a vector of zeros stays, with a gradient of 0. Any scale, to rounding."""
    vectors = scaled(vectors, axis)
    squared = jnp.sum(jnp.square(vectors), axis=axis, keepdims=True)
    zero = squared == 0
    return jnp.where(zero, 0, vectors / jnp.sqrt(jnp.where(zero, 1, squared)))


def scaled(values: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Values divided by the largest size among them, for what is blind to a common factor: squares stay in range."""
    return values / largest(values, axis)


def largest(values: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """The largest size among the values, or 1 if all are 0; with their axes.

    It counts as a constant, so a gradient is right only of what does not depend on it, as a factor that cancels.
    """
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(values), axis=axis, keepdims=True))
    return jnp.where(size == 0, 1, size)


def root(squared: Array) -> Array:
    """The square root, with a gradient of 0 at 0."""
    zero = squared == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def power(values: Array, exponent: Any) -> Array:
    """|x|^p, with a gradient of 0 at 0."""
    zero = values == 0
    raised = jnp.power(jnp.abs(jnp.where(zero, 1, values)), jnp.asarray(exponent, values.dtype))
    return jnp.where(zero, 0, raised)


def smooth_l1(difference: Array) -> Array:
    """Huber's loss at 1: d²/2 up to a size of 1, |d| - 1/2 beyond."""
    size = jnp.abs(difference)
    return jnp.where(size < 1, jnp.square(difference) / 2, size - 0.5)


class Weights(NamedTuple):
    """Weights of a batch. Equal ones are the paper's loss of the examples that are present, whatever their size."""

    present: Array  # [batch]: whether an example counts at all.
    relative: Array  # [batch]: weights divided by their mean over the examples that are present.
    present_count: Array  # How many are present; at least 1, to divide by.

    def mean(self, values: Array) -> Array:
        """The weighted mean over the last axis, the batch."""
        return jnp.sum(values * jnp.broadcast_to(self.relative, values.shape), axis=-1) / self.present_count

    def only(self, values: Array) -> Array:
        """Values of the examples that are present, and 0 for the others: no NaN there does harm."""
        return jnp.where(self.present.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)


def as_weights(weights: Shaped[Array | np.ndarray, "..."] | None, features: Array) -> Weights:
    """Weights `[batch]` of the examples of `features`; None: all count the same."""
    if weights is None:
        weights = jnp.ones(features.shape[0], features.dtype)
    weights = jnp.asarray(weights)
    if weights.shape != features.shape[:1]:
        raise ShapeError(
            f"weights {list(weights.shape)} do not fit features {list(features.shape)}: "
            f"give one for each example, [{features.shape[0]}]"
        )
    weights = weights.astype(features.dtype)
    present = weights > 0
    count = jnp.maximum(jnp.sum(present), 1).astype(features.dtype)
    weights = jnp.where(present, weights, 0)
    total = jnp.sum(weights)
    return Weights(present, weights * count / jnp.where(total > 0, total, 1), count)


def for_each(function: Callable[..., Array], examples: Any, *, elements: int) -> Array:
    """`function` of each example, with at most BLOCK elements of intermediate arrays at a time, `elements` an example.

    Large batches are taken in blocks and their intermediate arrays computed again for the gradient.
    """
    count = jax.tree.leaves(examples)[0].shape[0]
    if count * elements <= BLOCK:
        return jax.vmap(function)(examples)
    return jax.lax.map(jax.checkpoint(function), examples, batch_size=max(1, BLOCK // elements))
