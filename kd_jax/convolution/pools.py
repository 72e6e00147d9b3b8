"""Pools in forms that are fast on a CPU: `scattered`, the gradient of a max or min pool, and `summed`, of mean pools.

XLA looks at each window with a loop of its own. Here all windows are looked at side by side: one array for each place
in the window, and a sum is a convolution with ones. What was measured: results/throughput/findings.md.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kd_jax.convolution.forms import convolve
from kd_jax.convolution.operands import places

# More places in a window take longer to compile than they save.
_PLACES = 16


def is_worth_it(window_dimensions: Sequence[int], window_strides: Sequence[int], **others: Any) -> bool:
    """Whether no number lies in two windows, and a window is not large."""
    meet = any(size > stride for size, stride in zip(window_dimensions, window_strides, strict=True))
    return not meet and 1 < math.prod(window_dimensions) <= _PLACES


def is_sum_worth_it(shape: Sequence[int], **how: Sequence[Any]) -> bool:
    """Whether only the axes between the first and the last, three at most, have windows, which are not large."""
    moved = [how[name] for name in ("window_dimensions", "window_strides", "base_dilation", "window_dilation")]
    outer = all(sizes[axis] == 1 for sizes in moved for axis in (0, -1))
    inside = outer and all(tuple(how["padding"][axis]) == (0, 0) for axis in (0, -1))
    return inside and 3 <= len(shape) <= 5 and 0 not in shape and 1 < math.prod(how["window_dimensions"]) <= _PLACES


def summed(
    operand: Array,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> Array:
    """The sum of each window of `[batch, *space, features]`; what `lax.reduce_window` computes but for rounding."""
    last, features = operand.ndim - 1, operand.shape[-1]
    space = tuple(range(1, last))
    numbers = lax.ConvDimensionNumbers((0, last, *space), (last, last - 1, *range(last - 1)), (0, last, *space))
    return convolve(
        operand,
        jnp.ones((*window_dimensions[1:-1], 1, features), operand.dtype),
        dimension_numbers=numbers,
        feature_group_count=features,
        batch_group_count=1,
        window_strides=tuple(window_strides[1:-1]),
        padding=tuple((int(low), int(high)) for low, high in padding[1:-1]),
        lhs_dilation=tuple(base_dilation[1:-1]),
        rhs_dilation=tuple(window_dilation[1:-1]),
        precision=None,
        preferred_element_type=operand.dtype,
    )


def scattered(
    source: Array,
    operand: Array,
    *,
    select_prim: Any,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Array:
    """Each number of `source` where its window of `operand` has the first of its largest, and 0 elsewhere.

    What JAX's `select_and_scatter_add` computes for the same parameters, where no number lies in two windows.
    select_prim: greater or equal for a max pool, less or equal for a min pool.
    """
    largest = select_prim.name == "ge"
    outside = jnp.asarray(-jnp.inf if largest else jnp.inf, operand.dtype)
    edges = [
        (low, max(high, count * stride - size - low))
        for size, count, stride, (low, high) in zip(operand.shape, source.shape, window_strides, padding, strict=True)
    ]
    padded = lax.pad(operand, outside, [(low, high, 0) for low, high in edges])
    within = [count * stride for count, stride in zip(source.shape, window_strides, strict=True)]

    def at(place: tuple[int, ...]) -> Array:
        return lax.slice(padded, place, within, window_strides)

    offsets = places(window_dimensions)
    value, winner = at(offsets[0]), jnp.zeros(source.shape, jnp.int32)
    for number, place in enumerate(offsets[1:], 1):
        other = at(place)
        # As XLA compares, also with what is not a number.
        stays = lax.ge(value, other) if largest else lax.le(value, other)
        value, winner = lax.select(stays, value, other), lax.select(stays, winner, jnp.full_like(winner, number))
    zeros = jnp.zeros_like(source)
    numbers = dict(zip(offsets, range(len(offsets)), strict=True))
    parts = [
        lax.select(lax.eq(winner, jnp.full_like(winner, numbers[place])), source, zeros) if place in numbers else zeros
        for place in places(window_strides)
    ]
    # [*window_strides, *counts] as [counts · strides]
    stacked = lax.reshape(jnp.stack(parts), (*window_strides, *source.shape))
    turns = [axis + half * source.ndim for axis in range(source.ndim) for half in (1, 0)]
    whole = lax.reshape(lax.transpose(stacked, turns), within)
    # Off what the padding was, and with zeros for what no window saw.
    ends = [(-low, low + size - end, 0) for (low, _), size, end in zip(edges, operand.shape, within, strict=True)]
    return lax.pad(whole, jnp.zeros((), source.dtype), ends)
