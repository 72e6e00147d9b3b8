from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles
import proof
import pytest
from programs import compiled, with_gradients

from kd_jax import losses
from kd_jax.errors import ConfigError

PROVEN: list[tuple[Callable[..., Any], Callable[..., Any], list[dict[str, Any]]]] = [
    (losses.reverse_kl, oracles.reverse_kl, [{}]),
    (losses.symmetric_kl, oracles.symmetric_kl, [{"skew": 0.9}]),
    (losses.skew_kl, oracles.skew_kl, [{"skew": x} for x in (0.0, 0.1, 0.9)]),
    (losses.skew_reverse_kl, oracles.skew_reverse_kl, [{"skew": x} for x in (0.0, 0.1, 0.9)]),
    (losses.total_variation, oracles.total_variation, [{}]),
]


@pytest.mark.parametrize(("loss", "oracle", "numbers"), PROVEN, ids=lambda x: getattr(x, "__name__", ""))
def test_values_and_gradients(loss: Callable, oracle: Callable, numbers: list[dict[str, Any]]) -> None:
    for given in numbers:
        for temperature in (1.0, 4.0):
            # The slopes of |p - q| are ±1: where both are sure of one class, they cancel to the size of 1e-17.
            scale = 1e-12 if loss is losses.total_variation else 0.0
            proof.assert_proven(loss, oracle, temperature=temperature, scale=scale, **given)


@pytest.mark.parametrize("convention", ["paper", "continuous"])
def test_jsd(convention: str) -> None:
    def loss(s: jax.Array, t: jax.Array, **numbers: Any) -> jax.Array:
        return losses.jsd(s, t, convention=convention, **numbers)

    def oracle(s: Any, t: Any, **numbers: Any) -> mp.mpf:
        return oracles.jsd(s, t, convention=convention, **numbers)

    for beta in (0.1, 0.5, 0.75):
        proof.assert_proven(loss, oracle, beta=beta, temperature=2.0)


def test_logit_mse() -> None:
    proof.assert_proven(losses.logit_mse, oracles.logit_mse)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_adaptive_kl_weighs_the_two_without_gradient(mu: float) -> None:
    """Its weights are constants: the oracle takes those of the row that the derivative is of."""
    student, teacher = proof.pairs()
    with jax.enable_x64(True):
        given = jnp.asarray(student), jnp.asarray(teacher)
        values = compiled(losses.adaptive_kl)(*given, mu=mu, temperature=2.0)
        _, (gradient,) = with_gradients(losses.adaptive_kl)(*given, mu=mu, temperature=2.0)
    for i, (s, t) in enumerate(zip(oracles.rows(student), oracles.rows(teacher), strict=True)):
        q, p = oracles.distributions(s, t, 2.0)
        share = oracles.adaptive_weights(p, q, mu)

        def weighed(z: Any, t: Any = t, share: Any = share) -> mp.mpf:
            return oracles.symmetric_kl(z, t, temperature=2.0, skew=1 - share)

        proof.assert_near(values[i], [weighed(s)], 1e-10)
        proof.assert_near(gradient[i], proof.gradient(weighed, s), 1e-10)


SOUND: dict[str, Callable[..., jax.Array]] = {
    "reverse_kl": losses.reverse_kl,
    "symmetric_kl": losses.symmetric_kl,
    "skew_kl": losses.skew_kl,
    "skew_reverse_kl": losses.skew_reverse_kl,
    "detached": partial(losses.skew_reverse_kl, detached=True),
    "jsd": losses.jsd,
    "adaptive_kl": losses.adaptive_kl,
    "total_variation": losses.total_variation,
    "logit_mse": losses.logit_mse,
}


@pytest.mark.parametrize("name", SOUND)
def test_extremes_types_modes_and_transformations(name: str) -> None:
    proof.assert_sound(SOUND[name])


@pytest.mark.parametrize("name", SOUND)
def test_equal_networks_have_nothing_between_them(name: str) -> None:
    student, _ = proof.pairs()
    student[0, 2] = -np.inf
    z = jnp.asarray(student, jnp.float32)
    values, (gradient,) = with_gradients(SOUND[name])(z, z)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(gradient, 0)


def test_the_detached_form_has_the_value_and_another_gradient() -> None:
    """dz = q (g - Σ q g) with g = log(q / m)."""
    student, teacher = proof.pairs()
    with jax.enable_x64(True):
        s, t = jnp.asarray(student), jnp.asarray(teacher)
        values, (gradient,) = with_gradients(SOUND["detached"])(s, t, skew=0.3)
        np.testing.assert_allclose(np.sum(values), np.sum(compiled(losses.skew_reverse_kl)(s, t, skew=0.3)), rtol=1e-14)
    for z, b, found in zip(oracles.rows(student), oracles.rows(teacher), gradient, strict=True):
        q, p = oracles.distributions(z, b, 1.0)
        g = [mp.log(a / m) for a, m in zip(q, oracles.mixture(q, p, mp.mpf(0.3)), strict=True)]
        mean = mp.fsum(a * x for a, x in zip(q, g, strict=True))
        proof.assert_near(found, [a * (x - mean) for a, x in zip(q, g, strict=True)], 1e-10)


def test_limits() -> None:
    with jax.enable_x64(True):
        found, expected, nothing, nearly = limits(*map(jnp.asarray, proof.pairs()))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-18)
    for one in nothing:
        np.testing.assert_allclose(one, 0, atol=1e-14)
    # The paper's form has no jump at its ends.
    np.testing.assert_allclose(nearly, 0, atol=1e-7)


@jax.jit
def limits(s: jax.Array, t: jax.Array) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array], jax.Array]:
    """Pairs of what is equal, what is nothing, and what is nearly nothing."""
    forward, reverse = losses.kl_divergence(s, t), losses.reverse_kl(s, t)
    pairs = [
        (losses.reverse_kl(t, s), forward),
        (losses.skew_kl(s, t, skew=0.0), forward),
        (losses.skew_reverse_kl(s, t, skew=0.0), reverse),
        (losses.symmetric_kl(s, t, skew=0.0), forward),
        (losses.symmetric_kl(s, t, skew=1.0), reverse),
        (losses.jsd(s, t, beta=0.0, convention="continuous"), forward),
        (losses.jsd(s, t, beta=1.0, convention="continuous"), reverse),
    ]
    nothing = [losses.jsd(s, t, beta=beta) for beta in (0.0, 1.0)] + [losses.skew_kl(s, t, skew=1.0)]
    return [a for a, _ in pairs], [b for _, b in pairs], nothing, losses.jsd(s, t, beta=1e-9)


def test_a_class_that_one_alone_rules_out() -> None:
    finite, ruled_out = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[0.0, 1.0, -jnp.inf]])
    of = compiled(losses.reverse_kl)
    np.testing.assert_allclose(of(ruled_out, finite), compiled(losses.kl_divergence)(finite, ruled_out), rtol=1e-6)
    assert np.isposinf(of(finite, ruled_out)[0])
    for pair in ((finite, ruled_out), (ruled_out, finite)):
        for name, (values, gradients) in of_those_with_a_mixture(*pair).items():
            assert np.isfinite(values).all(), name
            assert np.isfinite(gradients).all(), name


@jax.jit
def of_those_with_a_mixture(*pair: jax.Array) -> dict[str, Any]:
    names = ("skew_kl", "skew_reverse_kl", "detached", "jsd", "total_variation")
    return {name: with_gradients(SOUND[name], (0, 1))(*pair) for name in names}


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(ConfigError, match="continuous"):
        losses.jsd(jnp.zeros((1, 2)), jnp.zeros((1, 2)), convention="trl")
