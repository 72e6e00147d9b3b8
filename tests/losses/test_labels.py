from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from programs import compiled, with_gradients
from scipy import special

from kd_jax import losses

HARD: dict[str, Callable[..., jax.Array]] = {
    "cross_entropy": losses.cross_entropy,
    "label_smoothing": lambda z, y: losses.label_smoothing(z, y, smoothing=0.1),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("label", [-100, -1, 3, 2**31 - 1])
@pytest.mark.parametrize("beside", [0.0, np.inf, -np.inf, np.nan])
def test_an_unknown_label_gives_nan_and_leaves_no_gradient_where_it_is_masked(
    name: str, label: int, beside: float
) -> None:
    logits, labels = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, beside]]), jnp.array([1, label])
    values, masked, alone = masked_and_alone(name)(logits, labels)
    assert np.isnan(values[1])
    for gradient, of_first in zip(masked, alone, strict=True):
        np.testing.assert_array_equal(gradient[1], 0)
        np.testing.assert_array_equal(gradient[0], of_first[0])


@cache
def masked_and_alone(name: str) -> Callable[..., Any]:
    """Values; and gradients, in both modes, where all but the label 1 is masked, and of the first example alone."""

    def masked(z: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.where(labels == 1, HARD[name](z, labels), 0).sum()

    def alone(z: jax.Array, labels: jax.Array) -> jax.Array:
        return HARD[name](z, labels).sum()

    def program(z: jax.Array, labels: jax.Array) -> Any:
        of_masked, of_first = both_modes(masked)(z, labels), both_modes(alone)(z[:1], labels[:1])
        return HARD[name](z, labels), of_masked, of_first

    return jax.jit(program)


def both_modes(total: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The derivative by the first argument in reverse and in forward mode."""
    return lambda *given: (jax.grad(total)(*given), jax.jacfwd(total)(*given))


@jax.jit
def value_and_both_modes(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Of the cross entropy."""
    values = losses.cross_entropy(logits, labels)
    return values, both_modes(lambda z: losses.cross_entropy(z, labels).sum())(logits)


@pytest.mark.parametrize("mask", [-np.inf, np.finfo(np.float32).min])
def test_a_label_whose_class_is_ruled_out(mask: float) -> None:
    """The value is the limit, and the gradient p - y."""
    logits, labels = jnp.array([[0.0, 1.0, mask]]), jnp.array([2])
    values, gradients = value_and_both_modes(logits, labels)
    np.testing.assert_allclose(values[0], np.inf if np.isneginf(mask) else -mask, rtol=1e-6)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, [[1 / (1 + np.e), np.e / (1 + np.e), -1]], rtol=1e-6)


@pytest.mark.parametrize("mask", [-np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize("soft", [False, True])
def test_a_ruled_out_class_counts_for_nothing(mask: float, soft: bool) -> None:
    logits = jnp.array([[0.5, mask, 1.0, -2.0]])
    labels = jnp.array([[0.25, 0.0, 0.75, 0.0]]) if soft else jnp.array([2])
    without = np.delete(np.array(labels), 1, axis=-1) if soft else np.array([1])
    value, gradients = value_and_both_modes(logits, labels)
    rest, of_rest = value_and_both_modes(logits[:, np.array([0, 2, 3])], jnp.asarray(without))
    for gradient, other in zip(gradients, of_rest, strict=True):
        np.testing.assert_allclose(np.delete(gradient, 1, axis=1), other, rtol=1e-6)
        assert gradient[0, 1] == 0
    np.testing.assert_allclose(value, rest, rtol=1e-6)


SOFT = {
    "random": (3.0, 3.0),
    "sharp": (30.0, 30.0),
    "large logits": (1e4, 1.0),
    "one-hot": (4.0, np.inf),
    "sure and right": (0.0, np.inf),
}


def soft_case(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    size, sharpness = SOFT[name]
    teacher = rng.normal(0, 1, (6, 9))
    one_hot = np.eye(9)[teacher.argmax(-1)]
    if np.isinf(sharpness):
        return rng.normal(0, size, (6, 9)) + (25 * one_hot if size == 0 else 0), one_hot
    p = np.exp(sharpness * (teacher - teacher.max(-1, keepdims=True)))
    return rng.normal(0, size, (6, 9)), p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", SOFT)
def test_soft_labels_equal_the_oracle(case: str, dtype: type) -> None:
    """Measured: 0.3 of the bounds; a gradient to its largest element, where p and q are close to the size of p."""
    logits, labels = (array.astype(dtype) for array in soft_case(case))
    bound = 1e-12 if dtype is np.float64 else 1e-6
    with jax.enable_x64(dtype is np.float64):
        values, (gradient,) = with_gradients(losses.cross_entropy)(jnp.asarray(logits), jnp.asarray(labels))
        assert values.dtype == dtype
    for z, p, value, by_z in zip(oracles.rows(logits), oracles.rows(labels), values, gradient, strict=True):
        expected = -oracles.mp.fsum(a * b for a, b in zip(p, oracles.log_softmax(z), strict=True) if a)
        assert abs(float(value) / float(expected) - 1) < bound
        total_p, q = oracles.mp.fsum(p), oracles.softmax(z)
        slopes = np.array([b * total_p - a for a, b in zip(p, q, strict=True)], float)
        scale = np.abs(slopes).max() if case == "sure and right" else 1.0
        np.testing.assert_allclose(by_z, slopes, rtol=0, atol=2 * bound * scale)


def test_one_hot_soft_labels_are_labels() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (4, 5)), jnp.float32)
    labels = jnp.array([0, 3, 2, 4])
    one_hot = jnp.asarray(np.eye(5)[labels], jnp.float32)
    for loss in HARD.values():
        found, (gradient,) = with_gradients(loss)(logits, one_hot)
        expected, (other,) = with_gradients(loss)(logits, labels)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-7)
        # As it is called, outside a program.
        np.testing.assert_allclose(loss(logits, one_hot), compiled(loss)(logits, one_hot), rtol=1e-6)
        np.testing.assert_allclose(loss(logits, labels), compiled(loss)(logits, labels), rtol=1e-6)


def test_soft_labels_have_a_derivative_of_their_own() -> None:
    z, p = jnp.array([[0.5, 1.0, -jnp.inf]]), jnp.array([[0.25, 0.75, 0.0]])
    _, (found,) = with_gradients(losses.cross_entropy, (1,))(z, p)
    np.testing.assert_allclose(found[0, :2], -special.log_softmax(z[0, :2]), rtol=1e-6)
    standing = (jnp.zeros_like(z), jnp.zeros_like(p))
    tangent = jax.jit(lambda *given: jax.jvp(losses.cross_entropy, given, standing)[1])(z, p)
    assert tangent[0] == 0
