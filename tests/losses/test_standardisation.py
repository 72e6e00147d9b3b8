import jax
import jax.numpy as jnp
import numpy as np
import oracles
import proof
import pytest
from programs import compiled, with_gradients

from kd_jax import losses


def test_values_and_gradients() -> None:
    """What rounds a standardised logit is large beside the difference of networks that are 1e-6 apart."""
    proof.assert_proven(
        lambda s, t, temperature: losses.kd(losses.standardise(s), losses.standardise(t), temperature=temperature),
        lambda s, t, temperature: (
            temperature**2 * oracles.kl(oracles.standardised(s), oracles.standardised(t), temperature)
        ),
        rtol=1e-8,
        temperature=2.0,
    )


def test_shift_and_scale_are_taken_out() -> None:
    z = jnp.asarray(proof.pairs()[0], jnp.float32)
    found = losses.standardise(z)
    np.testing.assert_allclose(losses.standardise(4 * z + 8), found, atol=1e-3)
    np.testing.assert_allclose(found.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(np.float64(found), axis=-1, ddof=1), 1, rtol=1e-5)


@pytest.mark.parametrize("mask", [-np.inf, np.finfo(np.float32).min])
def test_a_ruled_out_class_stays_so_and_counts_for_nothing(mask: float) -> None:
    plain, _ = proof.pairs()
    masked = plain.copy()
    masked[:, 2] = mask
    of = compiled(losses.standardise)
    found = np.asarray(of(jnp.asarray(masked, jnp.float32)))
    rest = of(jnp.asarray(np.delete(plain, 2, axis=1), jnp.float32))
    np.testing.assert_allclose(np.delete(found, 2, axis=1), rest, rtol=1e-5)
    np.testing.assert_array_equal(found[:, 2], mask)
    _, (gradient,) = with_gradients(kd_of_itself)(jnp.asarray(plain, jnp.float32))
    assert np.isfinite(gradient).all()


def kd_of_itself(z: jax.Array) -> jax.Array:
    return losses.kd(losses.standardise(z), z, temperature=2.0)


def test_equal_logits_give_0_and_no_gradient() -> None:
    """The formula's is 1e7: the first step of a head of zeros would ruin it."""
    value, gradient = jax.jit(jax.value_and_grad(lambda z: losses.standardise(z)[0, 0]))(jnp.full((1, 4), 3.0))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_one_class_has_no_deviation() -> None:
    with pytest.raises(ValueError, match="one class"):
        losses.standardise(jnp.zeros((2, 1)))
