"""Feature maps: their shapes and types, checked while tracing, and how one is brought to the size of another.

Channels are the last axis: `[batch, *space, channels]`, with any number of space axes, also none. The signatures of the
feature losses leave the shapes open, so that `ShapeError` tells a wrong one wherever the types are checked as well.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from kd_jax.errors import ShapeError

Features = Shaped[Array | np.ndarray, "..."]
"""Floats `[batch, *space, channels]`."""

Values = Float[Array, " batch"]
"""One value for each example."""

Scalar = int | float | np.number | Float[Array, ""]

Pool = Callable[[Features, Sequence[int]], Array]


def wide(*arrays: Array) -> type:
    """The type to compute in: float64 if one of the arrays has it, else float32."""
    return jnp.float64 if any(array.dtype == jnp.float64 for array in arrays) else jnp.float32


def as_features(features: Features, name: str = "features") -> Array:
    """Features as float32 or better: narrow floats are widened before anything is computed."""
    features = jnp.asarray(features)
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise ShapeError(f"{name} are {features.dtype}, and feature losses take floats: convert with astype(float32)")
    if features.ndim < 2 or 0 in features.shape:
        raise ShapeError(
            f"{name} have the shape {list(features.shape)} and need [batch, *space, channels], none of them 0"
        )
    return features.astype(wide(features))


def as_pair(student: Features, teacher: Features) -> tuple[Array, Array]:
    """Features of the same examples, in the wider of their types, at least float32."""
    student, teacher = as_features(student, "student features"), as_features(teacher, "teacher features")
    if student.shape[0] != teacher.shape[0]:
        raise ShapeError(f"{both(student, teacher)} are of different batches: give both the same examples")
    dtype = wide(student, teacher)
    return student.astype(dtype), teacher.astype(dtype)


def as_same(student: Features, teacher: Features, remedy: str) -> tuple[Array, Array]:
    """`as_pair` of features that must have one shape."""
    student, teacher = as_pair(student, teacher)
    if student.shape != teacher.shape:
        raise ShapeError(f"{both(student, teacher)} differ in shape: {remedy}")
    return student, teacher


def as_flat(student: Features, teacher: Features) -> tuple[Array, Array]:
    """`as_pair` with one vector for each example; the two lengths may differ."""
    return flat(*as_pair(student, teacher))


def flat(student: Array, teacher: Array) -> tuple[Array, Array]:
    """One vector for each example."""
    return student.reshape(student.shape[0], -1), teacher.reshape(teacher.shape[0], -1)


def same_channels(student: Array, teacher: Array) -> None:
    """Refuses features of different widths."""
    if student.shape[-1] != teacher.shape[-1]:
        raise ShapeError(
            f"{both(student, teacher)} differ in channels: project the student's, say by a 1x1 convolution"
        )


def per_channel(values: Features, name: str, features: Array) -> Array:
    """Numbers for the channels of `features`, in its type."""
    values = jnp.asarray(values, features.dtype)
    if values.shape != features.shape[-1:]:
        raise ShapeError(
            f"{name} has the shape {list(values.shape)} and features {list(features.shape)} need one number for each "
            f"channel: [{features.shape[-1]}]"
        )
    return values


def both(student: Array, teacher: Array) -> str:
    """The two shapes, to begin an error with."""
    return f"student features {list(student.shape)} and teacher features {list(teacher.shape)}"


def average_pool(features: Features, space: Sequence[int]) -> Array:
    r"""Adaptive average pooling to `[batch, *space, channels]`, as in PyTorch.

    Cell i of m is the mean over the positions $[\lfloor i n / m \rfloor, \lceil (i + 1) n / m \rceil)$ of an axis of n.
    Cells overlap where m does not divide n.
    """
    return _pooled(as_features(features), space, jnp.mean)


def max_pool(features: Features, space: Sequence[int]) -> Array:
    """Adaptive max pooling to `[batch, *space, channels]`: the largest of each cell of `average_pool`."""
    return _pooled(as_features(features), space, jnp.max)


def cells(size: int, count: int) -> list[slice]:
    """The positions of each of `count` cells of an axis of `size` positions."""
    return [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def match_space(student: Features, teacher: Features, pool: Pool = average_pool) -> tuple[Array, Array]:
    """Both maps at the smaller of their sizes, axis by axis: `[batch, *space, channels]` each.

    RepDistiller and mdistiller compare heights alone and pool to squares. A projector that is no 1x1 convolution wants
    its input pooled: call this before it.

    student, teacher: `[batch, *space, channels]`; channels may differ. pool: `average_pool` or `max_pool`.
    Raises ShapeError where the numbers of space axes differ.
    """
    student, teacher = as_pair(student, teacher)
    if student.ndim != teacher.ndim:
        raise ShapeError(f"{both(student, teacher)} differ in their space axes: pool or reshape one of them")
    space = np.minimum(student.shape[1:-1], teacher.shape[1:-1]).tolist()
    return pool(student, space), pool(teacher, space)


def resize_nearest(features: Features, space: Sequence[int]) -> Array:
    r"""The map at another size: position i of m is $\lfloor i n / m \rfloor$ of n, as PyTorch's mode "nearest"."""
    features = as_features(features)
    for axis, count in _axes(features, space):
        if count != features.shape[axis]:
            index = np.arange(count) * features.shape[axis] // count
            features = jnp.take(features, index, axis=axis)
    return features


def _pooled(features: Array, space: Sequence[int], reduce: Callable[..., Array]) -> Array:
    for axis, count in _axes(features, space):
        size = features.shape[axis]
        if size == count:
            continue
        if size % count == 0:
            shape = (*features.shape[:axis], count, size // count, *features.shape[axis + 1 :])
            features = reduce(features.reshape(shape), axis=axis + 1)
        else:
            parts = [reduce(features[(slice(None),) * axis + (cell,)], axis=axis) for cell in cells(size, count)]
            features = jnp.stack(parts, axis=axis)
    return features


def _axes(features: Array, space: Sequence[int]) -> list[tuple[int, int]]:
    """The space axes and their new sizes."""
    if len(space) != features.ndim - 2 or any(count < 1 for count in space):
        raise ShapeError(
            f"a space of {list(space)} does not fit features {list(features.shape)}: "
            f"give {features.ndim - 2} sizes of at least 1"
        )
    return list(enumerate(space, start=1))
