"""Where one network rules a class out: what a divergence leaves out at the ends of its range has no gradient either."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.losses.softmax import in_training

MANY = 96
DIVERGENCES: dict[str, Callable[..., jax.Array]] = {
    "kl": losses.distillation_kl,
    "kd": losses.kd,
    "reverse_kl": losses.reverse_kl,
    "symmetric_kl": losses.symmetric_kl,
    "skew_kl": losses.skew_kl,
    "skew_reverse_kl": losses.skew_reverse_kl,
    "detached": partial(losses.skew_reverse_kl, detached=True),
    "jsd": losses.jsd,
    "alpha_beta": losses.alpha_beta,
    "adaptive_kl": losses.adaptive_kl,
    "total_variation": losses.total_variation,
}
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


@pytest.mark.parametrize("label", [-1, MANY])
@pytest.mark.parametrize("logits", [FINITE, jnp.linspace(-2, 2, MANY)])
def test_a_smoothed_label_that_names_nothing_has_no_derivative_in_either_mode(logits: jax.Array, label: int) -> None:
    def of(z: jax.Array) -> jax.Array:
        return losses.label_smoothing(z, jnp.array(label), smoothing=0.1)

    for step in (nullcontext(), in_training()):
        with step:
            assert jnp.isnan(of(logits))
            for derivative in (jax.jacfwd, jax.jacrev):
                np.testing.assert_allclose(derivative(of)(logits), 0, atol=1e-7)


def in_a_step(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """A loss of many classes as a training step computes it: values and gradients by all three."""

    def of(student: jax.Array, teacher: jax.Array, temperature: jax.Array) -> jax.Array:
        return loss(student, teacher, temperature=temperature)

    def values_and_gradients(*given: jax.Array) -> tuple[jax.Array, Any]:
        values, back = jax.vjp(of, *given)
        return values, back(jnp.ones_like(values))

    return values_and_gradients


@pytest.mark.parametrize("name", DIVERGENCES)
def test_many_classes_in_a_training_step_are_those_of_float64(name: str) -> None:
    """A constant in the logits of one network alone changes nothing, and costs no digits where the two are close."""
    quick, wide = jax.jit(in_a_step(DIVERGENCES[name])), jax.jit(in_a_step(DIVERGENCES[name]))
    for apart, shift, temperature in product([1e-2, 1.0, 8.0], [0, 5, 60, -1e3], [1.0, 4.0, 100.0]):
        rng = np.random.default_rng(5)
        teacher = rng.normal(0, 4, (4, MANY)).astype(np.float32)
        student = (teacher + rng.normal(0, apart, teacher.shape) + shift).astype(np.float32)
        given = student, teacher, np.float32(temperature)
        with in_training():
            values, (by_student, by_teacher, by_temperature) = quick(*given)
        with jax.enable_x64(True):
            expected, slopes = jax.tree.map(np.asarray, wide(*[jnp.asarray(one, jnp.float64) for one in given]))
        case = f"{apart} apart, shifted by {shift}, temperature {temperature}"
        np.testing.assert_allclose(values, expected, rtol=3e-6, err_msg=case)
        for found, slope in ((by_student, slopes[0]), (by_teacher, slopes[1])):
            largest = np.abs(slope).max(axis=1, keepdims=True)
            assert (np.abs(np.float64(found) - slope) <= 1e-5 * largest).all(), case
        if apart >= 1:  # Nearer, it is a small difference of large terms.
            bounds = {"rtol": 1e-5, "atol": 1e-5 * np.abs(expected).max()}
            np.testing.assert_allclose(by_temperature, slopes[2], **bounds, err_msg=case)


@pytest.mark.parametrize("name", ["reverse_kl", "symmetric_kl", "adaptive_kl"])
def test_gradients_keep_their_digits_where_a_student_is_nearly_certain(name: str) -> None:
    """Its largest probability is 1 to rounding, and the gradient there minus the small sum of the others."""
    rng = np.random.default_rng(5)
    teacher = rng.normal(0, 4, (4, MANY)).astype(np.float32)
    student = (teacher + rng.normal(0, 30, teacher.shape)).astype(np.float32)
    both = in_a_step(DIVERGENCES[name])
    with in_training():
        _, (found, *_) = jax.jit(both)(student, teacher, np.float32(1))
    with jax.enable_x64(True):
        wide = [jnp.asarray(one, jnp.float64) for one in (student, teacher, 1.0)]
        assert (1 - jax.nn.softmax(wide[0]).max(axis=-1)).min() < 1e-7
        slope = np.asarray(jax.jit(both)(*wide)[1][0])
    assert (np.abs(np.float64(found) - slope) <= 2e-5 * np.abs(slope).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("masked", [-np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize("whose", ["both", "teacher", "student"])
@pytest.mark.parametrize("name", ["kd", "kl", "reverse_kl", "jsd", "skew_kl"])
def test_classes_that_are_ruled_out_in_a_training_step(name: str, whose: str, masked: float) -> None:
    """As everywhere else: the same values, infinite ones too, and the same gradients by the student of finite ones."""
    rng = np.random.default_rng(6)
    student, teacher = rng.normal(0, 2, (2, 3, MANY)).astype(np.float32)
    out = rng.random((3, MANY)) < 0.3
    if whose != "teacher":
        student = np.where(out, np.float32(masked), student)
    if whose != "student":
        teacher = np.where(out, np.float32(masked), teacher)

    def of(s: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, back = jax.vjp(lambda s: DIVERGENCES[name](s, teacher, temperature=2.0), s)
        return values, back(jnp.ones_like(values))[0]

    expected, slopes = of(jnp.asarray(student))
    with in_training():
        values, gradients = of(jnp.asarray(student))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    finite = np.isfinite(slopes).all(axis=-1)
    np.testing.assert_allclose(np.asarray(gradients)[finite], np.asarray(slopes)[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, -np.inf, -1e9])
@pytest.mark.parametrize("classes", [10, MANY])
@pytest.mark.parametrize("loss", [losses.kd, losses.distillation_kl])
def test_the_derivative_by_the_temperature_knows_of_classes_that_the_teacher_rules_out(
    loss: Callable[..., jax.Array], classes: int, mask: float | None
) -> None:
    rng = np.random.default_rng(7)
    student, teacher = rng.normal(0, 2, (2, classes))
    if mask is not None:
        teacher[:5] = mask
    with jax.enable_x64(True):
        s, t = jnp.asarray(student), jnp.asarray(teacher)
        found = float(jax.grad(lambda temperature: loss(s, t, temperature=temperature))(2.0))
        above, below = (float(loss(s, t, temperature=2.0 + h)) for h in (1e-6, -1e-6))
    np.testing.assert_allclose(found, (above - below) / 2e-6, rtol=1e-7)
    s, t = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    for step in (nullcontext(), in_training()):
        with step:
            narrow = jax.grad(lambda temperature: loss(s, t, temperature=temperature))(2.0)
        np.testing.assert_allclose(narrow, found, rtol=1e-5)


def test_a_training_step_has_its_own_form_and_what_is_measured_has_not() -> None:
    """Of float32 and of many classes alone."""

    def passes(dtype: Any, classes: int) -> int:
        logits = jnp.zeros((2, classes), dtype)
        return len(jax.make_jaxpr(jax.grad(lambda s: losses.kd(s, logits, temperature=2.0).sum()))(logits).eqns)

    outside = {classes: passes(jnp.float32, classes) for classes in (10, MANY)}
    with in_training():
        within = {classes: passes(jnp.float32, classes) for classes in (10, MANY)}
        with jax.enable_x64(True):
            assert passes(jnp.float64, MANY) > 1.5 * within[MANY]
    assert outside[10] == within[10]
    assert outside[MANY] > 1.5 * within[MANY]
