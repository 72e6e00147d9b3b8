"""The reference's networks: fully connected, with dropout."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt32

from kd_jax.models.network import Model
from kd_jax.models.nnx import from_nnx


class MLP(nnx.Module):
    """A fully connected network: `sizes[0]` inputs, hidden layers with ReLU, `sizes[-1]` logits.

    dropout: rate of the dropout before each ReLU (in the reference's order), 0 for none. input_dropout: of the inputs.
    Weights and biases start uniform in ±1/√fan_in, as PyTorch's `nn.Linear` does. Features after the ReLU of each
    hidden layer: `activations.0`, `activations.1`, …
    """

    def __init__(self, sizes: Sequence[int], *, dropout: float = 0.0, input_dropout: float = 0.0, rngs: nnx.Rngs):
        *hidden, last = [_linear(n_in, n_out, rngs) for n_in, n_out in itertools.pairwise(sizes)]
        self.hidden = nnx.List(hidden)
        self.output = last
        self.activations = nnx.List([ReLU() for _ in hidden])
        self.dropout = Dropout(dropout, rngs=rngs) if dropout else None
        self.input_dropout = nnx.Dropout(input_dropout, rngs=rngs) if input_dropout else None

    def __call__(self, inputs: Float[Array, "batch *features"]) -> Float[Array, "batch classes"]:
        """Logits."""
        x = inputs.reshape(inputs.shape[0], -1)
        if self.input_dropout is not None:
            x = self.input_dropout(x)
        for layer, activation in zip(self.hidden, self.activations, strict=True):
            x = layer(x)
            if self.dropout is not None:
                x = self.dropout(x)
            x = activation(x)
        return self.output(x)


class ReLU(nnx.Module):
    """max(x, 0), as a module, so that its output has a path."""

    def __call__(self, inputs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The inputs, and 0 for negative ones."""
        return nnx.relu(inputs)


class Dropout(nnx.Dropout):
    """`nnx.Dropout` from as few random bits as its rate needs, 1 for each unit at 0.5 in place of 64.

    A rate is exact if it is a multiple of 2^-16, and else rounded to one of 2^-32.
    """

    def __call__(self, inputs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:  # type: ignore[override]
        """Units set to 0 with probability `rate`, and the others divided by 1 − rate, unless in evaluation mode."""
        if self.deterministic or self.rate == 0:
            return inputs
        width = next((width for width in (1, 2, 4, 8, 16) if (self.rate * 2**width).is_integer()), 32)
        threshold = jnp.uint32(min(round(self.rate * 2**width), 2**width - 1))
        kept = _random_numbers(self.rngs(), inputs.size, width) >= threshold
        return jnp.where(kept.reshape(inputs.shape), inputs / (1 - self.rate), 0)


@dataclass(frozen=True)
class Uniform:
    """An initialiser: uniform in [−bound, bound). Equal bounds are equal initialisers."""

    bound: float

    def __call__(self, key: Key[Array, ""], shape: Sequence[int], dtype: Any, **_: Any) -> Array:
        """An array of this shape."""
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)


def mlp(sizes: Sequence[int], *, dropout: float = 0.0, input_dropout: float = 0.0) -> Model:
    """The `Model` of an `MLP`, still without variables: `mlp([784, 20, 20, 10])` is the reference's student."""
    return from_nnx(lambda rngs: MLP(sizes, dropout=dropout, input_dropout=input_dropout, rngs=rngs))


def _linear(n_in: int, n_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    uniform = Uniform(n_in**-0.5)
    return nnx.Linear(n_in, n_out, kernel_init=uniform, bias_init=uniform, rngs=rngs)


def _random_numbers(key: Key[Array, ""], count: int, width: int) -> UInt32[Array, " {count}"]:
    """Uniform in [0, 2^width), for a width that divides 32: a random word is cut into 32 / width of them."""
    in_word = 32 // width
    words = jax.random.bits(key, (-(-count // in_word),), jnp.uint32)
    starts = jnp.arange(0, 32, width, dtype=jnp.uint32)
    numbers = (words[None, :] >> starts[:, None]) & jnp.uint32(2**width - 1)
    return numbers.reshape(-1)[:count]
