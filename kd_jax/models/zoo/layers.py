"""Layers of the zoo's networks, as PyTorch has them: padding, initial values, batch statistics, and paths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kd_jax.errors import ShapeError
from kd_jax.models.mlp import ReLU, Uniform

# Height, width and channels need not be those of other arrays.
Images = Float[Array, "batch _height _width _channels"]

FAN_OUT = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He et al. (2015): normal with the variance 2 / (window · outputs)."""
SMALL = jax.nn.initializers.normal(0.01)
ZEROS = jax.nn.initializers.zeros


def conv(
    n_in: int, n_out: int, window: int, *, stride: int = 1, padding: int | None = None, groups: int = 1,
    bias: bool = False, init: Any = None, rngs: nnx.Rngs,
) -> nnx.Conv:  # fmt: skip
    """A convolution of `window` × `window`.

    padding: pixels of 0 around the image; None is (window − 1) / 2, also where it strides. init: of the kernel, with
        biases of 0; None is PyTorch's own, uniform in ±1/√fan_in, of both.
    """
    uniform = Uniform((window * window * n_in // groups) ** -0.5)
    padding = (window - 1) // 2 if padding is None else padding
    return nnx.Conv(
        n_in, n_out, (window, window), strides=stride, padding=padding, feature_group_count=groups, use_bias=bias,
        kernel_init=init or uniform, bias_init=ZEROS if init else uniform, rngs=rngs,
    )  # fmt: skip


def units(
    n_in: int, n_out: int, window: int, *, stride: int = 1, groups: int = 1, init: Any = None, rngs: nnx.Rngs
) -> list[nnx.Module]:
    """A convolution without a bias, batch normalisation and a ReLU."""
    convolution = conv(n_in, n_out, window, stride=stride, groups=groups, init=init, rngs=rngs)
    return [convolution, BatchNorm(n_out), ReLU()]


def linear(n_in: int, n_out: int, *, init: Any = None, bias_init: Any = None, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer. init, bias_init: None is PyTorch's own, uniform in ±1/√fan_in."""
    uniform = Uniform(n_in**-0.5)
    return nnx.Linear(n_in, n_out, kernel_init=init or uniform, bias_init=bias_init or uniform, rngs=rngs)


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation with PyTorch's running statistics.

    running ← 0.9 · running + 0.1 · batch, of the mean and of the unbiased variance, n / (n − 1) times the one that
    normalises (Flax keeps the biased one). epsilon: 1e-5. Normalised images have the type of those that come in;
    what is between is float32 at least.
    """

    def __init__(self, features: int):
        super().__init__(
            features, momentum=0.9, epsilon=1e-5, promote_dtype=_at_least_float32, use_scale=False, use_bias=False,
            rngs=nnx.Rngs(),
        )  # fmt: skip
        # Each key that is drawn while a constructor is traced takes as long as all equations before it.
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
