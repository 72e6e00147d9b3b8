"""Every loss and measure against `oracles`, values and gradients, in float64 to 1e-12 and in float32 to 1e-6.

A value to its own size; a gradient to that of its row's largest element, since an element whose terms cancel has no
accuracy of its own in any arithmetic. Measured: 0.0003 and 0.13 of the bounds for values, 0.003 and 0.5 for gradients.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import compiled, with_gradients

from kd_jax import losses
from kd_jax.evaluate import calibration_error, evaluate_logits
from kd_jax.losses.softmax import in_training
from kd_jax.stats import paired_comparison

BOUNDS = {np.float64: 1e-12, np.float32: 1e-6}
TEMPERATURES = [2.0**-7, 0.01, 1.0, 4.0, 16.0, 20.0, 1e4, 2.0**14]
CLASSES = 10


def precision(dtype: type) -> Any:
    return jax.enable_x64(True) if dtype is np.float64 else nullcontext()


def cases(dtype: type, classes: int = CLASSES) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs of a student's and a teacher's logits, `[4, classes]`."""
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(0, 4, (2, 4, classes))
    one_hot = 1e3 * np.eye(classes)[[0, 3, 9, 5]]
    pairs = {
        "random": (student, teacher),
        "nearly equal": (teacher + rng.normal(0, 1e-3, teacher.shape), teacher),
        "identical": (teacher, teacher),
        "one-hot teacher": (student, one_hot),
        "one-hot student": (one_hot, teacher),
        "±1e4": tuple(1e4 * rng.choice([-1.0, 1.0], (2, 4, classes))),
        "up to 1e4": tuple(rng.uniform(-1e4, 1e4, (2, 4, classes))),
        "shifted by 1e4": (student + 1e4, teacher + 1e4),
        "shifted apart": (student + 1e4, teacher - 1e4),
        "sure and agreed": (30 * np.eye(classes)[[0, 3, 9, 5]] + student, 28 * np.eye(classes)[[0, 3, 9, 5]] + teacher),
        "nearly equal, shifted": (teacher + rng.normal(0, 1e-2, teacher.shape) + 1e4, teacher + 1e4),
        "nearly equal, shifted apart": (teacher + rng.normal(0, 1e-2, teacher.shape) + 60, teacher - 5),
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


MANY = 96
TRAINED = ("kd", "distillation_kl")


@pytest.mark.parametrize("case", cases(np.float64))
@pytest.mark.parametrize("name", TRAINED)
def test_many_classes_in_a_training_step(name: str, case: str) -> None:
    """In few passes over the logits, to the same bounds: measured, 0.4 of them for values and 0.6 for gradients."""
    student, teacher = cases(np.float32, MANY)[case]
    _, oracle, oracle_gradients, power = DIVERGENCES[name]
    loss = loss_of_a_step(name)
    for temperature in (0.5, 1.0, 4.0, 20.0, 1e4, 2.0**14):
        (_, values), found = loss(student, teacher, jnp.float32(temperature))
        assert values.dtype == jnp.float32
        factor = temperature**power
        pairs = list(zip(oracles.rows(student), oracles.rows(teacher), strict=True))
        lost = lost_denormals(student, teacher, temperature, factor)
        expected = [factor * oracle(s, t, temperature) for s, t in pairs]
        assert_close(values, expected, rtol=1e-6, smallest=lost)
        slopes = [[factor * g for g in oracle_gradients(s, t, temperature)[0]] for s, t in pairs]
        by_student = np.array(slopes, dtype=np.float64)
        largest = np.abs(by_student).max(axis=1, keepdims=True)
        assert_close(found, by_student, rtol=1e-6, scale=largest, smallest=lost / min(1, temperature))


@cache
def loss_of_a_step(name: str) -> Callable[..., Any]:
    def total(student: jax.Array, teacher: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        with in_training():
            values = DIVERGENCES[name][0](student, teacher, temperature=temperature)
        return values.sum(), values

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize("case", cases(np.float64))
def test_the_cross_entropy_of_many_classes_in_a_training_step(case: str) -> None:
    logits, _ = cases(np.float32, MANY)[case]
    labels = np.array([0, 3, 1, 9])

    @jax.jit
    def found(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        with in_training():
            values, back = jax.vjp(lambda z: losses.cross_entropy(z, labels), logits)
        return values, back(jnp.ones_like(values))[0]

    values, gradient = found(logits)
    pairs = list(zip(oracles.rows(logits), labels.tolist(), strict=True))
    assert_close(values, [oracles.cross_entropy(row, label) for row, label in pairs], rtol=1e-6)
    slopes = np.array([oracles.cross_entropy_gradient(row, label) for row, label in pairs], dtype=np.float64)
    assert_close(gradient, slopes, rtol=1e-6, scale=np.abs(slopes).max(axis=1, keepdims=True))


def assert_agree_with_oracle(name: str, dtype: type, student: Any, teacher: Any, temperature: float) -> None:
    with precision(dtype):
        given = [jnp.asarray(array, dtype) for array in (student, teacher, temperature)]
        (_, values), found = loss_and_gradients(name)(*given)
        assert values.dtype == dtype
        # The loss is given the temperature that this type can hold.
        rounded = float(given[2])
    assert_values_and_gradients(name, dtype, student, teacher, rounded, values, found)


def assert_values_and_gradients(
    name: str, dtype: type, student: Any, teacher: Any, rounded: float, values: Any, found: Any
) -> None:
    _, oracle, oracle_gradients, power = DIVERGENCES[name]
    factor = rounded**power
    pairs = list(zip(oracles.rows(student), oracles.rows(teacher), strict=True))
    expected = [factor * oracle(s, t, rounded) for s, t in pairs]
    lost = lost_denormals(student, teacher, rounded, factor)
    assert_close(values, expected, rtol=BOUNDS[dtype], smallest=lost)
    gradients = [[[factor * g for g in side] for side in oracle_gradients(s, t, rounded)] for s, t in pairs]
    for side in (0, 1):
        by_side = np.array([gradient[side] for gradient in gradients], dtype=np.float64)
        largest = np.abs(by_side).max(axis=1, keepdims=True)
        smallest = lost / min(1, rounded)
        assert_close(found[side], by_side, rtol=BOUNDS[dtype], scale=largest, smallest=smallest)


def lost_denormals(student: Any, teacher: Any, temperature: float, factor: float) -> float:
    """A probability that float32 cannot hold is multiplied by a difference of tempered logits, and by `factor`."""
    return max(1, factor) * max(1, float(np.ptp([student, teacher])) / temperature)


@cache
def loss_and_gradients(name: str) -> Callable[..., Any]:
    loss = DIVERGENCES[name][0]

    def total(student: jax.Array, teacher: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = loss(student, teacher, temperature=temperature)
        return values.sum(), values

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.125, 1.0])
@pytest.mark.parametrize("case", cases(np.float64))
@pytest.mark.parametrize("dtype", BOUNDS)
def test_label_smoothing_and_its_gradient(dtype: type, case: str, smoothing: float) -> None:
    """The gradient's terms cancel where the labels are smooth and the network is; they are of the size of 1."""
    logits, _ = cases(dtype)[case]
    labels = np.array([0, 3, 1, 9])
    pairs = list(zip(oracles.rows(logits), labels.tolist(), strict=True))
    with precision(dtype):
        derived = with_gradients(losses.label_smoothing)
        values, (gradient,) = derived(jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing)
        assert values.dtype == dtype
    expected = [oracles.label_smoothing(z, y, smoothing) for z, y in pairs]
    assert_close(values, expected, rtol=BOUNDS[dtype])
    gradients = [oracles.label_smoothing_gradient(z, y, smoothing) for z, y in pairs]
    assert_close(gradient, gradients, rtol=BOUNDS[dtype], scale=1.0)


@pytest.mark.parametrize("case", cases(np.float64))
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cross_entropy_and_its_gradient(dtype: type, case: str) -> None:
    logits, _ = cases(dtype)[case]
    labels = np.array([0, 3, 1, 9])
    pairs = list(zip(oracles.rows(logits), labels.tolist(), strict=True))
    with precision(dtype):
        values = compiled(losses.cross_entropy)(jnp.asarray(logits), jnp.asarray(labels))
        _, (gradient,) = with_gradients(losses.cross_entropy)(jnp.asarray(logits), jnp.asarray(labels))
        assert values.dtype == dtype
    assert_close(values, [oracles.cross_entropy(z, y) for z, y in pairs], rtol=BOUNDS[dtype])
    assert_close(gradient, [oracles.cross_entropy_gradient(z, y) for z, y in pairs], rtol=BOUNDS[dtype])


@pytest.mark.parametrize("case", cases(np.float64))
@pytest.mark.parametrize("dtype", BOUNDS)
def test_measures_of_every_kind_of_logits(dtype: type, case: str) -> None:
    student, teacher = cases(dtype)[case]
    assert_measures(dtype, student, teacher, np.array([0, 3, 1, 9]))


@pytest.mark.parametrize("dtype", BOUNDS)
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 9, 50]), st.sampled_from([0.1, 3.0, 30.0]))
def test_measures(dtype: type, seed: int, n: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    assert_measures(dtype, *rng.normal(0, size, (2, n, 5)).astype(dtype), rng.integers(0, 5, n))


def assert_measures(dtype: type, logits: Any, teacher: Any, labels: Any) -> None:
    n = len(labels)
    pairs = list(zip(oracles.rows(logits), oracles.rows(teacher), strict=True))
    right = sum(z.index(max(z)) == y for (z, _), y in zip(pairs, labels.tolist(), strict=True))
    calibration, terms = oracles.calibration_error(logits, labels)
    expected = {
        "nll": sum(oracles.cross_entropy(z, y) for (z, _), y in zip(pairs, labels.tolist(), strict=True)) / n,
        "kl_to_teacher": sum(oracles.kl(z, t, 1.0) for z, t in pairs) / n,
        "ece": calibration,
        "accuracy": right / n,
        "teacher_agreement": sum(z.index(max(z)) == t.index(max(t)) for z, t in pairs) / n,
    }
    with precision(dtype):
        found = evaluate_logits(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(teacher))
        assert found.ece.dtype == found.nll.dtype == dtype
    for name, value in expected.items():
        # In the calibration error, right and wrong answers of a bin cancel: to the mean size of these terms.
        assert_close(getattr(found, name), value, rtol=BOUNDS[dtype], scale=terms if name == "ece" else 0.0)
    assert (int(found.correct), int(found.errors)) == (right, n - right)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_calibration_error_of_the_sure_and_right_is_small_and_exact(dtype: type) -> None:
    labels = np.arange(200) % CLASSES
    logits = (np.random.default_rng(1).normal(0, 1, (200, CLASSES)) + 20 * np.eye(CLASSES)[labels]).astype(dtype)
    with precision(dtype):
        found = compiled(calibration_error)(jnp.asarray(logits), jnp.asarray(labels))
    assert_close(found, oracles.calibration_error(logits, labels)[0], rtol=BOUNDS[dtype])


@pytest.mark.parametrize("sure", [0.0, 4.0, 12.0])
def test_measures_of_a_whole_test_set_in_float32(sure: float) -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 10, 10_000)
    logits = (rng.normal(0, 2, (10_000, 10)) + sure * np.eye(10)[labels]).astype(np.float32)
    found = evaluate_logits(jnp.asarray(logits), jnp.asarray(labels))
    calibration, terms, nll = extended_measures(logits, labels)
    assert_close(found.ece, calibration, rtol=1e-6, scale=terms)
    assert_close(found.nll, nll, rtol=1e-6)


