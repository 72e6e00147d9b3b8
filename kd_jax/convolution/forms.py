"""One convolution in forms for which XLA's CPU compiler has fast kernels, also in loops: `convolve`.

- Large ones of float32: oneDNN's, where it is installed.
- Ungrouped, in float32, bfloat16 and float16: XLA's convolution, in the order batch, space, features; space, inputs,
  outputs.
- One number for a position and a pair of features (1 × 1, and its gradients; with strides where oneDNN has not taken
  them), and types for which XLA has no kernel (float64, complex): matrix products, one for each offset in the window,
  or for each output where there are fewer.
- Depthwise: sums of shifted products.
- Groups (which a `vmap` over kernels makes): one after another, but small ones together.
- Three axes of space: sums of convolutions of two.
- Inputs dilated with zeros (gradients of strided convolutions): one smaller convolution for each phase, without zeros.

What was measured: results/throughput/findings.md.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core.primitives import conv_general_dilated_p
from jaxtyping import Array

from kd_jax.convolution import onednn_form
from kd_jax.convolution.operands import Operands, channels_last, dilated, places, points, without

_EIGEN = (jnp.float32, jnp.bfloat16, jnp.float16)
# More products than this are slower to compile than they save.
_PRODUCTS = 128
# Groups that have fewer outputs together are computed as one, with zeros: a vector's lanes, which were idle.
_VECTOR = 16
# As many sums of planar convolutions are faster than a spatial one.
_PLANES = 8
# So many groups are unrolled; more are a loop.
_UNROLLED_GROUPS = 8
# So many rows are added number by number before what is left is summed by a matrix product (column sums are slow).
_ADDED_ROWS = 8


def convolve(
    lhs: Array,
    rhs: Array,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    plain: bool = False,
    **options: Any,
) -> Array:
    """What `lax.conv_general_dilated_p` computes for the same parameters, of 1 to 3 axes of space.

    plain: only by moving axes, without other arrays, which would have to be sharded as these are.
    """
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    if batch_group_count > 1:
        lhs = _batch_groups_as_features(lhs, lhs_spec, batch_group_count)
    else:
        lhs = lax.transpose(lhs, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]))
    rhs = lax.transpose(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))
    groups = feature_group_count * batch_group_count  # one of them is 1
    own = Operands(lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, groups, options)
    out = _library(own) if plain else _form(own)
    places = dict(zip(out_spec, (0, out.ndim - 1, *range(1, out.ndim - 1)), strict=True))
    return lax.transpose(out, [places[axis] for axis in range(out.ndim)])


def _form(own: Operands) -> Array:
    """[batch, *extents, groups · outputs], by the form that is fast."""
    alone = points(own)
    if alone:
        out = _form(without(own, alone))
        return lax.reshape(out, (len(own.lhs), *own.extents, out.shape[-1]))
    cropped = _cropped(own)
    if points(cropped):
        return _form(cropped)
    # Inputs at the end that a stride leaves out, as in gradients, oneDNN leaves out where they are.
    by_onednn = _by_onednn(own)
    if by_onednn is None and cropped is not own:
        by_onednn = _by_onednn(cropped)
    if by_onednn is not None:
        return by_onednn
    own, inputs = cropped, own.rhs.shape[-2]
    for axis in range(own.dims):
        if own.lhs_dilation[axis] > 1 and own.window_strides[axis] == own.rhs_dilation[axis] == 1:
            return _by_phases(own, axis)
    if 0 in own.lhs.shape or 0 in own.rhs.shape or 0 in own.extents:
        return _library(own)
    if own.groups > 1:
        if inputs == 1 and math.prod(own.window) <= _PRODUCTS:
            return _shifted_products(own)
        if own.lhs.shape[0] == 1 and math.prod(own.extents) <= _PRODUCTS:
            return _summed_products(own)
        return _grouped(own)
    products = math.prod(map(min, own.window, own.extents))
    slow = own.lhs.dtype not in _EIGEN
    if products == 1 or (slow and products <= _PRODUCTS):
        return _matrix_products(own)
    if own.dims == 3 and not slow and own.lhs_dilation[0] == 1 and min(own.window[0], own.extents[0]) <= _PLANES:
        return _by_planes(own)
    return _library(own)


def _by_onednn(own: Operands) -> Array | None:
    return onednn_form.convolution(own, otherwise=lambda same: _library(_cropped(same)))


def _cropped(own: Operands) -> Operands:
    """Without padding below 0, with which XLA's kernel of jax 0.10.2 reads what is not its own."""
    for axis, (low, high) in enumerate(own.padding):
        size = own.lhs.shape[axis + 1]
        if own.lhs_dilation[axis] == 1 and min(low, high) < 0 < size + min(low, 0) + min(high, 0):
            lhs = lax.slice_in_dim(own.lhs, max(-low, 0), size - max(-high, 0), 1, axis + 1)
            padding = _replaced(own.padding, axis, (max(low, 0), max(high, 0)))
            own = own._replace(lhs=lhs, padding=padding)
    return own


