import jax
import jax.numpy as jnp
import numpy as np
import oracles
import proof

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
    np.testing.assert_allclose(
        losses.pld(student, teacher, labels), losses.cross_entropy(student, labels), rtol=1e-5, atol=1e-6
    )


def test_an_unknown_label_leaves_no_gradient_where_it_is_masked() -> None:
    student, teacher = (jnp.asarray(z[:2], jnp.float32).at[1, 0].set(jnp.nan) for z in proof.pairs())
    labels = jnp.array([0, 6])
    assert jnp.isnan(losses.pld(student, teacher, labels)[1])
    gradient = jax.grad(lambda s: jnp.where(labels < 6, losses.pld(s, teacher, labels), 0).sum())(student)
    np.testing.assert_array_equal(gradient[1], 0)
    assert jnp.isfinite(gradient).all()


def test_a_class_that_the_student_alone_rules_out() -> None:
    student, teacher = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([[0.0, 1.0, 2.0]])
    assert jnp.isposinf(losses.pld(student, teacher, jnp.array([0]))[0])
