"""Batches of an iterator whose steps run as one program: what is beside a small step takes as long as the step."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.data.batch import Batch, check_counts, take
from kd_jax.teacher import Teacher
from kd_jax.train.done import Packed, Position
from kd_jax.train.sharding import put_batch

PyTree = Any

# At most so many batches, and so many bytes of them: larger steps gain nothing.
_MOST, _BYTES = 8, 2**22


def together(batch: Batch) -> int:
    """How many batches like this one are a group: always the same for the same shapes."""
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(batch))
    return max(1, min(_MOST, _BYTES // max(1, size)))


def shapes_of(tree: PyTree) -> Any:
    """What has to be equal for one program."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)) for leaf in leaves)


class Group(NamedTuple):
    """Batches one behind the other. most: there is room for. count: there are. examples: of each of them."""

    batch: Batch
    count: Any
    most: int
    examples: int

    @staticmethod
    def of(batches: list[Batch], most: int) -> "Group":
        """Of equal shapes. What is missing to `most` is filled with the last."""
        count, examples = len(batches), check_counts(batches[0])
        if most == 1:
            return Group(batches[0], np.int32(1), 1, examples)
        filled = [*batches, *batches[-1:] * (most - count)]
        whole = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *filled)
        return Group(whole, np.int32(count), most, examples)

    def on_device(self, mesh: Mesh | None) -> "Group":
        """With arrays of JAX."""
        there = jax.tree.map(jnp.asarray, self.batch) if mesh is None else put_batch(mesh, self.batch)
        return self._replace(batch=there)

    def shapes(self) -> Any:
        """Of one batch."""
        structure, leaves = shapes_of(self.batch)
        return structure, tuple(((shape[0] // self.most, *shape[1:]), dtype) for shape, dtype in leaves)

    def first(self, teacher: Teacher | None) -> tuple[Batch, Teacher | None]:
        """The first batch, and its teacher."""
        return (self.batch, teacher) if self.most == 1 else _part(self.batch, teacher, jnp.int32(0), self.most)


class Cuts:
    """Where groups end: behind `most` batches, before one of other shapes, and behind `every` steps of the epoch."""

    def __init__(self, most: int, every: int | None, start: int) -> None:
        self.most, self.every, self.done = most, every, start
        self.open: list[tuple[Batch, Position]] = []

    def add(self, one: tuple[Batch, Position]) -> Iterator[list[tuple[Batch, Position]]]:
        """The groups that are whole with it."""
        if self.open and self.most > 1 and shapes_of(one[0]) != shapes_of(self.open[0][0]):
            yield from self.rest()
        self.open.append(one)
        self.done += 1
        if len(self.open) == self.most or (self.every is not None and self.done % self.every == 0):
            yield from self.rest()

    def rest(self) -> Iterator[list[tuple[Batch, Position]]]:
        """What is left."""
        group, self.open = self.open, []
        if group:
            yield group


def loop(
    one: Callable[..., tuple[PyTree, Packed]], state: PyTree, batch: Batch, teacher: Teacher | None, count: Any,
    most: int,
) -> tuple[PyTree, Packed]:  # fmt: skip
    """`count` steps of the `most` batches that `batch` has one behind the other; the numbers are `[most, names]`.

    The program is the same for all counts, and so are the bits of a step, whichever group it is in.
    """
    if most == 1:
        state, metrics = one(state, batch, teacher)
        return state, jax.tree.map(lambda value: value[None], metrics)
    _, shapes = jax.eval_shape(one, state, *_part(batch, teacher, jnp.int32(0), most))
    empty = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)

    def body(place: Any, carry: tuple[PyTree, Packed]) -> tuple[PyTree, Packed]:
        state, kept = carry
        state, metrics = one(state, *_part(batch, teacher, place, most))
        set_at = jax.lax.dynamic_update_index_in_dim
        return state, jax.tree.map(lambda every, now: set_at(every, now, place, 0), kept, metrics)

    return jax.lax.fori_loop(jnp.int32(0), count, body, (state, empty))


def _part(batch: Batch, teacher: Teacher | None, place: Any, most: int) -> tuple[Batch, Teacher | None]:
    size = check_counts(batch) // most
    rows = place * size + jnp.arange(size, dtype=jnp.int32)
    return take(batch, rows), teacher and teacher.take(rows)
