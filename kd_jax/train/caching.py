"""Whether a teacher's answers are computed once, or in every step."""

from typing import Any

import jax
import numpy as np

from kd_jax.data.batch import Batch, check_counts
from kd_jax.methods import Method
from kd_jax.teacher import SeveralTeachers, Teacher, cached
from kd_jax.train import memory

PyTree = Any

# Logits of all examples are kept where they take at most this share of the free memory.
_SHARE = 0.25


def kept_teacher(teacher: Teacher | None, method: Method, data: Batch, prepare: Any, epochs: int) -> Teacher | None:
    """The teacher with its logits of all examples, where every epoch would ask it the same, and they fit.

    They do not where views are random (`prepare`), features are needed, or an epoch is all there is.
    """
    same = prepare is None and not method.teacher_features and epochs > 1
    if teacher is None or teacher.per_example or not same:
        return teacher
    if isinstance(teacher, SeveralTeachers) and teacher.mean == "losses":
        return teacher
    count = check_counts(data)
    one = jax.eval_shape(lambda teacher, inputs: teacher.outputs(inputs)[0].logits, teacher, data.inputs)
    free = memory.available()
    if free is not None and 4 * int(np.prod(one.shape)) > _SHARE * free:
        return teacher
    return cached(teacher, data.inputs, batch_size=min(count, 1000))
