from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles
import proof
import pytest

from kd_jax import losses

WITH_LABELS: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[dict[str, float]]]] = {
    "dkd": (losses.dkd, oracles.dkd, [{"alpha": 1.0, "beta": 8.0, "temperature": 4.0}]),
    "nkd": (losses.nkd, oracles.nkd, [{"gamma": 1.5, "temperature": 1.0}, {"gamma": 1.0, "temperature": 2.0}]),
    "rld": (losses.rld, oracles.rld, [{"alpha": 1.0, "beta": 8.0, "temperature": 4.0}]),
    "ofa": (losses.ofa, oracles.ofa, [{"gamma": g, "temperature": t} for g, t in ((1.0, 1.0), (1.5, 2.0))]),
}
WITHOUT: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[dict[str, float]]]] = {
    "ttm": (losses.ttm, oracles.ttm, [{"gamma": 0.1}, {"gamma": 1.0}]),
    "wttm": (losses.wttm, oracles.wttm, [{"gamma": 0.1}, {"gamma": 1.0}]),
}


@pytest.mark.parametrize("name", [*WITH_LABELS, *WITHOUT])
def test_values_and_gradients(name: str) -> None:
    labels = name in WITH_LABELS
    loss, oracle, settings = (WITH_LABELS if labels else WITHOUT)[name]
    for numbers in settings:
        # A cross entropy with soft labels near q: its gradient is a difference of numbers of the size of 1.
        proof.assert_proven(loss, oracle, labels=labels, scale=1.0 if name == "ofa" else 0.0, **numbers)


def test_the_virtual_teacher() -> None:
    def loss(s: jax.Array, t: jax.Array, labels: jax.Array, **numbers: Any) -> jax.Array:
        return losses.virtual_teacher(s, labels, **numbers)

    def oracle(s: Any, t: Any, label: int, **numbers: Any) -> mp.mpf:
        return oracles.virtual_teacher(s, label, **numbers)

    proof.assert_proven(loss, oracle, labels=True, of_teacher=False, probability=0.95, temperature=20.0)
    proof.assert_sound(lambda s, t, y: losses.virtual_teacher(s, y), labels=True, of_teacher=False, masks=False)


@pytest.mark.parametrize("name", [*WITH_LABELS, *WITHOUT])
def test_extremes_types_modes_and_transformations(name: str) -> None:
    labels = name in WITH_LABELS
    proof.assert_sound((WITH_LABELS if labels else WITHOUT)[name][0], labels=labels)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_an_unknown_label_gives_nan_and_leaves_no_gradient_where_it_is_masked(name: str) -> None:
    student, teacher = (jnp.asarray(z[:3], jnp.float32).at[1, 0].set(jnp.nan) for z in proof.pairs())
    labels = jnp.array([0, -100, 3])
    values = WITH_LABELS[name][0](student, teacher, labels)
    np.testing.assert_array_equal(jnp.isnan(values), [False, True, False])

    def masked(*pair: jax.Array) -> jax.Array:
        return jnp.where(labels >= 0, WITH_LABELS[name][0](*pair, labels), 0).sum()

    for gradient in jax.grad(masked, (0, 1))(student, teacher):
        np.testing.assert_array_equal(gradient[1], 0)
        assert jnp.isfinite(gradient).all()


def test_kd_is_the_sum_of_dkds_terms() -> None:
    """kd = TCKD + (1 - p_y) NCKD."""
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(z) for z in proof.pairs())
        labels = jnp.asarray(proof.LABELS)
        target = losses.dkd(student, teacher, labels, alpha=1, beta=0, temperature=4)
        others = losses.dkd(student, teacher, labels, alpha=0, beta=1, temperature=4)
        p = jax.nn.softmax(teacher / 4)[jnp.arange(9), labels]
        expected = losses.kd(student, teacher, temperature=4)
        np.testing.assert_allclose(target + (1 - p) * others, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["dkd", "ttm", "wttm"])
def test_equal_networks_have_nothing_between_them(name: str) -> None:
    z, labels = jnp.asarray(proof.pairs()[0], jnp.float32), (jnp.asarray(proof.LABELS),)
    if name == "dkd":
        value, gradient = jax.value_and_grad(lambda s: losses.dkd(s, z, *labels).sum())(z)
    else:
        loss = WITHOUT[name][0]
        value, gradient = jax.value_and_grad(lambda s: loss(s, z, gamma=1.0).sum())(z)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_identities() -> None:
    with jax.enable_x64(True):
        s, t = (jnp.asarray(z) for z in proof.pairs())
        labels = jnp.asarray(proof.LABELS)
        np.testing.assert_allclose(losses.ttm(s, t, gamma=1), losses.kl_divergence(s, t), rtol=1e-12)
        np.testing.assert_allclose(losses.wttm(s, t, gamma=1), losses.kl_divergence(s, t), rtol=1e-12)
        soft = losses.cross_entropy(s, jax.nn.softmax(t))
        np.testing.assert_allclose(losses.ofa(s, t, labels), soft, rtol=1e-10)
        # A teacher who is right has the student be as sure of the label as he is.
        right = t.at[jnp.arange(9), labels].set(50.0)
        np.testing.assert_allclose(
            losses.rld(s, right, labels, alpha=1, beta=0), losses.dkd(s, right, labels, alpha=1, beta=0), rtol=1e-10
        )


def test_two_classes_are_needed() -> None:
    with pytest.raises(ValueError, match="one class"):
        losses.dkd(jnp.zeros((2, 1)), jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32))


def test_rld_has_no_softmax_over_classes_that_are_all_ruled_out() -> None:
    student, teacher = jnp.array([[1.0, 2.0, -0.5]]), jnp.array([[0.3, -jnp.inf, 2.0]])
    of_label = losses.rld(student, teacher, jnp.array([0]), beta=0.0)
    assert jnp.isfinite(of_label).all()
    np.testing.assert_array_equal(losses.rld(student, teacher, jnp.array([0])), of_label)
    assert jnp.isfinite(jax.grad(lambda z: losses.rld(z, teacher, jnp.array([0])).sum())(student)).all()
