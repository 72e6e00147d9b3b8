"""Measures of training batches, made inside the step: `(student's output, batch, teachers' outputs) -> values`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kd_jax.data.batch import Batch
from kd_jax.models import Output

Measure = Callable[[Output, Batch, tuple[Output, ...]], Float[Array, "..."]]
"""Values `[batch]` or `[batch, positions]`, averaged with the batch's weights."""

WATCHED = "watched."
"""What the names begin with of measures that only warnings are made of."""

WEIGHT = f"{WATCHED}weight"
"""The sum of a batch's weights, by which the batches of an epoch count in its means."""

_ROUNDING = 1e-3


def accuracy(student: Output, batch: Batch, taught: tuple[Output, ...]) -> Float[Array, "..."]:
    """Whether the answer is the label."""
    return _right(student, batch)


def teacher_accuracy(student: Output, batch: Batch, taught: tuple[Output, ...]) -> Float[Array, "..."]:
    """Whether the first teacher's answer is the label."""
    return _right(taught[0], batch)


def teacher_confidence(student: Output, batch: Batch, taught: tuple[Output, ...]) -> Float[Array, "..."]:
    """The first teacher's largest probability."""
    return jnp.max(jax.nn.softmax(taught[0].logits.astype(jnp.float32), axis=-1), axis=-1)


def teacher_normalised(student: Output, batch: Batch, taught: tuple[Output, ...]) -> Float[Array, "..."]:
    """Whether the first teacher's logits look like probabilities."""
    return _like_probabilities(taught[0]).astype(jnp.float32)


def student_normalised(student: Output, batch: Batch, taught: tuple[Output, ...]) -> Float[Array, "..."]:
    """Whether the student's logits look like probabilities."""
    return _like_probabilities(student).astype(jnp.float32)


def _right(output: Output, batch: Batch) -> Float[Array, "..."]:
    answers = jnp.argmax(output.logits, axis=-1).astype(jnp.int32)
    # Not promote_types, which refuses float64 beside float32 where nothing may be promoted.
    kind = jnp.float64 if output.logits.dtype == jnp.float64 else jnp.float32
    return (answers == jnp.asarray(batch.labels).astype(jnp.int32)).astype(kind)


def _like_probabilities(output: Output) -> Bool[Array, "..."]:
    logits = output.logits.astype(jnp.float32)
    return jnp.all(logits >= 0, axis=-1) & (jnp.abs(jnp.sum(logits, axis=-1) - 1) < _ROUNDING)
