import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import compiled

from kd_jax import losses
from kd_jax.errors import ShapeError

PAIRS: dict[str, Callable[..., jax.Array]] = {
    "kd": lambda s, t: losses.kd(s, t, temperature=2.0),
    "distillation_kl": lambda s, t: losses.distillation_kl(s, t, temperature=2.0),
    "kl_divergence": losses.kl_divergence,
    "kd_as_written": lambda s, t: losses.kd_as_written(s, t, temperature=2.0),
}
LABELS: dict[str, Callable[..., jax.Array]] = {
    "cross_entropy": losses.cross_entropy,
    "label_smoothing": lambda z, y: losses.label_smoothing(z, y, smoothing=0.1),
}
TYPES = [jnp.float16, jnp.bfloat16, jnp.float32]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 3, shape), jnp.float32)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shapes", [((4, 3), (4, 1)), ((4, 3), (4, 6)), ((4, 3), (3,)), ((2, 4, 3), (4, 3))])
def test_student_and_teacher_do_not_broadcast(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    student, teacher = (jnp.zeros(shape) for shape in shapes)
    for call in (PAIRS[name], jax.jit(PAIRS[name])):
        with pytest.raises(ShapeError, match="teacher") as error:
            call(student, teacher)
        assert str(list(shapes[0])) in str(error.value)
        assert str(list(shapes[1])) in str(error.value)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize(
    ("labels", "remedy"),
    [
        (np.zeros((4, 1), int), r"give labels\[..., 0\]"),
        (np.zeros((4, 3), int), r"give labels.argmax\(-1\)"),
        (np.zeros((4, 3), bool), r"give labels.argmax\(-1\)"),
        (np.zeros((3,), int), "reshape"),
        (np.zeros((1, 4), int), "reshape"),
        (np.zeros((4,), np.float32), r"give labels.astype\(int\)"),
        (np.zeros((4, 1), np.float32), r"give labels\[..., 0\].astype\(int\)"),
        (np.zeros((4,), bool), r"give labels.astype\(int\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(name: str, labels: np.ndarray, remedy: str) -> None:
    for call in (LABELS[name], jax.jit(LABELS[name])):
        with pytest.raises(ShapeError, match=remedy):
            call(jnp.zeros((4, 3)), jnp.asarray(labels))


def test_logits_are_floats_with_classes_and_a_temperature_is_one_number() -> None:
    with pytest.raises(ShapeError, match="int32"):
        losses.cross_entropy(jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32))
    with pytest.raises(ShapeError, match="at least one class"):
        losses.kl_divergence(jnp.zeros((2, 0)), jnp.zeros((2, 0)))
    with pytest.raises(ShapeError, match="at least one class"):
        losses.kl_divergence(jnp.float32(1.0), jnp.float32(1.0))


@pytest.mark.parametrize("leading", [(), (12,), (3, 4), (2, 3, 2), (0,), (2, 0)])
def test_every_loss_takes_any_rank(leading: tuple[int, ...]) -> None:
    student, teacher = normal(*leading, 7), normal(*leading, 7, seed=1)
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 7, leading))
    flat = [array.reshape(-1, *array.shape[len(leading) :]) for array in (student, teacher, labels)]
    for found, expected in zip(every_loss(student, teacher, labels), every_loss(*flat), strict=True):
        np.testing.assert_allclose(found, np.reshape(expected, leading), rtol=1e-6)


@jax.jit
def every_loss(student: jax.Array, teacher: jax.Array, labels: jax.Array) -> list[jax.Array]:
    return [loss(student, teacher) for loss in PAIRS.values()] + [loss(student, labels) for loss in LABELS.values()]


@pytest.mark.parametrize("kind", TYPES)
def test_narrow_logits_are_computed_in_float32(kind: Any) -> None:
    student, teacher = normal(12, 7).astype(kind), normal(12, 7, seed=1).astype(kind)
    wide = student.astype(jnp.float32), teacher.astype(jnp.float32)
    labels = jnp.asarray(np.arange(12) % 7)
    narrow, expected = every_loss(student, teacher, labels), every_loss(*wide, labels)
    for found, of_wide in zip(narrow, expected, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, of_wide)
    of_pairs, gradients = beside_a_wide_teacher(student, wide[1])
    for found, of_wide in zip(of_pairs, expected, strict=False):
        np.testing.assert_array_equal(found, of_wide)
    for gradient in gradients:
        assert gradient.dtype == kind


@jax.jit
def beside_a_wide_teacher(student: jax.Array, teacher: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """Values of the losses of pairs, and their gradients beside a teacher of the student's type."""
    like = teacher.astype(student.dtype)
    gradients = [jax.grad(lambda z, f=loss: f(z, like).sum())(student) for loss in PAIRS.values()]
    return [loss(student, teacher) for loss in PAIRS.values()], gradients


@pytest.mark.parametrize("kind", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.int32, jnp.uint32])
def test_labels_of_any_whole_type_name_the_same_classes(kind: Any) -> None:
    logits = normal(3, 300)
    of = compiled(losses.cross_entropy)
    np.testing.assert_array_equal(of(logits, jnp.array([0, 5, 100], kind)), of(logits, jnp.array([0, 5, 100])))


def test_whole_numbers_are_hyperparameters_too() -> None:
    student, teacher = normal(5, 7), normal(5, 7, seed=1)
    expected = losses.kd(student, teacher, temperature=2.0)
    for two in (2, np.int64(2), jnp.int32(2), np.float64(2), jnp.float16(2)):
        np.testing.assert_array_equal(losses.kd(student, teacher, temperature=two), expected)
    hard, soft = normal(5), normal(5, seed=1)
    for one in (1, np.int64(1), jnp.int32(1), np.float64(1)):
        np.testing.assert_array_equal(losses.mix(hard, soft, alpha=one), hard)
    labels = jnp.arange(5)
    np.testing.assert_array_equal(
        losses.label_smoothing(student, labels, smoothing=jnp.int32(0)), losses.cross_entropy(student, labels)
    )


def test_a_temperature_of_many_numbers_is_refused() -> None:
    from kd_jax.losses.checks import number

    with pytest.raises(ShapeError, match="vmap"):
        number(jnp.ones(3), jnp.zeros((3, 2)))


EVERY = [getattr(losses, name) for name in dir(losses)]
NETWORKS = {"student_logits", "teacher_logits"}
DIVERGENCES = [one for one in EVERY if inspect.isfunction(one) and set(inspect.signature(one).parameters) >= NETWORKS]


@pytest.mark.parametrize("loss", DIVERGENCES, ids=lambda loss: loss.__name__)
def test_numbers_of_a_loss_are_given_by_name(loss: Callable[..., Any]) -> None:
    """Two of them are easily swapped."""
    parameters = inspect.signature(loss).parameters.values()
    by_place = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY]
    assert by_place in (["student_logits", "teacher_logits"], ["student_logits", "teacher_logits", "labels"])
    assert all(one.default is one.empty for one in parameters if one.name in by_place)
