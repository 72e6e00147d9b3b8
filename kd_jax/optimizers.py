"""Optimisers as optax's gradient transformations."""

from collections.abc import Callable
from math import log1p
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

PyTree = Any
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def adam(
    learning_rate: float | Float[Array, ""] | Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam: algorithm 1 of Kingma and Ba (2015), https://arxiv.org/abs/1412.6980.

        m ← b1 m + (1 − b1) g        v ← b2 v + (1 − b2) |g|²
        step = −learning_rate · m / (1 − b1ᵗ) / (√(v / (1 − b2ᵗ)) + eps)

    Not `optax.adam`, as that takes 1 − b2ᵗ from a rounded power: in float32 it is wrong by 2e-5 at t = 2 and still by
    1e-5 at t = 500, which makes all of those steps too short or too long by up to 1e-5. Here both corrections are right
    to 4e-7, at the same speed.

    learning_rate: a number, or a schedule of the steps done, as optax has them. b1, b2: how much of the moments is kept
    in a step. eps: keeps the step finite where the gradient has been 0.
    Raises `ValueError` unless 0 < b1 < 1 and 0 < b2 < 1.
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        if not 0 < decay < 1:
            raise ValueError(f"{name} is {decay}: it must lie between 0 and 1, both excluded")

    def init(params: PyTree) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        gradients: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * jnp.conj(g), state.nu, gradients)
        scheduled = learning_rate(state.count) if callable(learning_rate) else learning_rate
        correction1, correction2 = _one_minus_power(b1, count), _one_minus_power(b2, count)

        def step(m: Array, v: Array) -> Array:
            rate, c1, c2 = (jnp.asarray(x, m.dtype) for x in (scheduled, correction1, correction2))
            return -rate * ((m / c1) / (jnp.sqrt(v / c2) + eps))

        return jax.tree.map(step, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def max_norm(largest: float) -> optax.GradientTransformation:
    """Max-norm regularisation: Hinton, Srivastava, Krizhevsky, Sutskever and Salakhutdinov (2012), arXiv:1207.0580.

    After the update the incoming weights of every unit whose squared norm is above `largest` are scaled back to it.
    Goes last in an `optax.chain`. A kernel is an array of two or more axes of which the last counts the units; other
    arrays (biases) are left alone. Raises `ValueError` unless `largest` is positive.
    """
    if not largest > 0:
        raise ValueError(f"the largest squared norm is {largest}: it must be positive")

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree = None) -> tuple[PyTree, optax.EmptyState]:
        if params is None:
            raise ValueError("max_norm needs the parameters: give them to update(gradients, state, params)")

        def bounded(update: Array, weights: Array) -> Array:
            if weights.ndim < 2:
                return update
            moved = weights + update
            squared = jnp.sum(jnp.real(moved * jnp.conj(moved)), axis=tuple(range(moved.ndim - 1)), keepdims=True)
            scaled = moved * jnp.sqrt(largest / jnp.maximum(squared, largest)).astype(moved.dtype)
            return jnp.where(squared > largest, scaled - weights, update)

        return jax.tree.map(bounded, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class InFloat32State(NamedTuple):
    """Of `in_float32`. inner: the optimiser's own. parameters: those that it has moved, in float32."""

    inner: PyTree
    parameters: PyTree


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimiser with moments in float32, for parameters in bfloat16 (or float16).

    It moves a copy of the parameters in float32, and they are that copy, rounded: what is smaller than a digit of
    bfloat16 adds up over the steps, where it would be rounded away each time.
    """
    own = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> InFloat32State:
        wide = jax.tree.map(_wide, params)
        return InFloat32State(own.init(wide), wide)

    def update(
        gradients: PyTree, state: InFloat32State, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, InFloat32State]:
        if params is None:
            raise ValueError("in_float32 needs the parameters: give them to update(gradients, state, params)")
        updates, inner = own.update(jax.tree.map(_wide, gradients), state.inner, state.parameters, **extra)
        moved = optax.apply_updates(state.parameters, updates)
        # In float32: `optax.apply_updates` adds them to the parameters in it, and rounds the sum.
        steps = jax.tree.map(lambda new, old: new - _wide(old), moved, params)
        return steps, InFloat32State(inner, moved)

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(leaf: Array) -> Array:
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else leaf


def _one_minus_power(decay: float, count: Int[Array, ""]) -> Float[Array, ""]:
    """1 − decay^count, without the cancellation of the subtraction; log(decay) is a float64 of Python."""
    return -jnp.expm1(count.astype(float) * log1p(decay - 1))
