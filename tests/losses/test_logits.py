from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.test_util import check_grads
from programs import compiled, with_gradients
from scipy import special

from kd_jax import losses


def logits(rng: np.random.Generator, size: float = 5.0, shape: tuple[int, int] = (7, 10)) -> np.ndarray:
    return rng.normal(0, size, shape)


def oracle_kl(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """The definition, in extended precision."""
    s, t = student.astype(np.longdouble), teacher.astype(np.longdouble)
    log_s = s - np.log(np.exp(s - s.max(-1, keepdims=True)).sum(-1, keepdims=True)) - s.max(-1, keepdims=True)
    log_t = t - np.log(np.exp(t - t.max(-1, keepdims=True)).sum(-1, keepdims=True)) - t.max(-1, keepdims=True)
    return (np.exp(log_t) * (log_t - log_s)).sum(-1).astype(np.float64)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return logits(rng), logits(rng)


def f32(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array, jnp.float32)


def test_cross_entropy_is_scipys(pair: tuple[np.ndarray, np.ndarray]) -> None:
    labels = np.arange(7) % 10
    expected = -special.log_softmax(pair[0], axis=-1)[np.arange(7), labels]
    np.testing.assert_allclose(losses.cross_entropy(f32(pair[0]), jnp.asarray(labels)), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.kd, losses.distillation_kl, losses.kd_as_written])
def test_a_program_has_the_values_of_the_loss_as_it_is_called(
    loss: Callable, pair: tuple[np.ndarray, np.ndarray]
) -> None:
    student, teacher = f32(pair[0]), f32(pair[1])
    expected, by_student = jax.value_and_grad(lambda s: loss(s, teacher, temperature=4.0).sum())(student)
    found, gradients = with_gradients(loss)(student, teacher, temperature=4.0)
    np.testing.assert_allclose(found.sum(), expected, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], by_student, rtol=1e-5, atol=1e-7)
    values = loss(student, teacher, temperature=4.0)
    np.testing.assert_allclose(compiled(loss)(student, teacher, temperature=4.0), values, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 4.0, 20.0, 1e4])
def test_kl_equals_the_definition_at_any_temperature(pair: tuple[np.ndarray, np.ndarray], temperature: float) -> None:
    student, teacher = f32(pair[0]), f32(pair[1])
    expected = oracle_kl(np.float64(student) / temperature, np.float64(teacher) / temperature)
    found = compiled(losses.distillation_kl)(student, teacher, temperature=temperature)
    # Rounding a logit z / T moves the value by that much.
    rtol = 1e-6 + 4 * np.finfo(np.float32).eps * np.abs(pair).max() / temperature
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-37)
    with_t_squared = compiled(losses.kd)(student, teacher, temperature=temperature)
    np.testing.assert_allclose(with_t_squared, temperature**2 * expected, rtol=rtol, atol=1e-37)


def test_kl_gradients_are_the_differences_of_the_probabilities(pair: tuple[np.ndarray, np.ndarray]) -> None:
    for temperature in (0.1, 1.0, 20.0, 1e4):
        _, (found,) = with_gradients(losses.kd)(f32(pair[0]), f32(pair[1]), temperature=temperature)
        s, t = (np.float64(f32(z)) / temperature for z in pair)
        difference = s - t - np.log(np.sum(special.softmax(t, -1) * np.exp(s - t), -1, keepdims=True))
        expected = temperature * special.softmax(t, -1) * np.expm1(difference)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6 * np.abs(expected).max())


def test_derivatives_agree_with_finite_differences(pair: tuple[np.ndarray, np.ndarray]) -> None:
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(pair[0]), jnp.asarray(pair[1])
        for loss in (losses.kd, losses.distillation_kl, losses.kd_as_written):
            at = jax.jit(lambda s, t, T, f=loss: f(s, t, temperature=T))
            check_grads(at, (student, teacher, jnp.float64(3.0)), order=2, modes=("fwd",))
            check_grads(at, (student, teacher, jnp.float64(3.0)), order=1, modes=("rev",))


