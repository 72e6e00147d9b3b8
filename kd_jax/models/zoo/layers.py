"""Layers of the zoo's networks, as PyTorch has them: padding, initial values, batch statistics, and paths."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kd_jax.errors import ConfigError, ShapeError
from kd_jax.models.mlp import ReLU
from kd_jax.models.products import Embedding, of_rows

# Height, width and channels need not be those of other arrays.
Images = Float[Array, "batch _height _width _channels"]

# While a constructor is traced, a key takes as long as all equations before it, and each draw of numbers is long to
# compile. So layers draw none, and `initialise` gives all of a network theirs.
_NO_KEYS: Any = SimpleNamespace(params=lambda: None)
_ZEROS = jax.nn.initializers.zeros


def conv(
    n_in: int, n_out: int, window: int, *, stride: int = 1, padding: int | None = None, groups: int = 1,
    bias: bool = False,
) -> nnx.Conv:  # fmt: skip
    """A convolution of `window` × `window`, of zeros.

    padding: pixels of 0 around the image; None is (window − 1) / 2, also where it strides.
    """
    padding = (window - 1) // 2 if padding is None else padding
    return nnx.Conv(
        n_in, n_out, (window, window), strides=stride, padding=padding, feature_group_count=groups, use_bias=bias,
        kernel_init=_ZEROS, rngs=_NO_KEYS,
    )  # fmt: skip


def units(n_in: int, n_out: int, window: int, *, stride: int = 1, groups: int = 1) -> list[nnx.Module]:
    """A convolution without a bias, batch normalisation and a ReLU."""
    return [conv(n_in, n_out, window, stride=stride, groups=groups), BatchNorm(n_out), ReLU()]


def linear(n_in: int, n_out: int, *, bias: bool = True, param_dtype: Any = jnp.float32) -> nnx.Linear:
    """A linear layer of zeros."""
    return nnx.Linear(
        n_in, n_out, use_bias=bias, param_dtype=param_dtype, kernel_init=_ZEROS, rngs=_NO_KEYS, dot_general=of_rows
    )


def check_float(dtype: Any, name: str) -> None:
    """Raises `ConfigError` for what is no type of floats."""
    try:
        known = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise ConfigError(f"{name} is {dtype!r}: give a type of floats, such as jnp.float32 or jnp.bfloat16")


def embedding(count: int, width: int, *, param_dtype: Any = jnp.float32) -> Embedding:
    """A table of zeros, which computes in the type that its values have when it is called."""
    table = Embedding(count, width, param_dtype=param_dtype, embedding_init=_ZEROS, rngs=_NO_KEYS)
    # Flax keeps the type of the first values, and would make float32 of those that a training casts to bfloat16.
    table.dtype = None
    return table


class Start(NamedTuple):
    """Initial values of a layer: normal with these deviations, or uniform between these bounds and their negatives."""

    is_normal: bool
    kernel: float
    bias: float = 0.0


def he(kernel: tuple[int, ...]) -> Start:
    """He et al. (2015), fan out: normal with the variance 2 / (window · outputs); biases are 0."""
    return Start(True, (2 / math.prod((*kernel[:-2], kernel[-1]))) ** 0.5)


def small(kernel: tuple[int, ...]) -> Start:
    """Normal with a deviation of 0.01; biases are 0."""
    return Start(True, 0.01)


def standard(kernel: tuple[int, ...]) -> Start:
    """Normal with a deviation of 1, as PyTorch's embeddings."""
    return Start(True, 1.0)


def of_pytorch(kernel: tuple[int, ...]) -> Start:
    """What PyTorch's layers have where nobody says more: uniform in ±1/√fan_in, biases, too."""
    bound = math.prod(kernel[:-1]) ** -0.5
    return Start(False, bound, bound)


def of_pytorch_without_bias(kernel: tuple[int, ...]) -> Start:
    """As `of_pytorch`, with biases of 0."""
    return of_pytorch(kernel)._replace(bias=0.0)


Rule = Callable[[tuple[int, ...]], Start]


