"""What a teacher who knows the training examples says of those of a batch, where they are told by their numbers."""

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from kd_jax.data.batch import Batch
from kd_jax.errors import ConfigError, DataError
from kd_jax.teacher import Teacher
from kd_jax.train.processes import is_shared
from kd_jax.train.sharding import replicated


def of_batch(teacher: Teacher | None, batch: Batch, mesh: Mesh | None = None) -> Teacher | None:
    """The teacher of a batch of an iterator, by its `indices`: of whole examples, or of positions, if packed.

    What has the weight 0 may have any number. Raises `ConfigError` where there are no indices, `DataError` for one that
    the teacher does not know.
    """
    if teacher is None or not teacher.per_example:
        return teacher
    if is_shared(mesh):
        raise ConfigError(
            "a cached teacher is looked up by one process, and the mesh has devices of several: give the teacher, "
            "or the data as a kd.Batch in memory"
        )
    if batch.indices is None:
        raise ConfigError(
            "a cached teacher is looked up by rows, which the batches of the iterator do not tell: give them indices "
            "(kd.Batch(inputs, labels, indices=rows)), the teacher itself, or the data as a kd.Batch in memory"
        )
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
    most = teacher.examples
    wrong = ((examples < 0) | (examples >= most)) & ~absent if most is not None else np.zeros(1, bool)
    if wrong.any():
        raise DataError(
            f"a batch has the index {examples[wrong][0]}, and the teacher knows {most} examples: indices must be 0 to "
            f"{most - 1 if most else 0}, or have the weight 0"
        )
    if known.ndim == 1:
        taught = teacher.take(np.where(absent, 0, known))
    else:
        taught = teacher.at(*(np.where(absent, 0, numbers) for numbers in (examples, known[..., 1])))
    return taught if mesh is None else replicated(mesh, taught)


def of_rows(teacher: Teacher | None, rows: Int[Array, "steps batch"], mesh: Mesh | None = None) -> Teacher | None:
    """A teacher that a compiled loop may ask for these rows: what is on disk is read."""
    if teacher is None:
        return None
    found = teacher.part(rows)
    return found if mesh is None or found is teacher else replicated(mesh, found)
