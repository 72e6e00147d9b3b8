"""The part of the training data on which a grid's best is chosen."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kd_jax.data.batch import Batch, as_batch, check_counts, take
from kd_jax.errors import DataError
from kd_jax.teacher import Teacher


class Split(NamedTuple):
    """What a grid's settings are trained on, with the teacher of these examples, and what they are measured on."""

    seen: Batch
    teacher: Teacher | None
    held: Batch


def hold_out(data: Batch, teacher: Teacher | None, development: Any) -> Split:
    """Raises `DataError` where nothing is left to choose by."""
    if development is not None:
        if isinstance(development, list):
            raise DataError(f"development is a list of {len(development)}: give its examples as one kd.Batch")
        return Split(data, teacher, as_batch(development))
    count = check_counts(data)
    size = min(10_000, count // 6)
    if size < 1:
        raise DataError(f"there are {count} examples: choosing by a part of them needs at least 6")
    # Data often lies class by class.
    drawn = np.random.default_rng(0).permutation(count)
    rows, held = np.sort(drawn[:-size]), np.sort(drawn[-size:])
    if hasattr(data.labels, "dtype") and data.labels.dtype.kind in "iu" and data.labels.ndim == 1:
        held = held[np.asarray(data.labels)[held] >= 0]
        if not len(held):
            raise DataError(f"the {size} examples to choose by have no labels: give others with development=")
    if teacher is not None and teacher.per_example:
        teacher = teacher.take(jnp.asarray(rows))
    return Split(take(data, jnp.asarray(rows)), teacher, take(data, jnp.asarray(held)))