def _library(own: Operands) -> Array:
    """XLA's own kernel."""
    swapped = own.groups == 1 and _is_window_larger(own)
    if swapped:
        own = _swapped(own)
    out = conv_general_dilated_p.bind(
        own.lhs,
        own.rhs,
        window_strides=own.window_strides,
        padding=own.padding,
        lhs_dilation=own.lhs_dilation,
        rhs_dilation=own.rhs_dilation,
        dimension_numbers=channels_last(own.dims),
        feature_group_count=own.groups,
        batch_group_count=1,
        **own.options,
    )
    return lax.transpose(out, (out.ndim - 1, *range(1, out.ndim - 1), 0)) if swapped else out


def _is_window_larger(own: Operands) -> bool:
    """Whether XLA would swap the operands, as its rule has it (`SwapConvOperands` of the algebraic simplifier)."""
    sizes = [
        window if size == stride == dilation == 1 else size
        for size, window, stride, dilation in zip(
            own.lhs.shape[1:-1], own.window, own.window_strides, own.rhs_dilation, strict=True
        )
    ]
    return math.prod(own.window) > math.prod(sizes)


def _swapped(own: Operands) -> Operands:
    """The same convolution with inputs as kernel and kernel as inputs, whose output has batch and features swapped.

    The gradient of a strided transposed convolution has a window as large as an image, dilated with zeros: so swapped
    it multiplies no zeros. XLA swaps those, too, but into an order for which it has no kernel.
    """
    space = range(own.dims)
    kernel = lax.transpose(lax.rev(own.lhs, [axis + 1 for axis in space]), (*range(1, own.dims + 2), 0))
    inputs = lax.transpose(lax.rev(own.rhs, space), (own.dims + 1, *range(own.dims + 1)))
    padding = []
    for (low, high), size, window, dilation, other in zip(
        own.padding, own.lhs.shape[1:-1], own.window, own.lhs_dilation, own.rhs_dilation, strict=True
    ):
        more = dilated(size, dilation) - dilated(window, other)
        padding.append((low + more, high + more))
    own = own._replace(lhs=inputs, rhs=kernel, padding=tuple(padding))
    return own._replace(lhs_dilation=own.rhs_dilation, rhs_dilation=own.lhs_dilation)


