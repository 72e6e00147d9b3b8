"""Which convolutions oneDNN computes, and how it sees them: `convolution(own)`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kd_jax.convolution import onednn
from kd_jax.convolution.onednn import Geometry
from kd_jax.convolution.operands import Operands, dilated

# Multiplications below which a call costs more than it saves.
_WORTH = 4_000_000


def convolution(own: Operands, *, otherwise: Callable[[Operands], Array]) -> Array | None:
    """[batch, *extents, groups · outputs] of a convolution of float32; None where XLA had better compute it.

    otherwise: the same by XLA, whose derivatives are taken.
    """
    dtypes = {own.lhs.dtype, own.rhs.dtype, jnp.dtype(own.dtype)}
    products = len(own.lhs) * math.prod(own.extents) * own.rhs.size
    mesh = jax.sharding.get_abstract_mesh()
    several = not mesh.empty and mesh.size > 1  # then XLA divides what it knows, and it does not know a call
    if dtypes != {jnp.dtype(jnp.float32)} or products < _WORTH or several or _is_better_left(own):
        return None
    geometry, arrange, restore = _seen(own)
    name = None if geometry is None else onednn.target(geometry)
    if geometry is None or name is None:
        return None
    shape = {"forward": geometry.outputs, "inputs": geometry.inputs, "kernel": geometry.kernel}[geometry.kind]
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")

    @jax.custom_jvp
    def computed(lhs: Array, rhs: Array) -> Array:
        return restore(call(*arrange(lhs, rhs)))

    @computed.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        plain = jax.jvp(lambda lhs, rhs: otherwise(own._replace(lhs=lhs, rhs=rhs)), primals, tangents)
        return computed(*primals), plain[1]

    result: Array = computed(own.lhs, own.rhs)
    return result


def _is_better_left(own: Operands) -> bool:
    """Whether it is a matrix product, or a depthwise one that oneDNN would see as the gradient of a kernel.

    Then all inputs would have to be put in another order.
    """
    moves = [
        *zip(own.window_strides, own.extents, strict=True),
        *zip(own.lhs_dilation, own.lhs.shape[1:-1], strict=True),
        *zip(own.rhs_dilation, own.window, strict=True),
    ]
    if own.groups == 1:
        one = math.prod(map(min, own.window, own.extents)) == 1
        return one and not any(step > 1 and count > 1 for step, count in moves)
    return own.rhs.shape[-2] == 1 and math.prod(own.window) > math.prod(own.extents)


def _seen(
    own: Operands,
) -> tuple[Geometry | None, Callable[[Array, Array], tuple[Array, Array]], Callable[[Array], Array]]:
    """As oneDNN sees it, its two operands from those of `own`, and the result of `own` from its result."""
    space, last, groups = tuple(range(own.dims)), own.dims + 1, own.groups
    if own.lhs_dilation != (1,) * own.dims:
        geometry = _of_inputs(own) if own.window_strides == (1,) * own.dims else None
        # The kernel of the convolution whose gradient this is, with which JAX began.
        return geometry, lambda lhs, rhs: (lhs, _swapped_in_groups(lax.rev(rhs, space), groups)), _same
    if math.prod(own.window) > math.prod(own.extents):
        # Inputs and gradient as they were before the batch was put where features are.
        return (
            _of_kernel(own),
            lambda lhs, rhs: (_swapped_in_groups(lhs, groups, 0), lax.transpose(rhs, (own.dims, *space, last))),
            lambda result: lax.transpose(result, (own.dims, *space, last)),
        )
    return _of_outputs(own), lambda lhs, rhs: (lhs, rhs), _same


def _swapped_in_groups(array: Array, groups: int, axis: int = -2) -> Array:
    """Of `[…, groups · size]`, the sizes of `axis` and of the last swapped, group by group."""
    axis %= array.ndim
    size = array.shape[-1] // groups
    split = lax.reshape(array, (*array.shape[:-1], groups, size))
    moved = jnp.swapaxes(split, axis, array.ndim)
    return lax.reshape(moved, (*moved.shape[:-2], groups * moved.shape[-1]))


def _same(result: Array) -> Array:
    return result


def _of_outputs(own: Operands) -> Geometry:
    before, after = zip(*own.padding, strict=True)
    dilations = tuple(dilation - 1 for dilation in own.rhs_dilation)
    outputs = (len(own.lhs), *own.extents, own.rhs.shape[-1])
    return Geometry(
        "forward", own.lhs.shape, own.rhs.shape, outputs, own.window_strides, dilations, before, after, (own.groups,)
    )


def _of_inputs(own: Operands) -> Geometry:
    """Zeros between the inputs: the gradient, by its inputs, of a convolution with strides."""
    outputs = (len(own.lhs), *own.extents, own.rhs.shape[-1])
    before, after = [], []
    for size, stride, window, dilation, (low, _), extent in zip(
        own.lhs.shape[1:-1], own.lhs_dilation, own.window, own.rhs_dilation, own.padding, own.extents, strict=True
    ):
        seen = dilated(window, dilation)
        before.append(seen - 1 - low)
        after.append(_behind(dilated(size, stride) - 1 + seen - extent - before[-1], stride))
    kernel = (*own.window, own.rhs.shape[-1] // own.groups, own.groups * own.rhs.shape[-2])
    dilations = tuple(dilation - 1 for dilation in own.rhs_dilation)
    return Geometry(
        *("inputs", outputs, kernel, own.lhs.shape, own.lhs_dilation, dilations, tuple(before), tuple(after)),
        (own.groups,),
    )


def _behind(padding: int, stride: int) -> int:
    """That padding, or 0 where it is below by less than a stride, which leaves the last few out by itself."""
    return 0 if -stride < padding < 0 else padding


def _of_kernel(own: Operands) -> Geometry:
    """A window larger than what it leaves: the gradient of a kernel, with the batch where features are."""
    channels, batch = len(own.lhs), own.lhs.shape[-1] // own.groups
    outputs = own.rhs.shape[-1]
    after = [
        _behind(dilated(window, stride) - 1 + dilated(extent, step) - size - low, stride)
        for size, window, stride, extent, step, (low, _) in zip(
            own.lhs.shape[1:-1], own.window, own.rhs_dilation, own.extents, own.window_strides, own.padding, strict=True
        )
    ]
    return Geometry(
        "kernel",
        (batch, *own.lhs.shape[1:-1], own.groups * channels),
        (*own.extents, channels, outputs),
        (batch, *own.window, outputs),
        own.rhs_dilation,
        tuple(step - 1 for step in own.window_strides),
        tuple(low for low, _ in own.padding),
        tuple(after),
        (own.groups,),
    )
