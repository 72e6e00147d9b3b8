"""Operations of `jax.lax` by others, which a converter has, and what runs its files.

Values have any number of examples here, of which jaxtyping knows nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from kd_jax.export.program import evaluated


def max_pool(values: Any, **params: Any) -> Any:
    """A max pool without the axes of size 1, of which `jax.vmap` leaves some: onnxruntime pools over three at most."""
    without = [axis for axis, size in enumerate(values.shape) if isinstance(size, int) and size == 1]
    without = [axis for axis in without if all(of[axis] in (1, (0, 0)) for of in params.values())]
    kept = {name: tuple(one for axis, one in enumerate(of) if axis not in without) for name, of in params.items()}
    pooled = jax.lax.reduce_window_max_p.bind(jax.lax.squeeze(values, without), **kept)
    return jax.lax.expand_dims(pooled, without)


def min_pool(values: Any, **params: Any) -> Any:
    """A min pool, which ONNX lacks."""
    return -max_pool(-values, **params)


def pad(values: Any, padding: Any, *, padding_config: Any) -> Any:
    """Padding by concatenation, and by a slice where it is below 0: jax2onnx's own needs a fixed number of examples."""
    sizes = values.shape
    if any(
        of[2] or min(0, of[0]) + min(0, of[1]) < -size
        for of, size in zip(padding_config, sizes, strict=True)
        if any(of)
    ):
        return jax.lax.pad_p.bind(values, padding, padding_config=padding_config)
    for axis, (low, high, _) in enumerate(padding_config):
        if low < 0 or high < 0:
            values = jax.lax.slice_in_dim(values, max(0, -low), values.shape[axis] - max(0, -high), axis=axis)
        before, after = (
            [jnp.broadcast_to(padding, (*values.shape[:axis], count, *values.shape[axis + 1 :]))] if count > 0 else []
            for count in (low, high)
        )
        if before or after:
            values = jax.lax.concatenate([*before, values, *after], axis)
    return values


def steps(*values: Any, jaxpr: Any, length: int, reverse: bool, **more: Any) -> list[Any]:
    """A `jax.lax.scan` as its steps, one after another: LiteRT's converter writes no file with a loop."""
    if "ft_in" in more:  # from JAX 0.12 on
        fixed, carry, each = map(list, more["ft_in"].update(values).unpack())
    else:
        first, rest = more["num_consts"], more["num_consts"] + more["num_carry"]
        fixed, carry, each = list(values[:first]), list(values[first:rest]), list(values[rest:])
    inner = jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, ())
    carried = len(carry)
    if not length:
        return [*carry, *(jnp.zeros((0, *of.shape), of.dtype) for of in inner.out_avals[carried:])]
    outputs = []
    for step in reversed(range(length)) if reverse else range(length):
        one = [jax.lax.index_in_dim(of, step, keepdims=False) for of in each]
        found = evaluated(inner, [*fixed, *carry, *one], CONVERTIBLE_LITERT)
        carry = found[:carried]
        outputs.append(found[carried:])
    ordered = outputs[::-1] if reverse else outputs
    return [*carry, *(jnp.stack(of) for of in zip(*ordered, strict=True))]


def place(values: Any, indices: Any, *, dimension_numbers: Any, slice_sizes: Any, **more: Any) -> Any:
    """A `gather` at one place that is known, such as `x[:, -1]`, as a slice: LiteRT has none of any number of examples.

    Others stay as they are.
    """
    known = not isinstance(indices, jax.core.Tracer) and np.ndim(indices) == 1
    starts = [0] * values.ndim
    for axis, start in zip(dimension_numbers.start_index_map, np.asarray(indices) if known else (), strict=False):
        starts[axis] = int(start)
    each = list(zip(starts, slice_sizes, values.shape, strict=True))
    if not known or any(start and not (isinstance(size, int) and 0 < start <= size - n) for start, n, size in each):
        return jax.lax.gather_p.bind(
            values, indices, dimension_numbers=dimension_numbers, slice_sizes=slice_sizes, **more
        )
    found = jax.lax.slice(values, starts, [start + n for start, n, _ in each])
    return jax.lax.squeeze(found, dimension_numbers.collapsed_slice_dims)


CONVERTIBLE = {"reduce_window_max": max_pool, "reduce_window_min": min_pool, "pad": pad}
"""What is called in place of an operation, by its name in a jaxpr, for ONNX."""

CONVERTIBLE_LITERT = {"scan": steps, "gather": place}
"""The same for LiteRT."""
