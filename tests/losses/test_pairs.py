"""Where one network rules a class out: what a divergence leaves out at the ends of its range has no gradient either."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses

FINITE, RULED_OUT = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, -jnp.inf])


def forward(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return losses.kl_divergence(student, teacher)


def reverse(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return losses.kl_divergence(teacher, student)


def nothing(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return 0 * (student[0] + teacher[0])


ENDS: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array], bool]] = {
    "symmetric 0": (lambda s, t: losses.symmetric_kl(s, t, skew=0.0), forward, True),
    "symmetric 1": (lambda s, t: losses.symmetric_kl(s, t, skew=1.0), reverse, False),
    "jsd 0": (lambda s, t: losses.jsd(s, t, beta=0.0), nothing, False),
    "jsd 1": (lambda s, t: losses.jsd(s, t, beta=1.0), nothing, True),
    "continuous 0": (lambda s, t: losses.jsd(s, t, beta=0.0, convention="continuous"), forward, True),
    "continuous 1": (lambda s, t: losses.jsd(s, t, beta=1.0, convention="continuous"), reverse, False),
    "adaptive": (lambda s, t: losses.adaptive_kl(s, t, mu=1.0), forward, True),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_of_a_range_is_its_one_term_with_its_derivatives(name: str) -> None:
    """The other term is infinite where the teacher (True) or the student rules a class out."""
    loss, term, of_teacher = ENDS[name]
    given = (FINITE, RULED_OUT) if of_teacher else (RULED_OUT, FINITE)

    @jax.jit
    def all_of(s: jax.Array, t: jax.Array) -> list[tuple[jax.Array, ...]]:
        along = (jnp.array([1.0, -2.0, 0.5]), jnp.array([0.5, 1.0, 3.0]))
        return [(*jax.jvp(one, (s, t), along), *jax.grad(one, (0, 1))(s, t)) for one in (loss, term)]

    found, expected = all_of(*given)
    for own, other in zip(found, expected, strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)


def test_a_smoothed_label_that_names_nothing_has_no_derivative_in_either_mode() -> None:
    def of(z: jax.Array) -> jax.Array:
        return losses.label_smoothing(z, jnp.array(-1), smoothing=0.1)

    assert jnp.isnan(of(FINITE))
    for derivative in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(derivative(of)(FINITE), 0, atol=1e-8)
