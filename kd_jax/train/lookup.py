"""What a teacher who knows the training examples says of those of a batch, where they are told by their numbers."""

from jax.sharding import Mesh
from jaxtyping import Array, Int

from kd_jax.data.batch import Batch
from kd_jax.errors import ConfigError
from kd_jax.teacher import Teacher
from kd_jax.teachers.indices import by_indices
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
    taught = by_indices(teacher, batch)
    return taught if mesh is None else replicated(mesh, taught)


def of_rows(teacher: Teacher | None, rows: Int[Array, "steps batch"], mesh: Mesh | None = None) -> Teacher | None:
    """A teacher that a compiled loop may ask for these rows: what is on disk is read."""
    if teacher is None:
        return None
    found = teacher.part(rows)
    return found if mesh is None or found is teacher else replicated(mesh, found)
