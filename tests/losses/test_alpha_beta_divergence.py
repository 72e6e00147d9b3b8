from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import proof
import pytest
from programs import compiled, with_gradients
from scipy import special

from kd_jax import losses

NUMBERS = [(0.2, 0.7), (0.8, 0.3), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, -0.5), (0.3, 0.0), (0.0, 0.3)]
NEAR_LIMITS = [(1.0, 1e-9), (1e-9, 1.0), (1e-7, -2e-8), (0.5, -0.5 + 1e-9), (1.0 - 1e-9, 1e-12)]


@pytest.mark.parametrize("numbers", NUMBERS + NEAR_LIMITS)
def test_values_and_gradients(numbers: tuple[float, float]) -> None:
    alpha, beta = numbers
    proof.assert_proven(losses.alpha_beta, oracles.alpha_beta, alpha=alpha, beta=beta, temperature=2.0)


@pytest.mark.parametrize("numbers", [(0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_extremes_types_modes_and_transformations(numbers: tuple[float, float]) -> None:
    alpha, beta = numbers
    proof.assert_sound(losses.alpha_beta, alpha=alpha, beta=beta)


def test_corners() -> None:
    student, teacher = proof.pairs()
    with jax.enable_x64(True):
        s, t, of = jnp.asarray(student), jnp.asarray(teacher), compiled(losses.alpha_beta)
        close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-18}
        np.testing.assert_allclose(of(s, t, alpha=1.0, beta=0.0), compiled(losses.kl_divergence)(s, t), **close)
        np.testing.assert_allclose(of(s, t, alpha=0.0, beta=1.0), compiled(losses.reverse_kl)(s, t), **close)
        p, q = (special.softmax(z, axis=-1) for z in (teacher, student))
        hellinger = 4 * (1 - np.sqrt(p * q).sum(-1))
        np.testing.assert_allclose(of(s, t, alpha=0.5, beta=0.5), hellinger, atol=1e-13)
        # The mirror image.
        np.testing.assert_allclose(of(s, t, alpha=0.3, beta=0.6), of(t, s, alpha=0.6, beta=0.3), **close)


def test_a_class_that_one_alone_rules_out() -> None:
    finite, ruled_out = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[0.0, 1.0, -jnp.inf]])
    for pair in ((finite, ruled_out), (ruled_out, finite)):
        s, t = (np.float64(z) for z in pair)
        p, q = (np.exp(z) / np.exp(z).sum() for z in (t, s))
        expected = -(p**0.2 * q**0.7 - 2 / 9 * p**0.9 - 7 / 9 * q**0.9).sum() / 0.14
        values, gradients = with_gradients(losses.alpha_beta)(*pair)
        np.testing.assert_allclose(values[0], expected, rtol=1e-5)
        assert np.isfinite(gradients).all()
    of = compiled(losses.alpha_beta)
    assert np.isposinf(of(ruled_out, finite, alpha=1.0, beta=0.0)[0])
    assert np.isposinf(of(finite, ruled_out, alpha=0.0, beta=1.0)[0])
    np.testing.assert_allclose(
        of(finite, ruled_out, alpha=1.0, beta=0.0), compiled(losses.kl_divergence)(finite, ruled_out), rtol=1e-6
    )


def test_the_derivative_by_the_numbers_is_finite_at_the_limits() -> None:
    pair = np.array(proof.extremes())
    pair[:, 3, 5] = -np.inf
    student, teacher = jnp.asarray(pair, jnp.float32)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def derivatives(alpha: jax.Array, beta: jax.Array) -> jax.Array:
        return losses.alpha_beta(student, teacher, alpha=alpha, beta=beta)[3:].sum()

    for numbers in ((0.2, 0.7), (1.0, 0.0), (0.0, 1.0)):
        assert np.isfinite(derivatives(*numbers)).all()