def _by_phases(own: Operands, axis: int) -> Array:
    """Without the zeros between the inputs of `axis`: outputs of one phase see every `dilation`-th of the kernel."""
    dilation, (low, _) = own.lhs_dilation[axis], own.padding[axis]
    size, window, extent = own.lhs.shape[axis + 1], own.window[axis], own.extents[axis]
    length = -(-extent // dilation)
    zeros = jnp.zeros((len(own.lhs), *_replaced(own.extents, axis, length), own.rhs.shape[-1]), own.dtype)
    phases = []
    for phase in range(dilation):
        first = (low - phase) % dilation
        taps = len(range(first, window, dilation))
        if not taps:
            phases.append(zeros)
            continue
        before = (low - phase - first) // dilation
        padding = _replaced(own.padding, axis, (before, length + taps - 1 - size - before))
        kernel = lax.slice_in_dim(own.rhs, first, window, dilation, axis)
        undilated = _replaced(own.lhs_dilation, axis, 1)
        phases.append(_form(own._replace(rhs=kernel, padding=padding, lhs_dilation=undilated)))
    # [..., length, dilation, ...] as [..., length · dilation, ...]
    merged = lax.reshape(jnp.stack(phases, axis + 2), _replaced(zeros.shape, axis + 1, length * dilation))
    return lax.slice_in_dim(merged, 0, extent, 1, axis + 1)


def _by_planes(own: Operands) -> Array:
    """Three axes of space as two: the first as examples or, where there are fewer outputs than offsets, as inputs."""
    (low, high), size, stride, dilation = own.padding[0], own.window[0], own.window_strides[0], own.rhs_dilation[0]
    extent, features = own.extents[0], own.lhs.shape[-1]
    padded = lax.pad(own.lhs, jnp.zeros((), own.lhs.dtype), [(0, 0, 0), (low, high, 0), *[(0, 0, 0)] * 3])
    planar = own._replace(
        window_strides=own.window_strides[1:],
        padding=own.padding[1:],
        lhs_dilation=own.lhs_dilation[1:],
        rhs_dilation=own.rhs_dilation[1:],
    )
    batch, plane = len(own.lhs), own.lhs.shape[2:-1]
    parts = []
    if size <= extent:
        for offset in range(size):
            first = offset * dilation
            seen = lax.slice_in_dim(padded, first, first + (extent - 1) * stride + 1, stride, 1)
            lhs = lax.reshape(seen, (batch * extent, *plane, features))
            options = {**own.options, "preferred_element_type": own.sum_type}
            parts.append(_form(planar._replace(lhs=lhs, rhs=own.rhs[offset], options=options)))
        total = functools.reduce(lax.add, parts).astype(own.dtype)
        return lax.reshape(total, (batch, extent, *total.shape[1:]))
    rhs = jnp.moveaxis(own.rhs, 0, -3)
    rhs = lax.reshape(rhs, (*own.window[1:], size * features, own.rhs.shape[-1]))
    for output in range(extent):
        first = output * stride
        seen = lax.slice_in_dim(padded, first, first + (size - 1) * dilation + 1, dilation, 1)
        lhs = lax.reshape(jnp.moveaxis(seen, 1, -2), (batch, *plane, size * features))
        parts.append(_form(planar._replace(lhs=lhs, rhs=rhs)))
    return jnp.stack(parts, 1)


def _matrix_products(own: Operands) -> Array:
    """Ungrouped: a product for each offset in the window or, where there are fewer, for each output."""
    options = {name: own.options.get(name) for name in ("precision", "preferred_element_type")}
    lhs, last = own.padded(), own.dims + 1
    if math.prod(own.window) <= math.prod(own.extents):
        taps = [(own.seen_at(lhs, at), own.rhs[at]) for at in places(own.window)]
        products = [lax.dot_general(piece, tap, (((last,), (0,)), ((), ())), **options) for piece, tap in taps]
        return functools.reduce(lax.add, products)
    # Features first, which are the batch of the convolution whose gradient this mostly is: nothing is transposed then.
    numbers = (((last, *range(1, last)), (own.dims, *range(own.dims))), ((), ()))
    pieces = [own.seen_by(lhs, at) for at in places(own.extents)]
    outputs = [lax.dot_general(piece, own.rhs, numbers, **options) for piece in pieces]
    return own.assembled(outputs)


def _shifted_products(own: Operands) -> Array:
    """Depthwise: one input for each group."""
    multiplier = own.rhs.shape[-1] // own.groups
    lhs = jnp.repeat(own.lhs, multiplier, axis=-1) if multiplier > 1 else own.lhs
    own = own._replace(lhs=lhs)
    # Else the zeros are put in where each product is made, which costs more.
    padded, wide = lax.optimization_barrier(own.padded()), own.sum_type
    terms = []
    for at in places(own.window):
        piece = own.seen_at(padded, at).astype(wide)
        terms.append(piece * lax.broadcast_in_dim(own.rhs[at][0].astype(wide), piece.shape, (piece.ndim - 1,)))
    return functools.reduce(lax.add, terms).astype(own.dtype)


def _summed_products(own: Operands) -> Array:
    """Groups with a batch of one: the gradient of a depthwise kernel, whose examples are the inputs here."""
    inputs, outputs = own.rhs.shape[-2:]
    split = lax.reshape(own.lhs, (*own.lhs.shape[1:-1], own.groups, inputs))
    lhs = lax.transpose(split, (own.dims + 1, *range(own.dims + 1)))
    lhs = jnp.repeat(lhs, outputs // own.groups, axis=-1)
    rhs = lax.transpose(own.rhs, (own.dims, *range(own.dims), own.dims + 1))
    own, wide = own._replace(lhs=lhs), own.sum_type
    padded = lax.optimization_barrier(own.padded())
    parts = max(part for part in range(1, _ADDED_ROWS + 1) if inputs % part == 0)

    def summed(at: tuple[int, ...]) -> Array:
        pairs = zip(*(jnp.split(array, parts) for array in (own.seen_by(padded, at), rhs)), strict=True)
        added = functools.reduce(lax.add, [one.astype(wide) * other.astype(wide) for one, other in pairs])
        rows = lax.reshape(added, (added.size // outputs, outputs))
        return jnp.ones((1, len(rows)), wide) @ rows

    return own.assembled([summed(at).astype(own.dtype) for at in places(own.extents)])


def _grouped(own: Operands) -> Array:
    """Groups whose outputs do not fill a vector together, and group by group what is left."""
    outputs = own.rhs.shape[-1] // own.groups
    divisors = [count for count in range(1, own.groups + 1) if own.groups % count == 0]
    merged = max((count for count in divisors if count * outputs <= _VECTOR), default=1)
    if merged == 1:
        return _group_by_group(own)
    groups, inputs, space = own.groups // merged, own.rhs.shape[-2], own.dims
    own, batch, extents = own._replace(groups=groups), len(own.lhs), own.extents
    same = jnp.eye(merged, dtype=own.rhs.dtype)
    if own.rhs.size <= batch * math.prod(extents) * own.rhs.shape[-1]:
        # With zeros where groups do not meet: [..., 1, inputs, groups, 1, outputs] · [merged, 1, 1, merged, 1].
        split = lax.reshape(own.rhs, (*own.window, 1, inputs, groups, merged, outputs))
        kernel = split * lax.reshape(same, (*(1,) * space, merged, 1, 1, merged, 1))
        kernel = lax.reshape(kernel, (*own.window, merged * inputs, own.rhs.shape[-1]))
        return _form(own._replace(rhs=kernel))
    # The gradient of a kernel, which is small: all pairs of groups, of which those are kept that meet.
    split = lax.reshape(own.lhs, (*own.lhs.shape[:-1], groups, merged, inputs))
    lhs = lax.reshape(jnp.moveaxis(split, -2, 0), (merged * batch, *own.lhs.shape[1:-1], groups * inputs))
    pairs = _form(own._replace(lhs=lhs))
    pairs = lax.reshape(pairs, (merged, batch, *extents, groups, merged, outputs))
    # Slices: a mask and a sum in their place end in a segmentation fault in jax 0.10.2 (not without XLA's YNN).
    met = jnp.stack([pairs[group, ..., group, :] for group in range(merged)], -2)
    return lax.reshape(met, (batch, *extents, own.rhs.shape[-1]))


def _group_by_group(own: Operands) -> Array:
    inputs, outputs = own.rhs.shape[-2], own.rhs.shape[-1] // own.groups

    def one(lhs: Array, rhs: Array) -> Array:
        return _form(own._replace(lhs=lhs, rhs=rhs, groups=1))

    if own.groups <= _UNROLLED_GROUPS:
        pairs = [
            (own.lhs[..., group * inputs : (group + 1) * inputs], own.rhs[..., group * outputs : (group + 1) * outputs])
            for group in range(own.groups)
        ]
        return lax.concatenate([one(*pair) for pair in pairs], own.dims + 1)
    lhs, rhs = (
        jnp.moveaxis(lax.reshape(array, (*array.shape[:-1], own.groups, size)), -2, 0)
        for array, size in ((own.lhs, inputs), (own.rhs, outputs))
    )
    out = jnp.moveaxis(lax.map(lambda pair: one(*pair), (lhs, rhs)), 0, -2)
    return lax.reshape(out, (*out.shape[:-2], own.groups * outputs))


def _replaced(values: tuple[Any, ...], axis: int, value: Any) -> tuple[Any, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


def _batch_groups_as_features(lhs: Array, spec: Sequence[int], groups: int) -> Array:
    """[batch, *space, groups · features], with groups of the batch as groups of features.

    lhs: with axes as `spec` has them: the batch, features and space. It is split as it lies, so that all moves of axes
    are one, which XLA leaves out where another one undoes it.
    """
    at = spec[0]
    parts = lax.reshape(lhs, (*lhs.shape[:at], groups, lhs.shape[at] // groups, *lhs.shape[at + 1 :]))
    features, *space = (axis + (axis > at) for axis in spec[1:])
    moved = lax.transpose(parts, (at + 1, *space, at, features))
    return lax.reshape(moved, (*moved.shape[:-2], groups * moved.shape[-1]))
