import jax
import jax.numpy as jnp
import numpy as np
import oracles
import proof
import pytest
from programs import compiled, with_gradients

from kd_jax import losses
from kd_jax.errors import ShapeError


def test_values_and_gradients() -> None:
    for temperature in (1.0, 3.0):
        proof.assert_proven(losses.binary_kd, oracles.binary_kd, temperature=temperature)


def test_extremes_types_modes_and_transformations() -> None:
    proof.assert_sound(losses.binary_kd)


def test_one_output_is_the_kd_of_two_classes() -> None:
    student, teacher = (jnp.asarray(z[:, :1], jnp.float32) for z in proof.pairs())
    two = (jnp.asarray(np.concatenate([np.zeros_like(z), z], axis=-1)) for z in map(np.asarray, (student, teacher)))
    expected = compiled(losses.kd)(*two, temperature=2.0)
    np.testing.assert_allclose(losses.binary_kd(student, teacher, temperature=2.0), expected, rtol=1e-5)


def test_cross_entropy_of_sigmoids() -> None:
    rng = np.random.default_rng(0)
    logits, labels = 4 * rng.normal(size=(5, 3)), rng.uniform(size=(5, 3))
    p = 1 / (1 + np.exp(-np.float64(logits)))
    wanted = -(labels * np.log(p) + (1 - labels) * np.log1p(-p)).sum(-1)
    given = jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.float32)
    np.testing.assert_allclose(losses.binary_cross_entropy(*given), wanted, rtol=1e-5)
    found, (by,) = with_gradients(losses.binary_cross_entropy)(*given)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(by, p - labels, rtol=1e-4, atol=1e-6)


def test_labels_of_0_and_1_have_one_term_alone() -> None:
    logits = jnp.asarray([[1e4, -1e4, jnp.inf, -jnp.inf, 0.0]])
    right, wrong = jnp.asarray([[1, 0, 1, 0, 1]]), jnp.asarray([[0, 1, 1, 0, 1]])
    of = with_gradients(losses.binary_cross_entropy)
    values, (by,) = of(logits, right)
    np.testing.assert_allclose(values, [np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(of(logits, wrong)[0], [2e4 + np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(by, [[0, 0, 0, 0, -0.5]], atol=1e-7)
    narrow = logits.astype(jnp.bfloat16)
    assert jax.eval_shape(losses.binary_cross_entropy, narrow, right).dtype == jnp.float32


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"labels \[2\] do not fit logits \[2, 3\]: give one for each output"):
        losses.binary_cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2))
