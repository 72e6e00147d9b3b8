from collections.abc import Callable
from functools import cache
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

LOSSES: dict[str, tuple[Callable[..., jax.Array], Callable[..., mp.mpf]]] = {
    "dist": (
        lambda s, t, **more: losses.dist(s, t, beta=1.0, gamma=2.0, temperature=4.0, **more),
        lambda s, t: oracles.dist(s, t, beta=1, gamma=2, temperature=4),
    ),
    "mlkd": (
        lambda s, t, **more: losses.mlkd(s, t, temperature=(2.0, 4.0), **more),
        lambda s, t: oracles.mlkd(s, t, (2, 4)),
    ),
}


def batch() -> tuple[np.ndarray, np.ndarray]:
    student, teacher = proof.pairs()
    return student[[0, 1, 7, 8]], teacher[[0, 1, 7, 8]]


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_of_the_values_is_the_loss_of_the_batch(name: str) -> None:
    loss, oracle = LOSSES[name]
    student, teacher = batch()
    with jax.enable_x64(True):
        given = jnp.asarray(student), jnp.asarray(teacher)
        values, gradients = with_gradients(loss, (0, 1))(*given)
    # Those of the mean.
    value, gradients = np.asarray(values).mean(), np.asarray(gradients) / len(student)
    rows = oracles.rows(student), oracles.rows(teacher)
    proof.assert_near(value, [oracle(*rows)], 1e-10)
    for side in (0, 1):
        for i in range(len(student)):

            def of_row(z: Any, side: int = side, i: int = i) -> mp.mpf:
                changed = [list(x) for x in rows]
                changed[side][i] = z
                return oracle(*changed)

            proof.assert_near(gradients[side][i], proof.gradient(of_row, rows[side][i]), 1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_an_absent_example_has_no_influence(name: str) -> None:
    loss, _ = LOSSES[name]
    pair, kept = np.array(batch()), np.array([0, 2, 3])
    filled = pair.copy()
    filled[0, 1], filled[1, 1] = np.nan, np.inf
    value, gradients = weighted_mean(name)(*jnp.asarray(filled, jnp.float32), jnp.array([1.0, 0.0, 1.0, 1.0]))
    values, rest = with_gradients(loss, (0, 1))(*jnp.asarray(pair[:, kept], jnp.float32))
    np.testing.assert_allclose(value, np.asarray(values).mean(), rtol=1e-5)
    for gradient, other in zip(map(np.asarray, gradients), rest, strict=True):
        np.testing.assert_array_equal(gradient[1], 0)
        np.testing.assert_allclose(gradient[kept], np.asarray(other) / 3, rtol=1e-4, atol=1e-6)


@cache
def weighted_mean(name: str) -> Callable[..., Any]:
    def mean(student: jax.Array, teacher: jax.Array, weights: jax.Array) -> jax.Array:
        values = LOSSES[name][0](student, teacher, weights=weights)
        return jnp.sum(jnp.where(weights > 0, weights * values, 0)) / weights.sum()

    return jax.jit(jax.value_and_grad(mean, (0, 1)))


def test_a_weight_of_2_is_an_example_twice() -> None:
    loss, _ = LOSSES["dist"]
    student, teacher = (jnp.asarray(z, jnp.float32) for z in batch())
    found, _ = weighted_mean("dist")(student, teacher, jnp.array([1.0, 2.0, 1.0, 1.0]))
    twice = np.array([0, 1, 1, 2, 3])
    np.testing.assert_allclose(found, np.asarray(compiled(loss)(student[twice], teacher[twice])).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_weights_of_any_size_give_the_loss_without(name: str) -> None:
    loss, _ = LOSSES[name]
    student, teacher = (jnp.asarray(z, jnp.float32) for z in batch())
    plain = np.asarray(compiled(loss)(student, teacher)).mean()
    for size in (0.5, 10.0):
        found, _ = weighted_mean(name)(student, teacher, jnp.full(4, size))
        np.testing.assert_allclose(found, plain, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_extremes_types_and_modes(name: str) -> None:
    proof.assert_sound(LOSSES[name][0], coupled=True)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_networks_have_nothing_between_them_and_order_is_nothing(name: str) -> None:
    loss, _ = LOSSES[name]
    student, teacher = (jnp.asarray(z, jnp.float32) for z in batch())
    values, (gradient, _) = with_gradients(loss, (0, 1))(teacher, teacher)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    turned = compiled(loss)(*(jnp.asarray(z[::-1], jnp.float32) for z in batch()))
    np.testing.assert_allclose(turned[::-1], compiled(loss)(student, teacher), rtol=1e-4)
    # As it is called, outside a program.
    np.testing.assert_allclose(loss(student, teacher), compiled(loss)(student, teacher), rtol=1e-5)


def test_one_example_is_refused_by_dist_and_taken_by_mlkd() -> None:
    z = jnp.asarray(batch()[0][:1], jnp.float32)
    with pytest.raises(ValueError, match="batch of 1"):
        losses.dist(z, z)
    assert compiled(losses.mlkd)(z, z)[0] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    z = jnp.zeros((2, 3, 4))
    with pytest.raises(ValueError, match="couples"):
        LOSSES[name][0](z, z)
    with pytest.raises(ValueError, match="weights"):
        LOSSES[name][0](z[0], z[0], weights=jnp.ones((3, 1)))


def test_rows_that_do_not_vary() -> None:
    """Uniform on both sides correlates fully, on one side not at all."""
    flat, varied = jnp.zeros((2, 4)), jnp.asarray(batch()[0][:2, :4], jnp.float32)
    of = with_gradients(losses.dist)
    assert np.asarray(of(flat, flat, gamma=1.0)[0]).max() == 0
    values, (gradient,) = of(flat, varied, gamma=0.0)
    assert np.asarray(values).sum() == 2
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_narrow_types_loops_and_seeds_change_nothing(name: str) -> None:
    """In bfloat16 it is computed in float32; in a vmap of seeds and in a scan of steps it has the same values."""
    loss = LOSSES[name][0]
    pair = jnp.asarray(np.array(batch()), jnp.bfloat16)
    found = jax.jit(loss)(*pair)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, jax.jit(loss)(*pair.astype(jnp.float32)))
    many = jnp.stack([pair, pair[:, ::-1], 2 * pair]).astype(jnp.float32)
    expected = np.stack([jax.jit(loss)(*one) for one in many])

    def both(one: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(lambda student: loss(student, one[1]).sum())(one[0])

    in_turn = jax.jit(lambda many: jax.lax.scan(lambda _, one: (None, (loss(*one), both(one)[1])), None, many)[1])
    at_once = jax.jit(jax.vmap(lambda one: (loss(*one), both(one)[1])))
    for values, gradients in (in_turn(many), at_once(many)):
        np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
        for gradient, one in zip(gradients, many, strict=True):
            wanted = np.asarray(jax.jit(both)(one)[1])
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
