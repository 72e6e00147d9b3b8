"""Pools in forms that are fast on a CPU: `scattered`, the gradient of a max or min pool, and `summed`, of mean pools.

XLA looks at each window with a loop of its own. Here all windows are looked at side by side: one array for each place
in the window, and a sum is a convolution with ones. What was measured: results/throughput/findings.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kd_jax.convolution.forms import convolve
from kd_jax.convolution.operands import channels_last, places

# More places in a window take longer to compile than they save.
_PLACES = 16
_SPACE = 3
_MOVED = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")


def is_worth_it(window_dimensions: Sequence[int], window_strides: Sequence[int], **others: Any) -> bool:
    """Whether no number lies in two windows, and a window is not large."""
    meet = any(size > stride for size, stride in zip(window_dimensions, window_strides, strict=True))
    return not meet and 1 < math.prod(window_dimensions) <= _PLACES


def is_sum_worth_it(shape: Sequence[int], **how: Sequence[Any]) -> bool:
    """Whether windows are small, and only axes between others have them, which are the batch and features then."""
    before, behind = _outer_axes(how)
    space = len(shape) - before - behind
    features = math.prod(shape[len(shape) - behind :])
    small = 1 < math.prod(how["window_dimensions"]) <= _PLACES
    return small and before > 0 and 1 <= space <= _SPACE and features > 1 and 0 not in shape


def summed(operand: Array, **how: Sequence[Any]) -> Array:
    """The sum of each window of `[*batch, *space, *features]`; JAX's `reduce_window_sum`, but for rounding.

    how: the parameters of that, with whole numbers of Python or NumPy.
    """
    before, behind = _outer_axes(how)
    inner = slice(before, operand.ndim - behind)
    batch, space, features = operand.shape[:before], operand.shape[inner], operand.shape[inner.stop :]
    window, strides, zeros, dilation = (tuple(map(int, how[name][inner])) for name in _MOVED)
    channels = math.prod(features)
    out = convolve(
        lax.reshape(operand, (math.prod(batch), *space, channels)),
        jnp.ones((*window, 1, channels), operand.dtype),
        dimension_numbers=channels_last(len(space)),
        feature_group_count=channels,
        batch_group_count=1,
        window_strides=strides,
        padding=tuple((int(low), int(high)) for low, high in how["padding"][inner]),
        lhs_dilation=zeros,
        rhs_dilation=dilation,
        precision=None,
        preferred_element_type=operand.dtype,
        out_sharding=None,
    )
    return lax.reshape(out, (*batch, *out.shape[1:-1], *features))


def _outer_axes(how: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """How many axes before and behind the others have no window, stride, padding or dilation."""
    moved = zip(*(how[name] for name in _MOVED), how["padding"], strict=True)
    still = [(*sizes, *edges) == (1, 1, 1, 1, 0, 0) for *sizes, edges in moved]
    return (len(still), 0) if all(still) else (still.index(False), still[::-1].index(False))


def scattered(
    source: Array,
    operand: Array,
    *,
    select_prim: Any,
    window_dimensions: Sequence[Any],
    window_strides: Sequence[Any],
    padding: Sequence[tuple[Any, Any]],
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
