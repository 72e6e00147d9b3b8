"""Every loss and measure against `oracles`, values and gradients, in float64 to 1e-12 and in float32 to 1e-6.

A value to its own size; a gradient to that of its row's largest element, since an element whose terms cancel has no
accuracy of its own in any arithmetic. Measured: 0.0003 and 0.13 of the bounds for values, 0.003 and 0.5 for gradients.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_jax import losses
from kd_jax.evaluate import calibration_error, evaluate

BOUNDS = {np.float64: 1e-12, np.float32: 1e-6}
TEMPERATURES = [2.0**-7, 0.01, 1.0, 4.0, 16.0, 20.0, 1e4, 2.0**14]
CLASSES = 10


def precision(dtype: type) -> Any:
    return jax.enable_x64(True) if dtype is np.float64 else nullcontext()


def cases(dtype: type) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs of a student's and a teacher's logits, `[4, CLASSES]`."""
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(0, 4, (2, 4, CLASSES))
    one_hot = 1e3 * np.eye(CLASSES)[[0, 3, 9, 5]]
    pairs = {
        "random": (student, teacher),
        "nearly equal": (teacher + rng.normal(0, 1e-3, teacher.shape), teacher),
        "identical": (teacher, teacher),
        "one-hot teacher": (student, one_hot),
        "one-hot student": (one_hot, teacher),
        "±1e4": tuple(1e4 * rng.choice([-1.0, 1.0], (2, 4, CLASSES))),
        "up to 1e4": tuple(rng.uniform(-1e4, 1e4, (2, 4, CLASSES))),
        "shifted by 1e4": (student + 1e4, teacher + 1e4),
        "shifted apart": (student + 1e4, teacher - 1e4),
        "sure and agreed": (30 * np.eye(CLASSES)[[0, 3, 9, 5]] + student, 28 * np.eye(CLASSES)[[0, 3, 9, 5]] + teacher),
        "nearly equal, shifted": (teacher + rng.normal(0, 1e-2, teacher.shape) + 1e4, teacher + 1e4),
    }
    return {name: (s.astype(dtype), t.astype(dtype)) for name, (s, t) in pairs.items()}


def assert_close(found: Any, expected: Any, *, rtol: float, scale: Any = 0.0, smallest: float = 1.0) -> None:
    """Each to `rtol` of its own value, or of a larger `scale`; what float32 cannot hold (`smallest` denormals) is 0."""
    tiny = smallest * np.finfo(np.float32).tiny
    expected = np.array(expected, dtype=np.float64)
    np.testing.assert_array_less(
        np.abs(np.float64(found) - expected), rtol * np.maximum(np.abs(expected), scale) + tiny
    )


DIVERGENCES = {
    "distillation_kl": (losses.distillation_kl, oracles.kl, oracles.kl_gradients, 0),
    "kd": (losses.kd, oracles.kl, oracles.kl_gradients, 2),
    "kd_as_written": (losses.kd_as_written, oracles.as_written, oracles.as_written_gradients, 0),
}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", cases(np.float64))
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_soft_losses_and_their_gradients(name: str, dtype: type, case: str, temperature: float) -> None:
    student, teacher = cases(dtype)[case]
    assert_agree_with_oracle(name, dtype, student, teacher, temperature)


@pytest.mark.parametrize("classes", [2, 300])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_few_and_many_classes(name: str, dtype: type, classes: int) -> None:
    student, teacher = np.random.default_rng(classes).normal(0, 5, (2, 4, classes)).astype(dtype)
    for temperature in (0.5, 5.0, 500.0):
        assert_agree_with_oracle(name, dtype, student, teacher, temperature)


def assert_agree_with_oracle(name: str, dtype: type, student: Any, teacher: Any, temperature: float) -> None:
    _, oracle, oracle_gradients, power = DIVERGENCES[name]
    with precision(dtype):
        given = [jnp.asarray(array, dtype) for array in (student, teacher, temperature)]
        (_, values), found = loss_and_gradients(name)(*given)
        assert values.dtype == dtype
        # The loss is given the temperature that this type can hold.
        rounded = float(given[2])
    factor = rounded**power
    pairs = list(zip(oracles.rows(student), oracles.rows(teacher), strict=True))
    expected = [factor * oracle(s, t, rounded) for s, t in pairs]
    assert_close(values, expected, rtol=BOUNDS[dtype], smallest=max(1, factor))
    gradients = [[[factor * g for g in side] for side in oracle_gradients(s, t, rounded)] for s, t in pairs]
    for side in (0, 1):
        by_side = np.array([gradient[side] for gradient in gradients], dtype=np.float64)
        largest = np.abs(by_side).max(axis=1, keepdims=True)
        # Such a probability is multiplied by a difference of tempered logits, and by what is outside of the softmax.
        smallest = max(1, factor) / min(1, rounded) * max(1, float(np.ptp([student, teacher])) / rounded)
        assert_close(found[side], by_side, rtol=BOUNDS[dtype], scale=largest, smallest=smallest)


