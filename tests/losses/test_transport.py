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


def similarity() -> np.ndarray:
    rng = np.random.default_rng(5)
    half = rng.uniform(0.1, 0.9, (proof.CLASSES, proof.CLASSES))
    return np.where(np.eye(proof.CLASSES), 1.0, (half + half.T) / 2)


def test_values_and_gradients() -> None:
    cost = oracles.rows(1 - similarity())

    def loss(s: jax.Array, t: jax.Array, labels: jax.Array, **numbers: Any) -> jax.Array:
        return losses.wkd(s, t, labels, similarity=similarity(), **numbers)

    def oracle(s: Any, t: Any, label: int, **numbers: Any) -> mp.mpf:
        return oracles.wkd(s, t, label, cost=cost, **numbers)

    proof.assert_proven(loss, oracle, labels=True, gamma=3.0, temperature=2.0, regulariser=0.25)


def test_extremes_types_modes_and_transformations() -> None:
    proof.assert_sound(lambda s, t, y: losses.wkd(s, t, y, similarity=similarity(), gamma=1.0), labels=True)


def test_equal_networks_move_nothing_where_classes_are_unlike() -> None:
    z, labels = jnp.asarray(proof.pairs()[0], jnp.float32), jnp.asarray(proof.LABELS)
    of = compiled(partial(losses.wkd, similarity=np.eye(proof.CLASSES)))
    np.testing.assert_allclose(of(z, z, labels, gamma=1.0), of(z, z, labels, gamma=0.0), atol=1e-6)


def test_a_similarity_that_does_not_fit_is_refused() -> None:
    z = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="similarity"):
        losses.wkd(z, z, jnp.zeros(2, jnp.int32), similarity=np.eye(4))


def test_a_teacher_who_leaves_the_label_alone_moves_nothing() -> None:
    student, teacher = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([[0.0, -jnp.inf, -jnp.inf]])
    loss = partial(losses.wkd, similarity=similarity()[:3, :3])
    (value,), gradients = with_gradients(loss, (0, 1))(student, teacher, jnp.array([0]))
    np.testing.assert_allclose(value, -jax.nn.log_softmax(student)[0, 0], rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
