from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses


def as_python(loss: Callable) -> Callable:
    return loss


@pytest.mark.parametrize("wrap", [as_python, jax.jit])
@pytest.mark.parametrize("nothing", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_term_of_weight_0_is_not_computed_into_the_sum(wrap: Callable, nothing: float, alpha: float) -> None:
    known, nothing = jnp.array([2.0, 3.0]), jnp.array([nothing, 1.0])
    terms = (known, nothing) if alpha else (nothing, known)
    mixed = wrap(lambda hard, soft, a: losses.mix(hard, soft, alpha=a))
    np.testing.assert_array_equal(mixed(*terms, jnp.float32(alpha)), known)
    np.testing.assert_array_equal(losses.mix(*terms, alpha=alpha), known)
    gradients = jax.grad(lambda *given: mixed(*given).sum(), argnums=(0, 1))(*terms, jnp.float32(alpha))
    np.testing.assert_array_equal(gradients[0], [alpha, alpha])
    np.testing.assert_array_equal(gradients[1], [1 - alpha, 1 - alpha])
    tangent = jax.jvp(lambda *t: mixed(*t, jnp.float32(alpha)), terms, (jnp.ones(2), jnp.ones(2)))[1]
    np.testing.assert_array_equal(tangent, [1, 1])


def test_unlabelled_examples_may_be_distilled() -> None:
    logits, teacher = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[0.0, 2.0], [1.0, 1.0]])

    def loss(z: jax.Array, alpha: float) -> jax.Array:
        hard = losses.cross_entropy(z, jnp.array([-1, 0]))
        return losses.mix(hard, losses.kl_divergence(z, teacher), alpha=alpha).sum()

    @jax.jit
    def programs(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        alone = jax.grad(lambda z: losses.kl_divergence(z, teacher).sum())(z)
        return jax.grad(loss)(z, 0.0), alone, loss(z, 0.5)

    found, expected, mixed = programs(logits)
    np.testing.assert_array_equal(found, expected)
    assert np.isnan(mixed)


def test_the_derivative_by_alpha_is_the_difference_also_at_the_ends() -> None:
    hard, soft = jnp.float32(5.0), jnp.float32(3.0)
    for alpha in (0.0, 0.25, 1.0):
        assert jax.grad(lambda a: losses.mix(hard, soft, alpha=a))(alpha) == 2
