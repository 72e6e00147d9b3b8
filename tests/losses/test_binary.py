import jax.numpy as jnp
import numpy as np
import oracles
import proof

from kd_jax import losses


def test_values_and_gradients() -> None:
    for temperature in (1.0, 3.0):
        proof.assert_proven(losses.binary_kd, oracles.binary_kd, temperature=temperature)


def test_extremes_types_modes_and_transformations() -> None:
    proof.assert_sound(losses.binary_kd)


def test_one_output_is_the_kd_of_two_classes() -> None:
    student, teacher = (jnp.asarray(z[:, :1], jnp.float32) for z in proof.pairs())
    two = (jnp.concatenate([jnp.zeros_like(z), z], axis=-1) for z in (student, teacher))
    np.testing.assert_allclose(
        losses.binary_kd(student, teacher, temperature=2.0), losses.kd(*two, temperature=2.0), rtol=1e-5
    )
