"""Shapes and types of the losses' arguments, checked while tracing: nothing broadcasts that does not fit.

The signatures leave the shapes open, so that `ShapeError` tells a wrong one also where types are checked at run time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, Shaped

from kd_jax.errors import ShapeError

Logits = Shaped[Array | np.ndarray, "..."]
"""Floats `[..., classes]`."""

Labels = Shaped[Array | np.ndarray, "..."]
"""Whole numbers in [0, classes), `[...]`; or probabilities, floats `[..., classes]`."""

Scalar = int | float | np.number | Num[Array | np.ndarray, ""]


def as_logits(logits: Logits, name: str = "logits") -> Array:
    """Logits as float32 or better: narrow floats are widened before anything is computed."""
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ShapeError(f"{name} are {logits.dtype}, and losses take floats: convert them with astype(float32)")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"{name} have the shape {list(logits.shape)}, and need a last axis of at least one class")
    return logits.astype(_widest(logits))


def as_pair(student_logits: Logits, teacher_logits: Logits) -> tuple[Array, Array]:
    """Logits of the same shape, in the wider of their types, at least float32."""
    student, teacher = as_logits(student_logits, "student logits"), as_logits(teacher_logits, "teacher logits")
    if student.shape != teacher.shape:
        raise ShapeError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ in shape: "
            f"the student has {student.shape[-1]} classes and the teacher {teacher.shape[-1]}, "
            "and both need the same examples and classes"
        )
    dtype = _widest(student, teacher)
    return student.astype(dtype), teacher.astype(dtype)


def as_labels(labels: Labels, logits: Array) -> Array:
    """Whole-number labels of at least 32 bits, which can hold the number of any class."""
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ShapeError(
            f"labels are {labels.dtype} {list(labels.shape)}, and this takes whole numbers {list(logits.shape[:-1])}: "
            f"{as_whole(labels, logits.shape)}"
        )
    if labels.shape != logits.shape[:-1]:
        raise ShapeError(
            f"labels {list(labels.shape)} do not fit logits {list(logits.shape)}, "
            f"whose labels are {list(logits.shape[:-1])}: {as_whole(labels, logits.shape)}"
        )
    return labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)


def as_whole(labels: Any, shape: tuple[int, ...]) -> str:
    """What makes labels whole numbers for logits of a shape, in words."""
    cast = "" if labels.dtype.kind in "iu" else ".astype(int)"
    if labels.shape == shape and not cast:
        return "give labels.argmax(-1) where each row has one 1, and labels.astype(float) where it may have several"
    if labels.shape == shape:
        return "give labels.argmax(-1)"
    if labels.shape == (*shape[:-1], 1):
        return f"give labels[..., 0]{cast}"
    return f"give labels{cast}" if labels.shape == shape[:-1] else "reshape them to integers"


def check_float_labels(labels: Any, shape: tuple[int, ...]) -> None:
    """Raises `ShapeError` for labels that are no whole numbers and have another shape than the outputs."""
    if labels.shape != shape:
        raise ShapeError(
            f"the labels are {labels.dtype} of the shape {labels.shape} and the outputs {shape}: float labels need the "
            f"same shape, and labels that name classes are whole numbers, so {as_whole(labels, shape)}"
        )


def _widest(*logits: Array) -> jnp.dtype:
    """Their widest type, at least float32."""
    return max((jnp.dtype(jnp.float32), *(z.dtype for z in logits)), key=lambda dtype: dtype.itemsize)


def are_soft(labels: Labels) -> bool:
    """Whether labels are probabilities."""
    return jnp.issubdtype(jnp.asarray(labels).dtype, jnp.floating)


def as_soft_labels(labels: Labels, logits: Array) -> Array:
    """Probabilities in the logits' type."""
    labels = jnp.asarray(labels)
    if labels.shape != logits.shape:
        raise ShapeError(
            f"soft labels {labels.dtype} {list(labels.shape)} do not fit logits {list(logits.shape)}, whose "
            f"probabilities have that shape, and classes are named by whole numbers: {as_whole(labels, logits.shape)}"
        )
    return labels.astype(logits.dtype)


def number(value: Any, logits: Array) -> Array:
    """A hyperparameter in the logits' type, which a whole number never narrows."""
    value = jnp.asarray(value, logits.dtype)
    if value.ndim:
        raise ShapeError(f"a loss's number has the shape {list(value.shape)} and must be one number: use jax.vmap")
    return value


def is_label(labels: Array, logits: Array) -> Array:
    """Whether a class is the label of its row, `[..., classes]`; nowhere for a label outside [0, classes)."""
    return labels[..., None] == jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)


def sum_to_1(soft: Any) -> bool:
    """Whether the rows `[rows, classes]` of an array on the host, if there is any, are distributions."""
    return bool(len(soft) and (soft >= 0).all() and np.allclose(soft.sum(-1), 1, atol=1e-3))
