"""A teacher whose answers lie on disk: the rows that are asked for are read, and no more is in memory."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kd_jax.errors import ConfigError, DataError, MismatchError
from kd_jax.files.digests import digest
from kd_jax.methods.sparse import Sparse
from kd_jax.models import Output
from kd_jax.teachers.base import PyTree, Teacher
from kd_jax.teachers.folder import Folder
from kd_jax.teachers.keep import Arrays, looked_up
from kd_jax.teachers.kept import KeptTeacher, form_of, kept_teacher

# Bytes of answers that a part of the examples has in memory, about.
_PART = 1 << 28


@partial(jax.tree_util.register_dataclass, data_fields=["identity"], meta_fields=["folder", "rest"])
@dataclass(frozen=True)
class DiskTeacher(Teacher):
    """A cache on disk, looked up by the rows of the inputs. `in_memory()` reads all of it.

    identity: the digest of the cache's description.
    """

    folder: Folder
    rest: str
    identity: Any

    @property
    def per_example(self) -> bool:
        """It does."""
        return True

    @property
    def examples(self) -> int | None:
        """As many as were asked about."""
        return self.folder.examples

    @property
    def places(self) -> tuple[int, ...] | None:
        """As they were asked about."""
        return self.folder.places

    @property
    def sparse(self) -> Sparse | None:
        """As of what it reads."""
        keep = self.folder.keep
        if keep.kind == "samples":
            return Sparse("samples", keep.draws, keep.power)
        return Sparse("top-k", keep.k) if keep.kind == "top-k" and self.rest == "tail" else None

    @property
    def nbytes(self) -> int:
        """Bytes of its shards on disk."""
        return self.folder.nbytes

    @property
    def memory(self) -> int:
        """Bytes that all of it would take in memory."""
        leaves = jax.tree.leaves(self.shapes(1).by_example())
        return (self.examples or 0) * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    @property
    def parts(self) -> int:
        """So many that each takes about 256 MiB at most."""
        return -(-self.memory // _PART)

    def take(self, rows: Any) -> KeptTeacher:
        """The answers to these rows, read now. Raises `DataError` for a row that there is not, or a damaged shard."""
        rows = _known(rows, "rows")
        return self._taught(self._read(rows.reshape(-1), None), rows.shape)

    def at(self, examples: Any, positions: Any) -> KeptTeacher:
        """The answers at single positions of examples, read now."""
        examples, positions = _known(examples, "examples"), _known(positions, "positions")
        if len(self.folder.places) != 1:
            raise DataError(
                f"the cache in {self.folder.path} has answers of {list(self.folder.places)} positions: single "
                "positions need one axis of them"
            )
        most = self.folder.places[0]
        if positions.size and not (positions.min() >= 0 and positions.max() < most):
            wrong = positions.max() if positions.min() >= 0 else positions.min()
            raise DataError(f"a position is {wrong}, and the cache in {self.folder.path} has 0 to {most - 1}")
        return self._taught(self._read(examples.reshape(-1), positions.reshape(-1)), examples.shape, one=True)

    def part(self, rows: Any) -> Teacher:
        """These rows, in memory."""
        own = np.sort(_known(rows, "rows"), axis=None)
        return PartTeacher(jnp.asarray(own), self.take(own))

    def shapes(self, count: int) -> KeptTeacher:
        """The shapes of `take` of so many rows."""
        one = self.take(np.zeros(1, np.int32))
        return jax.eval_shape(lambda known, rows: known.take(rows), one, jax.ShapeDtypeStruct((count,), jnp.int32))

    def in_memory(self) -> KeptTeacher:
        """All of it."""
        return self.take(np.arange(self.examples or 0))

    def check_inputs(self, inputs: PyTree) -> None:
        """Raises `MismatchError` for inputs of the same types and shapes, and other values or another order."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
            return
        known, given = self.folder.description, form_of(inputs)
        kinds = [[one[1] for one in form] for form in (known["form"], given)]
        if kinds[0] != kinds[1] and [one[::2] for one in given] == [one[::2] for one in known["form"]]:
            raise MismatchError(
                f"the inputs are {', '.join(kinds[1])}, and the cache in {self.folder.path} is of {', '.join(kinds[0])}"
                ": give the inputs that it was made of, or teacher.in_memory(), which does not look at them"
            )
        if given == known["form"] and digest(inputs, as_jax=True) != known["inputs"]:
            raise MismatchError(
                f"the cache in {self.folder.path} is of other inputs, or of these in another order: give the inputs "
                "that it was made of"
            )

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """Raises `ConfigError`: rows are read before."""
        raise ConfigError(
            f"the cache in {self.folder.path} is looked up by rows: ask teacher.take(rows).outputs(inputs)"
        )

    def __repr__(self) -> str:
        """What it has, and where."""
        return f"DiskTeacher({str(self.folder.path)!r}, {self.folder.keep.kind}, {self.folder.examples} examples)"

    def _taught(self, arrays: Arrays, lead: tuple[int, ...], *, one: bool = False) -> KeptTeacher:
        keep, places = self.folder.keep, self.folder.places
        if keep.kind == "samples" and not one:
            # Draws are kept with one axis of positions, whatever there are.
            arrays = {name: array.reshape(len(array), *places, array.shape[-1]) for name, array in arrays.items()}
        head = self.folder.head()
        return kept_teacher(keep, arrays, classes=self.folder.classes, rest=self.rest, head=head, lead=lead)

    def _read(self, rows: Int[np.ndarray, " rows"], positions: Int[np.ndarray, " rows"] | None) -> Arrays:
        folder = self.folder
        if rows.size and not (rows.min() >= 0 and rows.max() < folder.examples):
            wrong = rows.max() if rows.min() >= 0 else rows.min()
            raise DataError(f"an example is {wrong}, and the cache in {folder.path} has 0 to {folder.examples - 1}")
        most = folder.most if folder.keep.kind == "samples" else 0
        numbers = rows // folder.rows
        found: Arrays = {}
        for number in np.unique(numbers) if rows.size else [0]:
            at = np.flatnonzero(numbers == number)
            own = rows[at] - int(number) * folder.rows
            arrays = folder.arrays(int(number))
            there = looked_up(folder.keep, arrays, own, None if positions is None else positions[at], most)
            for name, array in there.items():
                if name not in found:
                    found[name] = np.empty((len(rows), *array.shape[1:]), array.dtype)
                found[name][at] = array
        return found


