"""Orthogonal projectors from free parameters, for `vkd`: differentiable, and orthogonal whatever the parameters."""

import jax.numpy as jnp
from jax.scipy.linalg import expm
from jaxtyping import Array, Float

from kd_jax.errors import ShapeError
from kd_jax.losses.maps import wide


def orthogonal_exponential(parameters: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
    r"""A projector P of orthonormal rows, or columns where there are fewer, from $e^A$ with A skew-symmetric.

    A holds the strictly lower part of `parameters` (transposed where it is wide) and minus its transpose; P is the
    first columns of $e^A$. All zeros give the identity, cut to shape. For VkD: Miles et al. (2024),
    https://arxiv.org/abs/2403.06213.

    parameters: `[inputs, outputs]`, the shape of P, for `features @ P`. Raises ShapeError for another rank.
    """
    return _cut(expm(_skew(parameters)), parameters)


def orthogonal_cayley(parameters: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
    r"""As `orthogonal_exponential`, from Cayley's transform $(I - A/2)^{-1} (I + A/2)$: one linear solve."""
    half = _skew(parameters) / 2
    identity = jnp.eye(len(half), dtype=half.dtype)
    return _cut(jnp.linalg.solve(identity - half, identity + half), parameters)


def _skew(parameters: Array) -> Array:
    if parameters.ndim != 2:
        raise ShapeError(f"a projector's parameters {list(parameters.shape)} need [inputs, outputs]: reshape them")
    parameters = parameters.astype(wide(parameters))
    tall = parameters if parameters.shape[0] >= parameters.shape[1] else parameters.T
    lower = jnp.tril(jnp.pad(tall, ((0, 0), (0, tall.shape[0] - tall.shape[1]))), -1)
    return lower - lower.T


def _cut(square: Array, parameters: Array) -> Array:
    inputs, outputs = parameters.shape
    return square[:, :outputs] if inputs >= outputs else square[:, :inputs].T