def extended_measures(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Of many examples: `oracles.calibration_error` and the mean cross entropy, in NumPy's longest float."""
    z = logits.astype(np.longdouble)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    confidence = p.max(-1)
    surplus = (p.argmax(-1) == labels) - confidence
    members = [surplus[np.ceil(confidence * 15) == b] for b in range(1, 16)]
    calibration, terms = (sum(abs(f(inside)) for inside in members) for f in (np.sum, lambda x: np.abs(x).sum()))
    nll = -np.log(p[np.arange(len(labels)), labels]).mean()
    return float(calibration) / len(labels), float(terms) / len(labels), float(nll)


def test_extended_measures_are_the_oracles() -> None:
    rng = np.random.default_rng(6)
    logits, labels = rng.normal(0, 3, (40, 10)).astype(np.float32), rng.integers(0, 10, 40)
    nll = sum(oracles.cross_entropy(z, y) for z, y in zip(oracles.rows(logits), labels.tolist(), strict=True)) / 40
    expected = *oracles.calibration_error(logits, labels), float(nll)
    np.testing.assert_allclose(extended_measures(logits, labels), expected, rtol=1e-14)


counts = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), min_size=2, max_size=40)


@settings(deadline=None)
@given(counts)
def test_the_paired_interval(pairs: list[tuple[int, int]]) -> None:
    before, after = [list(side) for side in zip(*pairs, strict=True)]
    if len({b - a for a, b in pairs}) == 1:
        return
    found = paired_comparison(before, after, metric="correct")
    mean, half, p = oracles.paired(before, after)
    assert found.ci95 is not None
    assert_close(found.mean_difference, mean, rtol=1e-12)
    # An end of the interval may be a small difference of the two.
    scale = float(max(abs(mean), half))
    assert_close(found.ci95, [mean - half, mean + half], rtol=1e-12, scale=scale)
    assert_close(found.p_value, p, rtol=1e-12)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", DIVERGENCES)
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 100.0, 1e4]), st.sampled_from([0.0, 1e-4, 1e-1, 1.0]))
def test_a_temperature_for_each_example(name: str, dtype: type, seed: int, size: float, apart: float) -> None:
    """Inside a `vmap` other programs are made of the same loss."""
    rng = np.random.default_rng(seed)
    teacher, other, corners = rng.normal(0, size, (3, 16, CLASSES))
    student = teacher + apart * other
    student[:4] += rng.uniform(-1e4, 1e4, (4, 1))
    student[4:8] = 1e4 * np.sign(corners[4:8])
    student, teacher = student.astype(dtype), teacher.astype(dtype)
    temperatures = (10.0 ** rng.uniform(-2, 4, 16)).astype(dtype)
    with precision(dtype):
        (_, values), found = batched(name)(*map(jnp.asarray, (student[:, None], teacher[:, None], temperatures)))
    for i, temperature in enumerate(temperatures):
        row = (values[i], [side[i] for side in found])
        assert_values_and_gradients(name, dtype, student[i : i + 1], teacher[i : i + 1], float(temperature), *row)


