import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax.errors import MethodError
from kd_jax.methods import KDWithoutTSquared
from kd_jax.methods.logits import is_zero

S, T = np.array([[1.0, 2.0, 4.0], [0.5, -1.0, 2.0]]), np.array([[3.0, 1.0, 0.0], [-2.0, 0.0, 1.0]])
STUDENT, TEACHER = kd.Output(jnp.asarray(S, jnp.float32)), kd.Output(jnp.asarray(T, jnp.float32))
LABELS = np.array([1, 0])
BATCH = kd.Batch(None, jnp.asarray(LABELS))
STEP = jnp.int32(0)


def terms(
    method: kd.Method, student: kd.Output = STUDENT, teacher: kd.Output | None = TEACHER, batch: kd.Batch = BATCH
):
    return method.loss(kd.Parts(), student, teacher, batch, STEP)


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


HARD = -np.log(softmax(S)[np.arange(2), LABELS])


@pytest.mark.parametrize(("method", "factor"), [(kd.KD, 9.0), (KDWithoutTSquared, 1.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_methods_mix_by_alpha(method: type[kd.Method], factor: float, alpha: float) -> None:
    p, q = softmax(T / 3), softmax(S / 3)
    found = terms(method(alpha=alpha, temperature=3.0))
    assert list(found) == ["hard", "soft"]
    if alpha:
        np.testing.assert_allclose(found["hard"], alpha * HARD, rtol=1e-5)
    soft = (1 - alpha) * factor * np.sum(p * np.log(p / q), axis=-1)
    np.testing.assert_allclose(found["soft"], soft, rtol=1e-5, atol=1e-7)


def test_cross_entropy_and_label_smoothing() -> None:
    np.testing.assert_allclose(terms(kd.CrossEntropy())["hard"], HARD, rtol=1e-5)
    smooth = 0.8 * HARD + 0.2 * -np.log(softmax(S)).mean(-1)
    np.testing.assert_allclose(terms(kd.LabelSmoothing(0.2), teacher=None)["hard"], smooth, rtol=1e-5)


def gradient(method: kd.Method, teacher: np.ndarray, labels: np.ndarray) -> jax.Array:
    def loss(logits: jax.Array) -> jax.Array:
        values = terms(method, kd.Output(logits), kd.Output(jnp.asarray(teacher, jnp.float32)), kd.Batch(None, labels))
        return jnp.sum(values["hard"] + values["soft"])

    return jax.grad(loss)(STUDENT.logits)


def test_what_has_the_weight_0_does_not_matter() -> None:
    """Labels outside at alpha 0, a teacher of NaN at alpha 1."""
    right = gradient(kd.KD(0.0), T, LABELS)
    np.testing.assert_array_equal(gradient(kd.KD(0.0), T, jnp.array([-1, 99])), right)
    assert np.isfinite(right).all()
    alone = gradient(kd.KD(1.0), T, LABELS)
    np.testing.assert_array_equal(gradient(kd.KD(1.0), T * np.nan, LABELS), alone)
    np.testing.assert_allclose(alone, softmax(S) - np.eye(3)[LABELS], rtol=1e-5, atol=1e-6)


def test_without_labels_there_is_the_soft_loss_alone() -> None:
    assert list(terms(kd.KD(0.0), batch=kd.Batch(None))) == ["soft"]
    assert not kd.KD(0.0).needs_labels
    assert kd.KD(0.1).needs_labels
    assert kd.KD(jnp.array([0.0, 0.1])).needs_labels
    assert not kd.KD(jnp.zeros(2)).needs_labels
    assert jax.jit(lambda alpha: jnp.bool_(is_zero(alpha)))(0.0) == jnp.bool_(False)


@pytest.mark.parametrize("method", [kd.CrossEntropy(), kd.LabelSmoothing()])
def test_missing_labels_are_told(method: kd.Method) -> None:
    with pytest.raises(MethodError, match=f"{type(method).__name__} needs labels, and the batch has none"):
        terms(method, batch=kd.Batch(None))


def test_a_missing_teacher_is_told() -> None:
    with pytest.raises(MethodError, match="KD needs a teacher, and none was given"):
        terms(kd.KD(), teacher=None)


def test_labels_of_bytes_are_labels() -> None:
    narrow = terms(kd.KD(0.5), batch=kd.Batch(None, np.array([1, 0], np.uint8)))
    np.testing.assert_array_equal(narrow["hard"], terms(kd.KD(0.5))["hard"])