@cache
def loss_and_gradients(name: str) -> Callable[..., Any]:
    loss = DIVERGENCES[name][0]

    def total(student: jax.Array, teacher: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = loss(student, teacher, temperature=temperature)
        return values.sum(), values

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("case", cases(np.float64))
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cross_entropy_and_its_gradient(dtype: type, case: str) -> None:
    logits, _ = cases(dtype)[case]
    labels = np.array([0, 3, 1, 9])
    pairs = list(zip(oracles.rows(logits), labels.tolist(), strict=True))
    with precision(dtype):
        values = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
        gradient = jax.grad(lambda z: losses.cross_entropy(z, jnp.asarray(labels)).sum())(jnp.asarray(logits))
        assert values.dtype == dtype
    assert_close(values, [oracles.cross_entropy(z, y) for z, y in pairs], rtol=BOUNDS[dtype])
    assert_close(gradient, [oracles.cross_entropy_gradient(z, y) for z, y in pairs], rtol=BOUNDS[dtype])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 9, 50]), st.sampled_from([0.1, 3.0, 30.0]))
def test_measures(seed: int, n: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    logits, teacher = rng.normal(0, size, (2, n, 5))
    labels = rng.integers(0, 5, n)
    pairs = list(zip(oracles.rows(logits), oracles.rows(teacher), strict=True))
    expected = {
        "nll": sum(oracles.cross_entropy(z, y) for (z, _), y in zip(pairs, labels.tolist(), strict=True)) / n,
        "kl_to_teacher": sum(oracles.kl(z, t, 1.0) for z, t in pairs) / n,
        "ece": oracles.calibration_error(logits, labels),
        "accuracy": sum(z.index(max(z)) == y for (z, _), y in zip(pairs, labels.tolist(), strict=True)) / n,
        "teacher_agreement": sum(z.index(max(z)) == t.index(max(t)) for z, t in pairs) / n,
    }
    with jax.enable_x64(True):
        found = evaluate(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(teacher))
    for name, value in expected.items():
        # The calibration error is a difference of confidence and accuracy, both up to 1.
        assert_close(getattr(found, name), value, rtol=1e-12, scale=1.0 if name == "ece" else 0.0)
    assert int(found.correct) + int(found.errors) == n
    assert int(found.correct) == round(float(expected["accuracy"]) * n)


def test_the_calibration_error_in_float32() -> None:
    rng = np.random.default_rng(5)
    logits, labels = rng.normal(0, 2, (500, 10)).astype(np.float32), rng.integers(0, 10, 500)
    found = calibration_error(jnp.asarray(logits), jnp.asarray(labels))
    assert_close(found, oracles.calibration_error(logits, labels), rtol=1e-6, scale=1.0)


finite_logits = st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5)


@settings(deadline=None)
@given(finite_logits, finite_logits, st.floats(0.25, 100), st.integers(0, 4), st.floats(0, 1))
def test_the_mix_weighs_by_alpha(
    student: list[float], teacher: list[float], temperature: float, label: int, alpha: float
) -> None:
    with jax.enable_x64(True):
        z, t = jnp.asarray([student]), jnp.asarray([teacher])
        hard = losses.cross_entropy(z, jnp.asarray([label]))
        soft = losses.kd(z, t, temperature=temperature)
        found = losses.mix(hard, soft, alpha=alpha)
    (s,), (t_row,) = oracles.rows(np.array([student])), oracles.rows(np.array([teacher]))
    expected = alpha * oracles.cross_entropy(s, label) + (1 - oracles.mp.mpf(alpha)) * (
        temperature**2 * oracles.kl(s, t_row, temperature)
    )
    assert_close(found, [expected], rtol=1e-12)


@settings(deadline=None)
@given(finite_logits, finite_logits, st.floats(0.25, 100))
def test_kl_is_0_for_equal_distributions_alone(student: list[float], teacher: list[float], temperature: float) -> None:
    divergence: Callable[..., jax.Array] = losses.distillation_kl
    with jax.enable_x64(True):
        z, t = jnp.asarray([student]), jnp.asarray([teacher])
        value = float(divergence(z, t, temperature=temperature)[0])
        assert float(divergence(z, z, temperature=temperature)[0]) == 0
        assert float(divergence(z + 3, z, temperature=temperature)[0]) < 1e-28
    (s,), (t_row,) = oracles.rows(np.array([student])), oracles.rows(np.array([teacher]))
    exact = oracles.kl(s, t_row, temperature)
    assert value >= 0
    assert np.isfinite(value)
    if exact > 1e-300:
        assert value > 0
