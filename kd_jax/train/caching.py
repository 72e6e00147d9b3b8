"""Whether a teacher's answers are computed once, or in every step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.data.batch import Batch, check_counts
from kd_jax.methods import Method, is_on_policy
from kd_jax.teacher import DiskTeacher, SeveralTeachers, Teacher, answered
from kd_jax.train import memory
from kd_jax.train.processes import agreed, is_shared, local, on_host
from kd_jax.train.sharding import Spread, replicated
from kd_jax.train.sizes import SMALL

PyTree = Any

# Logits of all examples are kept where they take at most this share of the free memory.
_SHARE = 0.25


def kept_teacher(
    teacher: Teacher | None, method: Method, data: Batch, prepare: Any, epochs: int, batch_size: int | None = None,
    mesh: Mesh | None = None, asked: Teacher | None = None,
) -> Teacher | None:  # fmt: skip
    """The teacher with its logits of all examples, where every epoch would ask it the same, and they fit; and what is
    on disk in memory, where that fits.

    asked: who is, where the teacher lies on devices of several processes; None leaves the teacher in every step then.
    They do not where views are random (`prepare`), the student writes its own sequences, features are needed, or an
    epoch is all there is.
    """
    if teacher is not None and agreed(_fits(teacher), is_shared(mesh)):
        held = teacher.in_memory()
        teacher = held if mesh is None or held is teacher else replicated(mesh, held)
    same = prepare is None and not method.teacher_features and epochs > 1 and not is_on_policy(method)
    if teacher is None or teacher.per_example or not same:
        return teacher
    if isinstance(teacher, SeveralTeachers) and teacher.mean == "losses":
        return teacher
    count = check_counts(data)
    one = jax.eval_shape(lambda teacher, inputs: teacher.outputs(inputs)[0].logits, teacher, data.inputs)
    free = memory.available()
    if not agreed(free is None or 4 * int(np.prod(one.shape)) <= _SHARE * free, is_shared(mesh)):
        return teacher
    size = min(count, evaluation_batch_size(batch_size, teacher))
    if mesh is None:
        return answered(teacher, data.inputs, batch_size=size)
    if not is_shared(mesh):
        known = answered(teacher, data.inputs, batch_size=size, prepare=Spread(mesh))
        # Whatever a function calls back is on the first device alone, and is said to be on all.
        return replicated(mesh, jax.tree.map(on_host, known))
    return teacher if asked is None else replicated(mesh, answered(asked, local(data.inputs), batch_size=size))


def _fits(teacher: Teacher) -> bool:
    """Whether what a teacher has on disk takes at most the share of the free memory that answers may take."""
    each = teacher.teachers if isinstance(teacher, SeveralTeachers) else (teacher,)
    size, free = sum(one.memory for one in each if isinstance(one, DiskTeacher)), memory.available()
    return free is None or size <= _SHARE * free


def evaluation_batch_size(batch_size: int | None, network: PyTree) -> int:
    """How many examples a network is asked at once: many where it is small, else about what a training step has.

    network: parameters of it, as the leaves of a PyTree.
    """
    leaves = [leaf for leaf in jax.tree.leaves(network) if hasattr(leaf, "shape")]
    small = sum(leaf.size for leaf in leaves) < SMALL and all(leaf.ndim <= 2 for leaf in leaves)
    return max(batch_size or 0, 1000) if small else 2 * (batch_size or 128)


def answers_shape(teacher: Teacher, data: Batch, prepare: Any = None) -> tuple[int, ...]:
    """Of the logits that it would give."""

    def ask(teacher: Teacher, inputs: PyTree) -> Any:
        return teacher.outputs(inputs if prepare is None else prepare(jax.random.key(0), inputs, False))[0]

    found: tuple[int, ...] = jax.eval_shape(ask, teacher, jax.tree.map(jnp.asarray, data.inputs)).logits.shape
    return found


def answers_on(teacher: Teacher, data: Batch, classes: int, *, batch_size: int, prepare: Any = None) -> Teacher | None:
    """The teacher with its answers on `data`, for measures; None where it has other classes than the student."""
    if answers_shape(teacher, data, prepare)[-1] != classes:
        return None
    if isinstance(teacher, SeveralTeachers) and teacher.mean == "losses":
        return teacher
    return answered(teacher, data.inputs, batch_size=batch_size, prepare=prepare)
