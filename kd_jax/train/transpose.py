"""How parameters lie in memory while a loop of steps runs: kernels of few units as [outputs, inputs].

A CPU multiplies rows of 784 numbers faster than rows of 20. So for the length of a loop the parameters, their gradients
and the optimiser's moments are the transposes of what the networks know, which costs one transposition at each end of
the loop; the network sees its own shapes, and the compiler draws the transposition into the matrix product.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from kd_jax.optimizers import adam

PyTree = Any

ELEMENTWISE = (adam, optax.adam, optax.adamw, optax.sgd)
"""Optimisers that do the same with every number wherever it stands, so that a transposed array is nothing to them."""

# A kernel is turned that has so many times as many inputs as outputs (results/throughput/findings.md).
_TALL = 8


def pays(optimizer: Callable[..., optax.GradientTransformation]) -> bool:
    """Whether trainings with `optimizer` may be turned, and gain by it: measured on CPUs alone."""
    return optimizer in ELEMENTWISE and jax.default_backend() == "cpu"


def tall(params: PyTree) -> PyTree:
    """Which arrays are kernels that are better turned: `bool`s in the structure of `params`."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) == 2 and leaf.shape[0] >= _TALL * leaf.shape[1], params)


def turn(params: PyTree, which: PyTree) -> PyTree:
    """`params` with the arrays `which` transposed; turned twice they are what they were."""
    return jax.tree.map(_turned, params, which)


def turn_state(optimizer: optax.GradientTransformation, state: PyTree, which: PyTree) -> PyTree:
    """The same for what `optimizer` keeps for each parameter."""
    return optax.tree_utils.tree_map_params(optimizer, _turned, state, which)


def _turned(leaf: Array, which: bool) -> Array:
    return leaf.T if which else leaf
