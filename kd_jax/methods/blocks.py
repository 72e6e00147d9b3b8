"""Blocks that a method learns beside the student: convolutions of any rank, batch normalisation, small networks.

Features are `[batch, *space, channels]`; without space axes a convolution is a linear map. All of it is in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Features = Float[Array, "..."]
Block = dict[str, Any]


def projector(key: Key[Array, ""], inputs: int, outputs: int) -> Block:
    """A linear map of the last axis: kernel uniform in ±1/√inputs, bias 0, in float32."""
    return {"kernel": _kernel(key, (inputs, outputs)), "bias": jnp.zeros(outputs, jnp.float32)}


def project(parts: Block, features: Any) -> Features:
    """`features @ kernel + bias`, in float32."""
    found = _wide(features) @ _wide(parts["kernel"])
    return found + _over(_wide(parts["bias"]), found)


def convolution(key: Key[Array, ""], inputs: int, outputs: int, *, size: int = 1, space: int) -> Block:
    """A convolution with `size` positions along each of `space` axes, and a bias."""
    kernel = _kernel(key, (*(size,) * space, inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}


def convolve(parts: Block, maps: Any) -> Features:
    """The convolution of maps, which keep their size: beyond the border there are zeros."""
    maps, kernel = _wide(maps), _wide(parts["kernel"])
    space = maps.ndim - 2
    if all(size == 1 for size in kernel.shape[:space]):
        return project({"kernel": kernel.reshape(kernel.shape[-2:]), "bias": parts["bias"]}, maps)
    letters = "DHW"[-space:] if space <= 3 else "".join(map(chr, range(97, 97 + space)))
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    found = jax.lax.conv_general_dilated(maps, kernel, (1,) * space, "SAME", dimension_numbers=numbers)
    return found + _over(_wide(parts["bias"]), found)


def normalisation(channels: int) -> Block:
    """Batch normalisation with a scale of 1 and an offset of 0."""
    return {"scale": jnp.ones(channels, jnp.float32), "offset": jnp.zeros(channels, jnp.float32)}


def moments(maps: Features, weights: Any = None) -> tuple[Float[Array, " channels"], Float[Array, " channels"]]:
    """Mean and variance of each channel over the batch and the space. weights: `[batch]`, of the examples."""
    axes = tuple(range(maps.ndim - 1))
    if weights is None:
        return jnp.mean(maps, axis=axes), jnp.var(maps, axis=axes)
    share = jnp.asarray(weights, maps.dtype).reshape(-1, *(1,) * (maps.ndim - 1))
    total = jnp.sum(share) * math.prod(maps.shape[1:-1])
    share = share / jnp.where(total == 0, 1, total)
    mean = jnp.sum(jnp.where(share == 0, 0, share * maps), axis=axes)
    gap = maps - _over(mean, maps)
    return mean, jnp.sum(jnp.where(share == 0, 0, share * jnp.square(gap)), axis=axes)


def normalise(parts: Block, maps: Features, weights: Any = None, *, epsilon: float = 1e-5) -> Features:
    """The maps by their batch's `moments`, which couple its examples, times the scale, plus the offset."""
    return normalise_by(parts, maps, *moments(maps, weights), epsilon=epsilon)


def normalise_by(
    parts: Block, maps: Features, mean: Float[Array, "..."], variance: Float[Array, "..."], *, epsilon: float = 1e-5
) -> Features:
    """The maps by moments that are known."""
    factor = _wide(parts["scale"]) / jnp.sqrt(_wide(variance) + epsilon)
    return (maps - _over(_wide(mean), maps)) * _over(factor, maps) + _over(_wide(parts["offset"]), maps)


def connector(key: Key[Array, ""], inputs: int, outputs: int, *, size: int = 1, space: int) -> Block:
    """A convolution and batch normalisation."""
    return {
        "convolution": convolution(key, inputs, outputs, size=size, space=space),
        "norm": normalisation(outputs),
    }


def connect(parts: Block, maps: Any, weights: Any = None) -> Features:
    """The convolution of maps, normalised."""
    return normalise(parts["norm"], convolve(parts["convolution"], maps), weights)


def network(key: Key[Array, ""], widths: Sequence[int], sizes: Sequence[int], *, space: int) -> list[Block]:
    """`connector`s in a row, from each width to the next; sizes: of their kernels."""
    keys = jax.random.split(key, len(sizes))
    return [
        connector(one, inputs, outputs, size=size, space=space)
        for one, inputs, outputs, size in zip(keys, widths[:-1], widths[1:], sizes, strict=True)
    ]


def through(
    parts: Sequence[Block], maps: Any, weights: Any = None, *, activation: Callable[..., Any] = jax.nn.relu
) -> Features:
    """The maps after each of the connectors and an activation."""
    for one in parts:
        maps = activation(connect(one, maps, weights))
    return maps


def stored_key(key: Key[Array, ""]) -> Array:
    """A key as numbers, as a method carries it from step to step."""
    return jax.random.bits(key, (2,), jnp.uint32)


def step_key(stored: Array, step: Int[Array, ""]) -> Key[Array, ""]:
    """The key of a step from what `stored_key` gave."""
    return jax.random.fold_in(jax.random.wrap_key_data(stored, impl="threefry2x32"), step)


def _kernel(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _wide(values: Array) -> Array:
    """In float32, also where a training computes in bfloat16."""
    return values.astype(jnp.float32)


def _over(channels: Array, features: Array) -> Array:
    """Numbers of channels, with the axes of `features`."""
    return channels.reshape((1,) * (features.ndim - 1) + (-1,))
