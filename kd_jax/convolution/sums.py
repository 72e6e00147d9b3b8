"""Sums over all axes but the last ones, in a form that XLA's CPU compiler makes fast: `column_sums`.

XLA sums columns slowly, and a batch normalisation needs such sums for its statistics and for its gradient. Here eight
parts of the rows are added number by number, and what is left is summed by a matrix product with ones. What was
measured: results/throughput/findings.md.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

_PARTS = 8
# Fewer rows, or more columns, are not worth it.
_ROWS = 1024
_COLUMNS = 4096


def is_worth_it(shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether `axes` are the leading ones, long and of a length that splits, and few columns are left."""
    if tuple(sorted(axes)) != tuple(range(len(axes))) or len(axes) == len(shape):
        return False
    rows = math.prod(shape[: len(axes)])
    return rows >= _ROWS and 0 < math.prod(shape[len(axes) :]) <= _COLUMNS and _parts(rows) > 1


def column_sums(array: Array, axes: tuple[int, ...]) -> Array:
    """`jnp.sum(array, axes)` of the leading axes, equal but for rounding."""
    kept = array.shape[len(axes) :]
    rows, columns = math.prod(array.shape[: len(axes)]), math.prod(kept)
    parts = _parts(rows)
    split = lax.reshape(array, (parts, rows // parts, columns))
    added = functools.reduce(lax.add, [split[part] for part in range(parts)])
    ones = jnp.ones((1, rows // parts), array.dtype)
    total = lax.dot_general(ones, added, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return lax.reshape(total, kept)


def scaled_column_sums(array: Array, columns: Array, axes: tuple[int, ...]) -> Array:
    """`jnp.sum(-array * columns, axes)`, where `columns` has one position along each of `axes`, but for rounding."""
    return -column_sums(array, axes) * lax.reshape(columns, array.shape[len(axes) :])


def _parts(rows: int) -> int:
    return max(parts for parts in range(1, _PARTS + 1) if rows % parts == 0)
