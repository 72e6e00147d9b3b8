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
from kd_jax.train.lookup import of_batch
from kd_jax.train.sharding import put_batch

PyTree = Any

# At most so many batches, and so many bytes of them: larger steps gain nothing.
_MOST, _BYTES = 8, 2**22


class Sizes:
    """How many batches like one are a group, by its bytes and those of what the teacher says of it."""

    def __init__(self, teacher: Teacher | None) -> None:
        self.teacher = teacher if teacher is not None and teacher.per_example else None
        self.known: dict[Any, int] = {}

    def __call__(self, batch: Batch) -> int:
        """Equal for equal shapes."""
        shapes = shapes_of(batch)
        if shapes not in self.known:
            parts = jax.tree.leaves((batch, of_batch(self.teacher, batch)))
            size = sum(getattr(leaf, "nbytes", 0) for leaf in parts)
            self.known[shapes] = max(1, min(_MOST, _BYTES // max(1, size)))
        return self.known[shapes]


def shapes_of(tree: PyTree) -> Any:
    """What has to be equal for one program. Numbers of Python and keys are leaves, too."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), _dtype(leaf)) for leaf in leaves)


def _dtype(leaf: Any) -> Any:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return dtype or type(leaf)
    return jax.dtypes.canonicalize_dtype(dtype)


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
    """Where groups end: where they are full, before a batch of other shapes, and behind `every` steps of the epoch.

    most: how many batches like the first of a group it may have.
    """

    def __init__(self, most: Callable[[Batch], int], every: int | None, start: int) -> None:
        self.most, self.every, self.done = most, every, start
        self.open: list[tuple[Batch, Position]] = []

    def add(self, one: tuple[Batch, Position]) -> Iterator[list[tuple[Batch, Position]]]:
        """The groups that are whole with it."""
        if self.open and shapes_of(one[0]) != shapes_of(self.open[0][0]):
            yield from self.rest()
        self.open.append(one)
        self.done += 1
        full = len(self.open) >= self.most(self.open[0][0])
        if full or (self.every is not None and self.done % self.every == 0):
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
    after, shapes = jax.eval_shape(one, state, *_part(batch, teacher, jnp.int32(0), most))
    carry = state, jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)

    def body(place: Any, carry: tuple[PyTree, Packed]) -> tuple[PyTree, Packed]:
        state, kept = carry
        state, metrics = one(state, *_part(batch, teacher, place, most))
        set_at = jax.lax.dynamic_update_index_in_dim
        return state, jax.tree.map(lambda every, now: set_at(every, now, place, 0), kept, metrics)

    first = jnp.int32(0)
    if shapes_of(after) != shapes_of(state):
        # A method's own state may become what it stays in the first step.
        carry, first = body(first, carry), jnp.int32(1)
    return jax.lax.fori_loop(first, count, body, carry)


def _part(batch: Batch, teacher: Teacher | None, place: Any, most: int) -> tuple[Batch, Teacher | None]:
    size = check_counts(batch) // most
    rows = place * size + jnp.arange(size, dtype=jnp.int32)
    return take(batch, rows), teacher and teacher.take(rows)
