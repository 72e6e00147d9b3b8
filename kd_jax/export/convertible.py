"""Operations of `jax.lax` by others, which jax2onnx converts, and onnxruntime has.

Values have any number of examples here, of which jaxtyping knows nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp


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


CONVERTIBLE = {"reduce_window_max": max_pool, "reduce_window_min": min_pool, "pad": pad}
"""What is called in place of an operation, by its name in a jaxpr."""