@partial(jax.tree_util.register_dataclass, data_fields=["identity", "indices"], meta_fields=["folder", "rest"])
@dataclass(frozen=True)
class OrderedDiskTeacher(DiskTeacher):
    """A cache on disk in another order: `indices` are the examples `[examples]` of its rows, or positions of these."""

    indices: Any

    @property
    def examples(self) -> int | None:
        """As many as there are indices."""
        return len(self.indices)

    def take(self, rows: Any) -> KeptTeacher:
        """The answers to what these rows are."""
        rows, indices = _known(rows, "rows"), np.asarray(self.indices)
        return super().take(indices[rows]) if indices.ndim == 1 else super().at(*np.moveaxis(indices[rows], -1, 0))

    def check_inputs(self, inputs: PyTree) -> None:
        """As of the whole, where every example is there once."""
        order, count = np.argsort(self.indices, axis=0), self.folder.examples
        if np.ndim(self.indices) == 1 and np.array_equal(np.asarray(self.indices)[order], np.arange(count)):
            super().check_inputs(jax.tree.map(lambda leaf: leaf[order], inputs))


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "known"], meta_fields=[])
@dataclass(frozen=True)
class PartTeacher(Teacher):
    """Some rows of a cache in memory, looked up by the numbers that they have in the whole. rows: in rising order."""

    rows: Any
    known: KeptTeacher

    @property
    def per_example(self) -> bool:
        """It does."""
        return True

    @property
    def sparse(self) -> Sparse | None:
        """As the whole."""
        return self.known.sparse

    def take(self, rows: Int[Array | np.ndarray, "..."]) -> Teacher:
        """The answers to rows that are in this part."""
        return self.known.take(jnp.searchsorted(self.rows, rows))


def _known(numbers: Any, what: str) -> Int[np.ndarray, "..."]:
    if isinstance(numbers, jax.core.Tracer):
        raise ConfigError(
            f"the {what} of a cache on disk are asked for inside a compiled program: give teacher.in_memory(), which "
            "holds all of it"
        )
    return np.asarray(numbers).astype(np.int64)
