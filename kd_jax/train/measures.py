"""Measures of training batches, made inside the step: `(student's output, batch, teachers' outputs) -> values`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kd_jax.data.batch import Batch, check_values
from kd_jax.errors import DataError
from kd_jax.losses.softmax import first_of_largest
from kd_jax.models import Output

Measure = Callable[[Output, Batch, tuple[Output, ...]], Float[Array, "..."]]
"""Values `[batch]` or `[batch, positions]`, averaged with the batch's weights."""

WATCHED = "watched."
"""What the names begin with of measures that only warnings are made of."""

WEIGHT = f"{WATCHED}weight"
"""The sum of a batch's weights, by which the batches of an epoch count in its means."""

UNLABELLED = f"{WATCHED}unlabelled"
"""The share of examples, by their weights, whose label names no class: they count in no accuracy."""

_OF_LABELLED = ("accuracy", f"{WATCHED}teacher_accuracy")
_ROUNDING = 1e-3


def are_classes(batch: Batch, classes: int, *, later: bool = False) -> bool:
    """Whether the labels are whole numbers that name classes, or nothing where they are negative, but not all of them.

    Nothing that is traced. later: other batches may have those that name classes.
    """
    labels = batch.labels
    if not hasattr(labels, "dtype") or not jnp.issubdtype(labels.dtype, jnp.integer) or classes < 2:
        return False
    known = np.asarray(labels)
    try:
        check_values(batch._replace(labels=np.maximum(known, 0)), classes, absent=True)
    except DataError:
        return False
    return later or bool((known >= 0).any())


def of_labelled(means: Mapping[str, Any]) -> dict[str, Any]:
    """Means of which the accuracies are of the labelled examples alone; NaN where there are none."""
    found = dict(means)
    missing = found.pop(UNLABELLED, None)
    if missing is None:
        return found
    xp: Any = jnp if isinstance(missing, jax.Array) else np
    # A mean of ones may be 1 but for rounding.
    none = missing > 1 - 1e-6
    for name in (name for name in _OF_LABELLED if name in found):
        found[name] = xp.where(none, xp.nan, found[name] / xp.where(none, 1, 1 - missing))
    return found


def accuracy(student: Output, batch: Batch, taught: tuple[Output, ...]) -> Float[Array, "..."]:
    """Whether the answer is the label; of mixed labels the share that the answer has."""
    return _right(student, batch)


def unlabelled(student: Output, batch: Batch, taught: tuple[Output, ...]) -> Float[Array, "..."]:
    """Whether the label names no class."""
    labels = jnp.asarray(batch.labels)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.isnan(labels).any(axis=-1).astype(jnp.float32)
    named = (labels >= 0) & (labels < student.logits.shape[-1])
    return (~named).astype(jnp.float32)


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
    # NaN is no answer: it is beyond the classes.
    answers = first_of_largest(output.logits)
    # Not promote_types, which refuses float64 beside float32 where nothing may be promoted.
    kind = jnp.float64 if output.logits.dtype == jnp.float64 else jnp.float32
    if jnp.issubdtype(jnp.asarray(batch.labels).dtype, jnp.floating):
        share = jnp.take_along_axis(batch.labels, answers[..., None], axis=-1)[..., 0]
        return jnp.where(jnp.isnan(share), 0, share).astype(kind)
    return (answers == jnp.asarray(batch.labels).astype(jnp.int32)).astype(kind)


def _like_probabilities(output: Output) -> Bool[Array, "..."]:
    logits = output.logits.astype(jnp.float32)
    return jnp.all(logits >= 0, axis=-1) & (jnp.abs(jnp.sum(logits, axis=-1) - 1) < _ROUNDING)


def warn_of_outputs(history: dict[str, list[float]], warn: Callable[[str], None]) -> None:
    """Says what is likely to be a mistake, and what nothing else would tell."""
    for who in ("student", "teacher"):
        # A mean of ones may be 1 but for rounding.
        if min(history.get(f"{WATCHED}{who}_normalised", [0.0])) > 1 - 1e-5:
            warn(
                f"the {who}'s outputs look like probabilities (every row sums to 1 and none is negative), and the "
                "losses take logits: give the logits, or the logarithms of the probabilities"
            )
    right = history.get(f"{WATCHED}teacher_accuracy", [1.0])[0]
    sure = history.get(f"{WATCHED}teacher_confidence", [0.0])[0]
    if sure - right > 0.3:
        warn(
            f"the teacher is right on {right:.1%} of the training examples, and its own confidence is {sure:.1%}: does "
            "it get its inputs as it was trained on them (normalisation, order of the axes)?"
        )
