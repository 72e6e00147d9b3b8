from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles
import proof
import pytest
from programs import compiled, with_gradients
from scipy import special

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
    pair = np.array(proof.pairs())[:, :3]
    pair[:, 1, 0] = np.nan
    student, teacher = jnp.asarray(pair, jnp.float32)
    labels = jnp.array([0, -100, 3])

    def masked(*pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = WITH_LABELS[name][0](*pair, labels)
        return jnp.where(labels >= 0, values, 0).sum(), values

    gradients, values = jax.jit(jax.grad(masked, (0, 1), has_aux=True))(student, teacher)
    np.testing.assert_array_equal(np.isnan(values), [False, True, False])
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[1], 0)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", WITH_LABELS)
def test_a_teacher_who_leaves_the_label_alone_has_no_part_of_the_others(name: str) -> None:
    teacher, labels = jnp.array([[0.0, -jnp.inf, -jnp.inf], [0.0, -jnp.inf, 1.0]]), jnp.array([0, 0])
    student = jnp.array([[1.0, 2.0, 0.5], [1.0, 2.0, 0.5]])
    values, gradients = with_gradients(WITH_LABELS[name][0], (0, 1))(student, teacher, labels, temperature=1.0)
    assert np.isfinite(values).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    log_q = special.log_softmax(np.asarray(student[0]))[0]
    # Of a teacher who is sure, TCKD, the first term of NKD and the confidence of RLD are the cross entropy.
    np.testing.assert_allclose(values[0], -log_q, rtol=1e-5)


def test_kd_is_the_sum_of_dkds_terms() -> None:
    """kd = TCKD + (1 - p_y) NCKD."""
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(z) for z in proof.pairs())
        labels = jnp.asarray(proof.LABELS)
        target = compiled(losses.dkd)(student, teacher, labels, alpha=1, beta=0, temperature=4)
        others = compiled(losses.dkd)(student, teacher, labels, alpha=0, beta=1, temperature=4)
        p = special.softmax(np.asarray(teacher) / 4, axis=-1)[np.arange(9), labels]
        expected = compiled(losses.kd)(student, teacher, temperature=4)
        np.testing.assert_allclose(target + (1 - p) * others, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["dkd", "ttm", "wttm"])
def test_equal_networks_have_nothing_between_them(name: str) -> None:
    z = jnp.asarray(proof.pairs()[0], jnp.float32)
    if name == "dkd":
        values, (gradient,) = with_gradients(losses.dkd)(z, z, jnp.asarray(proof.LABELS))
    else:
        values, (gradient,) = with_gradients(WITHOUT[name][0])(z, z, gamma=1.0)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(gradient, 0)


def test_identities() -> None:
    with jax.enable_x64(True):
        found, expected = identities(*map(jnp.asarray, (*proof.pairs(), proof.LABELS)))
    for one, other, rtol in zip(found, expected, (1e-12, 1e-12, 1e-10, 1e-10), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol)


@jax.jit
def identities(s: jax.Array, t: jax.Array, labels: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """What is equal."""
    # A teacher who is right has the student be as sure of the label as he is.
    right = t.at[jnp.arange(9), labels].set(50.0)
    pairs = [
        (losses.ttm(s, t, gamma=1), losses.kl_divergence(s, t)),
        (losses.wttm(s, t, gamma=1), losses.kl_divergence(s, t)),
        (losses.ofa(s, t, labels), losses.cross_entropy(s, jax.nn.softmax(t))),
        (losses.rld(s, right, labels, alpha=1, beta=0), losses.dkd(s, right, labels, alpha=1, beta=0)),
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_two_classes_are_needed() -> None:
    with pytest.raises(ValueError, match="one class"):
        losses.dkd(jnp.zeros((2, 1)), jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32))


def test_rld_has_no_softmax_over_classes_that_are_all_ruled_out() -> None:
    student, teacher = jnp.array([[1.0, 2.0, -0.5]]), jnp.array([[0.3, -jnp.inf, 2.0]])
    of_label = compiled(losses.rld)(student, teacher, jnp.array([0]), beta=0.0)
    assert np.isfinite(of_label).all()
    values, (gradient,) = with_gradients(losses.rld)(student, teacher, jnp.array([0]))
    np.testing.assert_array_equal(values, of_label)
    assert np.isfinite(gradient).all()
