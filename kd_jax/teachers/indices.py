"""A teacher who knows the training examples, looked up by the `indices` of a batch."""

import dataclasses
from typing import Any

import jax
import numpy as np

from kd_jax.data.batch import Batch
from kd_jax.errors import DataError
from kd_jax.teachers.base import SeveralTeachers, Teacher
from kd_jax.teachers.disk import DiskTeacher, OrderedDiskTeacher


def by_indices(teacher: Teacher, batch: Batch) -> Teacher:
    """Its answers to what the indices name: whole examples `[examples]`, or positions `[examples, positions, 2]`.

    What has the weight 0 may have any number. Raises `DataError` for one that the teacher does not know.
    """
    numbers = _checked(teacher, batch)
    return teacher.take(numbers) if numbers.ndim == 1 else teacher.at(numbers[..., 0], numbers[..., 1])


def in_order(teacher: Teacher | None, data: Batch) -> Teacher | None:
    """The teacher in the order of `data` in memory: as it is without indices, and where these count from 0."""
    if teacher is None or not teacher.per_example or data.indices is None:
        return teacher
    if isinstance(teacher, SeveralTeachers):
        known = [in_order(one, data) for one in teacher.teachers]
        return dataclasses.replace(teacher, teachers=tuple(one for one in known if one is not None))
    if isinstance(data.indices, jax.core.Tracer):
        packed, known_all = data.indices.ndim == 3, teacher.in_memory()
        return known_all.at(data.indices[..., 0], data.indices[..., 1]) if packed else known_all.take(data.indices)
    numbers = _checked(teacher, data)
    if numbers.ndim == 1 and np.array_equal(numbers, np.arange(teacher.examples or len(numbers))):
        return teacher
    if isinstance(teacher, DiskTeacher):
        return OrderedDiskTeacher(teacher.folder, teacher.rest, teacher.identity, numbers)
    return by_indices(teacher, data)


def _checked(teacher: Teacher, batch: Batch) -> Any:
    """The indices on the host, with 0 for what has no weight. Raises `DataError`."""
    known = np.asarray(batch.indices)
    if known.dtype.kind not in "iu" or not (known.ndim == 1 or (known.ndim == 3 and known.shape[-1] == 2)):
        raise DataError(
            f"the indices are {known.dtype} {list(known.shape)}: give whole numbers, [examples], or of packed "
            "sequences [examples, positions, 2], the example and its position"
        )
    examples = known if known.ndim == 1 else known[..., 0]
    absent = np.zeros(examples.shape, bool)
    if batch.weights is not None:
        counted = np.asarray(batch.weights) != 0
        if counted.ndim > examples.ndim:
            counted = counted.any(axis=tuple(range(examples.ndim, counted.ndim)))
        absent |= ~counted.reshape(counted.shape + (1,) * (examples.ndim - counted.ndim))
    for one in teacher.teachers if isinstance(teacher, SeveralTeachers) else (teacher,):
        most, places = one.examples, one.places
        wrong = ((examples < 0) | (examples >= most)) & ~absent if most is not None else np.zeros(1, bool)
        if wrong.any():
            raise DataError(
                f"a batch has the index {examples[wrong][0]}, and the teacher knows {most} examples: indices must be "
                f"0 to {most - 1 if most else 0}, or have the weight 0"
            )
        if known.ndim == 1 or places is None:
            continue
        if len(places) != 1:
            raise DataError(
                f"the indices name positions, and the teacher has answers of {list(places)} positions: give indices "
                "[examples], or a teacher with one axis of positions"
            )
        wrong = ((known[..., 1] < 0) | (known[..., 1] >= places[0])) & ~absent
        if wrong.any():
            raise DataError(
                f"a position is {known[..., 1][wrong][0]}, and the teacher has 0 to {places[0] - 1} of each example: "
                "give these, or the weight 0"
            )
    return np.where(absent if known.ndim == 1 else absent[..., None], 0, known)