@cache
def batched(name: str) -> Callable[..., Any]:
    return jax.jit(jax.vmap(loss_and_gradients(name)))


finite_logits = st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5)


@pytest.mark.parametrize("dtype", BOUNDS)
@settings(deadline=None)
@given(
    finite_logits,
    finite_logits,
    st.floats(0.25, 100, width=32),
    st.integers(0, 4),
    st.just(0.0) | st.floats(0.125, 1, width=16),
)
@example([0.0, 18.0, 0.0, 0.0, 0.0], [0.0, 22.0, 0.0, 0.0, 0.0], 0.25, 0, 0.0)  # A teacher's e^-88 is a denormal.
def test_the_mix_weighs_by_alpha(
    dtype: type, student: list[float], teacher: list[float], temperature: float, label: int, alpha: float
) -> None:
    """Values and gradients; alpha 0 is the soft loss alone, and 1 the hard loss."""
    with precision(dtype):
        given = (jnp.asarray([logits], dtype) for logits in (student, teacher))
        weights = (jnp.asarray(value, dtype) for value in (temperature, alpha))
        (found, (hard, soft)), gradient = mixed_and_gradient(*given, jnp.asarray([label]), *weights)
    if alpha in (0, 1):
        assert found == (hard if alpha else soft)
    (s,), (t_row,) = oracles.rows(np.array([student])), oracles.rows(np.array([teacher]))
    squared = oracles.mp.mpf(temperature) ** 2
    hard, soft = oracles.cross_entropy(s, label), squared * oracles.kl(s, t_row, temperature)
    lost = lost_denormals(student, teacher, temperature, float(squared))
    assert_close(found, alpha * hard + (1 - alpha) * soft, rtol=BOUNDS[dtype], smallest=lost)
    by_hard = np.array(oracles.cross_entropy_gradient(s, label), float)
    by_soft = np.array([float(squared * g) for g in oracles.kl_gradients(s, t_row, temperature)[0]])
    # Where the two pull in opposite directions, to the larger pull.
    scale = max(alpha * np.abs(by_hard).max(), (1 - alpha) * np.abs(by_soft).max())
    expected = alpha * by_hard + (1 - alpha) * by_soft
    assert_close(gradient[0], expected, rtol=BOUNDS[dtype], scale=scale, smallest=lost / min(1, temperature))


@jax.jit
@partial(jax.value_and_grad, has_aux=True)
def mixed_and_gradient(
    student: jax.Array, teacher: jax.Array, labels: jax.Array, temperature: jax.Array, alpha: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Of one example, and what is mixed."""
    hard = losses.cross_entropy(student, labels)
    soft = losses.kd(student, teacher, temperature=temperature)
    return losses.mix(hard, soft, alpha=alpha)[0], (hard[0], soft[0])


@settings(deadline=None)
@given(finite_logits, finite_logits, st.floats(0.25, 100))
def test_kl_is_0_for_equal_distributions_alone(student: list[float], teacher: list[float], temperature: float) -> None:
    divergence = compiled(losses.distillation_kl)
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
