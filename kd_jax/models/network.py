"""The networks (Flax NNX), and `Network`: any model as two pure functions."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt32

Params = Any
State = Any


class Output(NamedTuple):
    """What a network says of a batch.

    logits: unnormalised log-probabilities, `[batch, classes]`.
    features: activations that feature losses may use, from input to output, each `[batch, ...]`.
    """

    logits: Float[Array, "batch classes"]
    features: tuple[Array, ...] = ()


class Network(NamedTuple):
    """A model as two pure functions, so that it can be jitted, scanned and vmapped.

    init: `init(key) -> (params, state)`. `params` are trained; `state` (batch statistics, say) is carried, not trained.
    apply: `apply(params, state, images, *, train, key) -> (Output, state)`. `images` are floats in [0, 1] of shape
        `[batch, height, width, channels]`; `train` turns dropout and batch statistics on; `key` feeds dropout.
    """

    init: Callable[[Key[Array, ""]], tuple[Params, State]]
    apply: Callable[..., tuple[Output, State]]


def from_nnx(constructor: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """A `Network` from `constructor(rngs) -> nnx.Module`, whose call maps images to logits or to an `Output`.

    The module is split once into its graph and its arrays, so that a compiled step never walks the graph. Random
    streams (dropout) are seeded from `apply`'s key at every call, and are not part of the state.
    """
    abstract = nnx.eval_shape(lambda: constructor(nnx.Rngs(0)))
    graph, *abstract_parts = nnx.split(abstract, nnx.Param, nnx.RngState, ...)
    abstract_streams = nnx.to_pure_dict(abstract_parts[1])

    def init(key: Key[Array, ""]) -> tuple[Params, State]:
        _, *parts = nnx.split(constructor(nnx.Rngs(key)), nnx.Param, nnx.RngState, ...)
        return nnx.to_pure_dict(parts[0]), nnx.to_pure_dict(parts[2])

    def apply(
        params: Params, state: State, images: Float[Array, "batch *image"], *, train: bool, key: Key[Array, ""]
    ) -> tuple[Output, State]:
        model = nnx.merge(graph, params, _seeded(abstract_streams, key), state)
        model.train() if train else model.eval()
        output = _as_output(model(images))
        _, *parts = nnx.split(model, nnx.Param, nnx.RngState, ...)
        return output, nnx.to_pure_dict(parts[2])

    return Network(init, apply)


def from_linen(module: Any, image_shape: Sequence[int]) -> Network:
    """A `Network` from a Linen module whose call is `module(images, train)` and gives logits or an `Output`.

    image_shape: shape of one image, `[height, width, channels]`.
    """

    def init(key: Key[Array, ""]) -> tuple[Params, State]:
        params_key, dropout_key = jax.random.split(key)
        images = jnp.zeros((1, *image_shape), jnp.float32)
        variables = module.init({"params": params_key, "dropout": dropout_key}, images, False)
        return variables["params"], {name: value for name, value in variables.items() if name != "params"}

    def apply(
        params: Params, state: State, images: Float[Array, "batch *image"], *, train: bool, key: Key[Array, ""]
    ) -> tuple[Output, State]:
        variables = {"params": params, **state}
        if not train:
            return _as_output(module.apply(variables, images, False)), state
        output, state = module.apply(variables, images, True, rngs={"dropout": key}, mutable=list(state))
        return _as_output(output), state

    return Network(init, apply)


def from_function(
    init: Callable[[Key[Array, ""]], Params], apply: Callable[[Params, Array], Array | Output]
) -> Network:
    """A `Network` from `init(key) -> params` and `apply(params, images) -> logits or Output`; no state, no dropout."""

    def apply_network(
        params: Params, state: State, images: Float[Array, "batch *image"], *, train: bool, key: Key[Array, ""]
    ) -> tuple[Output, State]:
        return _as_output(apply(params, images)), state

    return Network(lambda key: (init(key), {}), apply_network)


class MLP(nnx.Module):
    """A fully connected network: `sizes[0]` inputs, hidden layers with ReLU, `sizes[-1]` logits.

    dropout: rate of the dropout before each ReLU (in the reference's order), 0 for none. input_dropout: of the inputs.
    Weights and biases start uniform in ±1/√fan_in, as PyTorch's `nn.Linear` does.
    """

    def __init__(self, sizes: Sequence[int], *, dropout: float = 0.0, input_dropout: float = 0.0, rngs: nnx.Rngs):
        *hidden, last = [_linear(n_in, n_out, rngs) for n_in, n_out in itertools.pairwise(sizes)]
        self.hidden = nnx.List(hidden)
        self.output = last
        self.dropout = Dropout(dropout, rngs=rngs) if dropout else None
        self.input_dropout = nnx.Dropout(input_dropout, rngs=rngs) if input_dropout else None

    def __call__(self, images: Float[Array, "batch *image"]) -> Output:
        """Logits and the activations of the hidden layers."""
        x = images.reshape(images.shape[0], -1)
        if self.input_dropout is not None:
            x = self.input_dropout(x)
        features = []
        for layer in self.hidden:
            x = layer(x)
            if self.dropout is not None:
                x = self.dropout(x)
            x = nnx.relu(x)
            features.append(x)
        return Output(self.output(x), tuple(features))


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


def mlp(sizes: Sequence[int], *, dropout: float = 0.0, input_dropout: float = 0.0) -> Network:
    """The `Network` of an `MLP`: `mlp([784, 20, 20, 10])` is the reference's student."""
    return from_nnx(lambda rngs: MLP(sizes, dropout=dropout, input_dropout=input_dropout, rngs=rngs))


def count_parameters(params: Params) -> int:
    """Number of trained numbers in `params` (of one network, without a seed axis)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _linear(n_in: int, n_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    bound = n_in**-0.5

    def uniform(key: Key[Array, ""], shape: Sequence[int], dtype: Any, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(n_in, n_out, kernel_init=uniform, bias_init=uniform, rngs=rngs)


def _random_numbers(key: Key[Array, ""], count: int, width: int) -> UInt32[Array, " {count}"]:
    """Uniform in [0, 2^width), for a width that divides 32: a random word is cut into 32 / width of them."""
    in_word = 32 // width
    words = jax.random.bits(key, (-(-count // in_word),), jnp.uint32)
    starts = jnp.arange(0, 32, width, dtype=jnp.uint32)
    numbers = (words[None, :] >> starts[:, None]) & jnp.uint32(2**width - 1)
    return numbers.reshape(-1)[:count]


def _seeded(streams: Any, key: Key[Array, ""]) -> Any:
    """Fresh random streams: each key leaf folded from `key` by its position, each counter at 0."""
    leaves, structure = jax.tree.flatten(streams)

    def fresh(position: int, leaf: jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.fold_in(key, position), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.unflatten(structure, [fresh(i, leaf) for i, leaf in enumerate(leaves)])


def _as_output(result: Array | Output) -> Output:
    return result if isinstance(result, Output) else Output(result)
