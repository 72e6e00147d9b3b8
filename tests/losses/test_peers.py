"""Numbers that other projects' own code gave for the logits below, and their conversion to kd_jax's losses.

Only values are here. All were computed in float64 on a CPU, with PyTorch 2.13 or TensorFlow 2.21, by

- RepDistiller, commit b84f547 (2023-10-16): `DistillKL(T)`, and `gamma` CE + `alpha` KD as `train_student.py` adds,
  with the 0.1 and 0.9 of its example command for KD (its own defaults are gamma 1 and no alpha);
- torchdistill, commit 3e4373c (2026-07-01, 1.1.5-dev): `KDLoss(temperature=T, alpha=...)`, reduction "batchmean", with
  labels, beta left at 1 - alpha. alpha has no usable default; 0.5 is that of its ImageNet configuration for KD;
- Keras 3.15.1 with its TensorFlow backend and `set_floatx("float64")`; `keras/src/distillation` is the same in commit
  3422977 (2026-08-21, 3.16.0). `LogitsDistillation(temperature=T)` as it is by default and with
  `loss=keras.losses.KLDivergence()`; `Distiller` with its default `student_loss_weight` of 0.5 and
  `SparseCategoricalCrossentropy(from_logits=True)`. 3 is its default temperature.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses

BATCH, CLASSES = 4, 10
_I, _K = np.arange(float(BATCH))[:, None], np.arange(float(CLASSES))[None, :]
STUDENT, TEACHER = 3 * np.sin(1 + _I + 2 * _K), 5 * np.cos(2 + 3 * _I + _K)
LABELS = np.arange(BATCH) % CLASSES
RTOL = 1e-12

# By temperature. PyTorch's mean cross entropy is that of RepDistiller and torchdistill.
PYTORCH_CROSS_ENTROPY = 3.731629020089278
REPDISTILLER_SOFT = {1.0: 2.8951202777290166, 4.0: 6.98284642415733, 20.0: 7.533365677472811}
REPDISTILLER_COMPLETE = {1.0: 2.978771151965043, 4.0: 6.657724683750525, 20.0: 7.153192011734458}
TORCHDISTILL_ALPHA_0 = {1.0: 2.8951202777290166, 4.0: 0.4364279015098331, 20.0: 0.01883341419368203}
TORCHDISTILL_ALPHA_HALF = {1.0: 3.3133746489091473, 4.0: 5.357237722123304, 20.0: 5.632497348781045}
KERAS_KL_INSTANCE = {
    1.0: 2.895120277729016,
    3.0: 6.475445745710579,
    4.0: 6.98284642415733,
    20.0: 7.533365677472877,
}
KERAS_KL_INSTANCE_COMPLETE = {3.0: 5.103537382899929, 4.0: 5.357237722123305}
# At 1/4 some probabilities are below 1e-7, where Keras clips them.
KERAS_KL_INSTANCE_CLIPPED = {0.25: 0.4607143972978499}
KERAS_DEFAULT = {
    0.25: 40.43729371089683,
    1.0: 38.83491871829698,
    3.0: 35.95281519001409,
    4.0: 34.14240805107123,
    20.0: 6.605608539203928,
}
KERAS_DEFAULT_COMPLETE = {3.0: 19.842222105051686, 4.0: 18.937018535580254}
# The student's logits are the teacher's + 1, so the two distributions are equal.
KERAS_DEFAULT_OF_EQUALS_AT_4 = -0.34976129995708055


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def hard() -> jax.Array:
    return losses.cross_entropy(jnp.asarray(STUDENT), jnp.asarray(LABELS))


def kd(temperature: float) -> jax.Array:
    return losses.kd(jnp.asarray(STUDENT), jnp.asarray(TEACHER), temperature=temperature)


def kl(temperature: float) -> jax.Array:
    return losses.distillation_kl(jnp.asarray(STUDENT), jnp.asarray(TEACHER), temperature=temperature)


def softmax(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z - z.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def clipped_kl(student: np.ndarray, teacher: np.ndarray) -> float:
    """The sum over the classes of t log(t / s), of whatever numbers, each clipped to [1e-7, 1]; mean over the batch."""
    s, t = np.clip(student, 1e-7, 1), np.clip(teacher, 1e-7, 1)
    return float((t * np.log(t / s)).sum(axis=-1).mean())


def test_the_cross_entropy_is_pytorchs() -> None:
    assert float(hard().mean()) == pytest.approx(PYTORCH_CROSS_ENTROPY, rel=RTOL)


@pytest.mark.parametrize("temperature", REPDISTILLER_SOFT)
def test_repdistiller_is_kd_and_its_alpha_weighs_the_soft_loss(temperature: float) -> None:
    assert float(kd(temperature).mean()) == pytest.approx(REPDISTILLER_SOFT[temperature], rel=RTOL)
    complete = losses.mix(hard(), kd(temperature), alpha=1 - 0.9)
    assert float(complete.mean()) == pytest.approx(REPDISTILLER_COMPLETE[temperature], rel=RTOL)


@pytest.mark.parametrize("temperature", TORCHDISTILL_ALPHA_0)
def test_torchdistill_is_kd_mixed_by_alpha_but_loses_t_squared_at_alpha_0(temperature: float) -> None:
    assert float(kl(temperature).mean()) == pytest.approx(TORCHDISTILL_ALPHA_0[temperature], rel=RTOL)
    complete = losses.mix(hard(), kd(temperature), alpha=0.5)
    assert float(complete.mean()) == pytest.approx(TORCHDISTILL_ALPHA_HALF[temperature], rel=RTOL)


@pytest.mark.parametrize("temperature", KERAS_KL_INSTANCE)
def test_keras_with_a_kl_instance_is_kd(temperature: float) -> None:
    assert float(kd(temperature).mean()) == pytest.approx(KERAS_KL_INSTANCE[temperature], rel=RTOL)


@pytest.mark.parametrize("temperature", KERAS_KL_INSTANCE_COMPLETE)
def test_the_student_loss_weight_of_keras_is_alpha(temperature: float) -> None:
    complete = losses.mix(hard(), kd(temperature), alpha=0.5)
    assert float(complete.mean()) == pytest.approx(KERAS_KL_INSTANCE_COMPLETE[temperature], rel=RTOL)


@pytest.mark.parametrize("temperature", KERAS_KL_INSTANCE_CLIPPED)
def test_keras_clips_probabilities_and_kd_does_not(temperature: float) -> None:
    value = KERAS_KL_INSTANCE_CLIPPED[temperature]
    clipped = clipped_kl(softmax(STUDENT / temperature), softmax(TEACHER / temperature))
    assert temperature**2 * clipped == pytest.approx(value, rel=RTOL)
    assert float(kd(temperature).mean()) > 1.2 * value


@pytest.mark.parametrize("temperature", KERAS_DEFAULT)
def test_the_default_of_keras_is_a_sum_over_logits_without_softmax_and_not_kd(temperature: float) -> None:
    value = KERAS_DEFAULT[temperature]
    assert clipped_kl(STUDENT / temperature, TEACHER / temperature) == pytest.approx(value, rel=RTOL)
    for mean in (float(kd(temperature).mean()), float(kl(temperature).mean())):
        assert abs(mean / value - 1) > 0.1


@pytest.mark.parametrize("temperature", KERAS_DEFAULT_COMPLETE)
def test_the_default_of_keras_mixed_with_the_hard_loss(temperature: float) -> None:
    complete = (float(hard().mean()) + KERAS_DEFAULT[temperature]) / 2
    assert complete == pytest.approx(KERAS_DEFAULT_COMPLETE[temperature], rel=RTOL)


def test_the_default_of_keras_is_negative_for_equal_distributions() -> None:
    value = clipped_kl((TEACHER + 1) / 4, TEACHER / 4)
    assert value == pytest.approx(KERAS_DEFAULT_OF_EQUALS_AT_4, rel=RTOL)
    assert float(losses.kd(jnp.asarray(TEACHER + 1), jnp.asarray(TEACHER), temperature=4.0).max()) < 1e-28