def test_as_written_is_the_notebooks_formula(pair: tuple[np.ndarray, np.ndarray]) -> None:
    s, t = special.softmax(pair[0] / 20, -1), special.softmax(pair[1] / 20, -1)
    found = losses.kd_as_written(f32(pair[0]), f32(pair[1]), temperature=20.0)
    np.testing.assert_allclose(found, (t * (np.log(t) - s)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.kd, losses.distillation_kl])
def test_equal_logits_give_exactly_nothing(loss: Callable, pair: tuple[np.ndarray, np.ndarray]) -> None:
    z = f32(pair[0])
    values, (gradient,) = with_gradients(loss)(z, z, temperature=20.0)
    assert not np.any(values)
    assert not np.any(gradient)


@pytest.mark.parametrize("size", [1e4, 1e-4])
@pytest.mark.parametrize("loss", [losses.kd, losses.distillation_kl, losses.kd_as_written])
def test_extreme_logits_stay_finite(loss: Callable, size: float) -> None:
    rng = np.random.default_rng(2)
    student, teacher = f32(logits(rng, size)), f32(logits(rng, size))
    for temperature in (0.01, 1.0, 1e4):
        values, (gradient,) = with_gradients(loss)(student, teacher, temperature=temperature)
        assert np.isfinite(values).all()
        assert np.isfinite(gradient).all()


def test_extreme_logits_equal_the_definition() -> None:
    rng = np.random.default_rng(3)
    student, teacher = f32(logits(rng, 1e4)), f32(logits(rng, 1e4))
    found = compiled(losses.distillation_kl)(student, teacher, temperature=1.0)
    np.testing.assert_allclose(found, oracle_kl(np.float64(student), np.float64(teacher)), rtol=1e-6)


LOWEST = float(np.finfo(np.float32).min)

# Multiples of 1/64, so that float32 adds 8 or -16 to them exactly.
finite = arrays.arrays(np.int32, (3, 5), elements=st.integers(-3200, 3200)).map(lambda steps: np.float32(steps / 64))
SOFT = [compiled(loss) for loss in (losses.kd, losses.distillation_kl, losses.kd_as_written)]
MIXED = {alpha: jax.jit(partial(losses.mix, alpha=alpha)) for alpha in (0.0, 0.25, 1.0)}


@pytest.mark.parametrize("loss", SOFT)
@settings(deadline=None)
@given(finite, finite, st.floats(0.01, 1e4))
def test_soft_losses_are_blind_to_shifts(
    loss: Callable, student: np.ndarray, teacher: np.ndarray, temperature: float
) -> None:
    value = loss(f32(student), f32(teacher), temperature=temperature)
    np.testing.assert_array_equal(loss(f32(student + 8), f32(teacher - 16), temperature=temperature), value)


@settings(deadline=None)
@given(finite, finite, st.floats(0.01, 1e4))
def test_kl_is_never_negative(student: np.ndarray, teacher: np.ndarray, temperature: float) -> None:
    found = compiled(losses.distillation_kl)(f32(student), f32(teacher), temperature=temperature)
    assert (np.asarray(found) >= 0).all()


@settings(deadline=None)
@given(arrays.arrays(np.float32, 6, elements=st.floats(0, 1e6, width=32, allow_subnormal=False)))
def test_alpha_weighs_the_hard_loss(values: np.ndarray) -> None:
    hard, soft = f32(values[:3]), f32(values[3:])
    np.testing.assert_array_equal(MIXED[1.0](hard, soft), hard)
    np.testing.assert_array_equal(MIXED[0.0](hard, soft), soft)
    mixed = 0.25 * values[:3] + 0.75 * values[3:]
    # A product below the smallest normal number is 0 in XLA.
    np.testing.assert_allclose(MIXED[0.25](hard, soft), mixed, rtol=1e-6, atol=np.finfo(np.float32).tiny * 2)


