import jax
import jax.numpy as jnp
import numpy as np
import oracles
import proof
from programs import compiled

from kd_jax import losses


def test_values_and_gradients() -> None:
    for temperature in (1.0, 4.0):
        proof.assert_proven(losses.pld, oracles.pld, labels=True, temperature=temperature)


def test_extremes_types_modes_and_transformations() -> None:
    proof.assert_sound(losses.pld, labels=True)


def test_a_one_hot_teacher_who_is_right_leaves_the_cross_entropy() -> None:
    student = jnp.asarray(proof.pairs()[0], jnp.float32)
    labels = jnp.asarray(proof.LABELS)
    teacher = 1e4 * jnp.asarray(np.eye(proof.CLASSES), jnp.float32)[labels]
    hard = compiled(losses.cross_entropy)(student, labels)
    for loss in (losses.pld, compiled(losses.pld)):
        np.testing.assert_allclose(loss(student, teacher, labels), hard, rtol=1e-5, atol=1e-6)


def test_an_unknown_label_leaves_no_gradient_where_it_is_masked() -> None:
    pair = np.array(proof.pairs())[:, :2]
    pair[:, 1, 0] = np.nan
    student, teacher = jnp.asarray(pair, jnp.float32)
    labels = jnp.array([0, 6])

    def masked(s: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = losses.pld(s, teacher, labels)
        return jnp.where(labels < 6, values, 0).sum(), values

    gradient, values = jax.jit(jax.grad(masked, has_aux=True))(student)
    assert np.isnan(values[1])
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.isfinite(gradient).all()


def test_a_class_that_the_student_alone_rules_out() -> None:
    student, teacher = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([[0.0, 1.0, 2.0]])
    assert np.isposinf(compiled(losses.pld)(student, teacher, jnp.array([0]))[0])