def initialise(
    network: nnx.Module, rngs: nnx.Rngs, *, convs: Rule = of_pytorch, linears: Rule = of_pytorch,
    embeddings: Rule = standard,
) -> None:  # fmt: skip
    """Gives all convolutions, linear layers and embeddings their initial values, from one draw of numbers.

    convs, linears, embeddings: the rules, by the shape of a kernel, `[*window, inputs of a group, outputs]`.
    """
    drawn: dict[bool, list[tuple[nnx.Param[Array], float]]] = {True: [], False: []}
    for _, layer in nnx.iter_modules(network):
        if isinstance(layer, nnx.Conv | nnx.Linear):
            start = (convs if isinstance(layer, nnx.Conv) else linears)(layer.kernel.shape)
            drawn[start.is_normal].append((layer.kernel, start.kernel))
            if layer.bias is not None and start.bias:
                drawn[start.is_normal].append((layer.bias, start.bias))
        elif isinstance(layer, nnx.Embed):
            start = embeddings(layer.embedding.shape)
            drawn[start.is_normal].append((layer.embedding, start.kernel))
    for is_normal, params in drawn.items():
        if params:
            shape = (sum(param.size for param, _ in params),)
            key, place = rngs.params(), 0
            draw = jax.random.normal if is_normal else partial(jax.random.uniform, minval=-1.0)
            numbers = draw(key, shape, jnp.float32)
            for param, scale in params:
                own = jax.lax.dynamic_slice(numbers, (place,), (param.size,))
                param[...] = (scale * own.reshape(param.shape)).astype(param.dtype)
                place += param.size


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation with PyTorch's running statistics.

    running ← 0.9 · running + 0.1 · batch, of the mean and of the unbiased variance, n / (n − 1) times the one that
    normalises (Flax keeps the biased one). epsilon: 1e-5. Normalised images have the type of those that come in;
    what is between is float32 at least.
    """

    def __init__(self, features: int):
        super().__init__(
            features, momentum=0.9, epsilon=1e-5, promote_dtype=_at_least_float32, use_scale=False, use_bias=False,
            rngs=_NO_KEYS,
        )  # fmt: skip
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Images) -> Images:  # type: ignore[override]
        """Images with mean 0 and variance 1 of each channel, times `scale`, plus `bias`."""
        before = self.var[...]
        normalised = super().__call__(x).astype(x.dtype)
        if not self.use_running_average:
            after, n = self.var[...], x.size // x.shape[-1]
            self.var[...] = after + (after - self.momentum * before) / max(n - 1, 1)
        return normalised


class Sequential(nnx.Module):
    """Modules one after the other. Their paths are PyTorch's: `layer1.0`, and `nnx.Sequential` has `layers` between."""

    def __init__(self, *modules: nnx.Module):
        self.count = len(modules)
        for number, module in enumerate(modules):
            setattr(self, str(number), module)

    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """What the last of them returns."""
        for number in range(self.count):
            x = getattr(self, str(number))(x)
        return x


class Identity(nnx.Module):
    """What it is called with, so that it has a path."""

    def __call__(self, x: Images) -> Images:
        """The same."""
        return x


class MaxPool(nnx.Module):
    """The largest of `window` × `window` pixels."""

    def __init__(self, window: int, *, stride: int, padding: int = 0):
        self.window, self.stride, self.padding = window, stride, padding

    def __call__(self, x: Images) -> Images:
        """Smaller images. Raises `ShapeError` where nothing would be left of them."""
        if min(x.shape[1:3]) + 2 * self.padding < self.window:
            raise ShapeError(
                f"a pool of {self.window} × {self.window} pixels gets images of {x.shape[1]} × {x.shape[2]}: give the "
                "network larger images"
            )
        window, stride, padding = ((size, size) for size in (self.window, self.stride, self.padding))
        return nnx.max_pool(x, window, stride, (padding, padding))


def shuffled(x: Images, groups: int) -> Images:
    """Channels of all groups in turn: `[a0, a1, b0, b1]` becomes `[a0, b0, a1, b1]` with two groups."""
    return x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)


def average_pool(x: Images) -> Images:
    """The mean of every second 3 × 3 pixels, with those of 0 around the image counted, as PyTorch does."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, np.zeros((), x.dtype), jax.lax.add, (1, 3, 3, 1), (1, 2, 2, 1), padding) / 9


class AveragePool(nnx.Module):
    """The mean of all pixels, for images of any size."""

    def __call__(self, x: Images) -> Float[Array, "batch channels"]:
        """Features."""
        return jnp.mean(x, axis=(1, 2))


def _at_least_float32(arrays: Any, /, **_: Any) -> Any:
    """What `nnx.BatchNorm` computes with."""
    dtype = arrays[0].dtype if arrays[0].dtype == jnp.float64 else jnp.float32
    return tuple(array.astype(dtype) for array in arrays)