@settings(deadline=None)
@given(finite, finite)
def test_high_temperatures_become_logit_matching(student: np.ndarray, teacher: np.ndarray) -> None:
    """The distance to it shrinks as 1/T: the next term of the series has the cubes of the logits, up to 100 here."""
    d = np.float64(student) - np.float64(teacher)
    limit = (d - d.mean(-1, keepdims=True)).var(-1) / 2
    for temperature in (1e4, 1e6):
        found = compiled(losses.kd)(f32(student), f32(teacher), temperature=temperature)
        np.testing.assert_allclose(found, limit, rtol=200 / temperature + 1e-6)


@pytest.mark.parametrize("loss", SOFT)
@settings(deadline=None)
@given(finite, finite, st.floats(0.01, 1e4), st.permutations(range(3)))
def test_examples_do_not_mix(
    loss: Callable, student: np.ndarray, teacher: np.ndarray, temperature: float, order: list[int]
) -> None:
    whole = loss(f32(student), f32(teacher), temperature=temperature)
    found = loss(f32(student[order]), f32(teacher[order]), temperature=temperature)
    np.testing.assert_array_equal(found, np.asarray(whole)[order])


any_logits = arrays.arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32))


@pytest.mark.parametrize("loss", SOFT)
@settings(deadline=None)
@given(any_logits, any_logits, st.floats(0.01, 1e4))
def test_all_is_finite(loss: Callable, student: np.ndarray, teacher: np.ndarray, temperature: float) -> None:
    value, gradients = total_and_gradients(loss)(f32(student), f32(teacher), temperature)
    assert np.isfinite(value)
    assert np.isfinite(gradients).all()


@cache
def total_and_gradients(loss: Callable) -> Callable:
    def total(s: jax.Array, t: jax.Array, temperature: jax.Array) -> jax.Array:
        return loss(s, t, temperature=temperature).sum() + losses.cross_entropy(s, jnp.arange(3)).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))


@pytest.mark.parametrize("size", [1e8, 1e10, 1e20, 1e30])
def test_cross_entropy_of_any_finite_logits_is_finite(size: float) -> None:
    """What rounding the differences of such logits loses must not be exponentiated."""
    logits = (size * np.random.default_rng(0).normal(size=(200, 7))).astype(np.float32)
    logits[0, :2] = -777.7, size
    labels = np.random.default_rng(1).integers(0, 7, 200)
    labels[0] = 0
    values, (gradient,) = with_gradients(losses.cross_entropy)(jnp.asarray(logits), jnp.asarray(labels))
    assert np.isfinite(gradient).all()
    z = logits.astype(np.longdouble)
    expected = (z.max(axis=1) - z[np.arange(200), labels]).sum()
    np.testing.assert_allclose(np.asarray(values, np.longdouble).sum(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([0.0, 0.0], [0.0, -np.inf], np.log(2)),
        ([0.0, 1.0, 2.0], [0.0, 1.0, -np.inf], np.log((1 + np.e + np.e**2) / (1 + np.e))),
        ([0.0, -np.inf, 1.0], [0.0, -np.inf, 1.0], 0.0),
        ([0.0, -np.inf], [0.0, 0.0], np.inf),
        ([0.0, 1.0, -np.inf], [0.0, 1.0, 2.0], np.inf),
        ([0.0, 1.0, LOWEST], [0.0, 1.0, 2.0], -LOWEST * np.exp(2) / (1 + np.e + np.exp(2))),
    ],
)
def test_a_class_may_be_ruled_out(student: list[float], teacher: list[float], expected: float) -> None:
    found, gradient, forward = value_and_both_gradients(jnp.array([student]), jnp.array([teacher]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    p, q = (np.exp(z) / np.exp(z).sum() for z in (np.array(student), np.array(teacher)))
    np.testing.assert_allclose(gradient[0], p - q, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(forward, gradient, rtol=1e-6, atol=1e-7)


@jax.jit
def value_and_both_gradients(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one example, in reverse and in forward mode."""

    def of(z: jax.Array) -> jax.Array:
        return losses.kl_divergence(z, teacher)[0]

    return of(student), jax.grad(of)(student), jax.jacfwd(of)(student)


@pytest.mark.parametrize("loss", [losses.distillation_kl, losses.kd, losses.kd_as_written])
@pytest.mark.parametrize("side", [0, 1])
def test_a_logit_that_is_no_number_shows_in_the_value(loss: Any, side: int) -> None:
    pair = np.zeros((2, 3, 5))
    pair[side, 0, 1] = np.nan
    np.testing.assert_array_equal(np.isnan(compiled(loss)(*map(f32, pair), temperature=2.0)), [True, False, False])


@pytest.mark.parametrize("loss", [losses.distillation_kl, losses.kd, losses.kd_as_written])
def test_forward_and_reverse_mode_agree_where_classes_are_ruled_out(loss: Callable) -> None:
    student, teacher = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([[1.0, 0.0, -jnp.inf]])

    def of(z: jax.Array, t: jax.Array, temperature: jax.Array) -> jax.Array:
        return loss(z, t, temperature=temperature)[0]

    @jax.jit
    def derivatives(*given: jax.Array) -> tuple[Any, ...]:
        standing = jax.jvp(of, given, jax.tree.map(jnp.zeros_like, given))[1]
        without = jax.jacrev(of, (0, 1, 2))(given[0][:, :2], given[1][:, :2], given[2])
        return standing, jax.jacfwd(of, (0, 1, 2))(*given), jax.jacrev(of, (0, 1, 2))(*given), without

    standing, forward, reverse, without = derivatives(student, teacher, jnp.float32(2.0))
    assert standing == 0
    for a, b, c in zip(forward, reverse, without, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        np.testing.assert_allclose(np.ravel(a)[: c.size], np.ravel(c), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 1e4])
def test_the_lowest_finite_number_rules_a_class_out(side: str, temperature: float) -> None:
    lowest = float(np.finfo(np.float32).min)
    pair = {name: np.random.default_rng(i).normal(0, 3, (2, 6)) for i, name in enumerate(("student", "teacher"))}
    for name in pair:
        if side in (name, "both"):
            pair[name][:, 2] = lowest
    student, teacher = f32(pair["student"]), f32(pair["teacher"])
    expected = oracle_kl(np.float64(student) / temperature, np.float64(teacher) / temperature)
    found = compiled(losses.distillation_kl)(student, teacher, temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    _, gradients = with_gradients(losses.distillation_kl, (0, 1))(student, teacher, temperature=temperature)
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize("temperature", [1e12, 1e13, 1e20, 1e30, 1e38])
@pytest.mark.parametrize("ruled_out", [None, -np.inf, np.finfo(np.float32).min])
def test_any_temperature_has_its_value(temperature: float, ruled_out: float | None) -> None:
    """T² overflows and the KL underflows; their product is that of logit matching."""
    student, teacher = (np.random.default_rng(seed).normal(0, 3, (4, 6)) for seed in (0, 1))
    apart = student - teacher
    if ruled_out is not None:
        apart = np.delete(apart, 3, axis=1)
        student[:, 3] = teacher[:, 3] = ruled_out
        if np.isfinite(ruled_out) and temperature > 1e30:
            pytest.skip("at such a temperature the lowest number rules nothing out")
    centred = apart - apart.mean(-1, keepdims=True)
    values, gradients, tangent = kd_and_derivatives(f32(student), f32(teacher), jnp.float32(temperature))
    np.testing.assert_allclose(np.asarray(values).sum(), (centred**2).mean(-1).sum() / 2, rtol=2e-6)
    for gradient, sign in zip(gradients, (1, -1), strict=True):
        gradient = np.array(gradient) if ruled_out is None else np.delete(gradient, 3, axis=1)
        np.testing.assert_allclose(gradient, sign * centred / centred.shape[-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(tangent, 0)


@jax.jit
def kd_and_derivatives(student: jax.Array, teacher: jax.Array, temperature: jax.Array) -> tuple[Any, Any, Any]:
    """Values, gradients by both, and the derivative along nothing."""

    def of(z: jax.Array) -> jax.Array:
        return losses.kd(z, teacher, temperature=temperature)

    tangent = jax.jvp(of, (student,), (jnp.zeros_like(student),))[1]
    return *with_gradients(losses.kd, (0, 1))(student, teacher, temperature=temperature), tangent
