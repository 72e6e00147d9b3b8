"""Methods that need nothing but logits: cross entropy, label smoothing, and Hinton's distillation."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError
from kd_jax.losses.checks import are_soft, as_labels, as_soft_labels
from kd_jax.losses.softmax import first_of_largest
from kd_jax.methods.base import Method, Parts, Scalar, Terms, Values, weighted
from kd_jax.methods.bounds import Share, Temperature
from kd_jax.models import Output


@dataclass(frozen=True)
class CrossEntropy(Method):
    """Labels alone, whole numbers or soft ones `[..., classes]`: how teachers and baselines are trained."""

    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    compares_logits: ClassVar[bool] = False
    of_classes: ClassVar[bool] = True

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `hard`."""
        return {"hard": hard_loss(self, student, batch)}


@dataclass(frozen=True)
class LabelSmoothing(Method):
    """Smoothed labels and no teacher: Szegedy et al. (2016), https://arxiv.org/abs/1512.00567, section 7.

    smoothing: epsilon in [0, 1], the share of the uniform distribution.
    """

    smoothing: Share = 0.1
    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    compares_logits: ClassVar[bool] = False
    of_classes: ClassVar[bool] = True

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `hard`."""
        labels = require_labels(self, batch)
        return {"hard": losses.label_smoothing(student.logits, labels, smoothing=self.smoothing)}


class SoftLoss(Method):
    """The base of methods that are alpha · cross entropy + (1 − alpha) · a soft loss.

    alpha: the weight of the hard loss, in [0, 1]. At 0 the labels may be missing; those that are given must fit it.
    """

    alpha: Scalar
    of_classes: ClassVar[bool] = True

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Unless alpha is 0."""
        return not is_zero(self.alpha)

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """The soft loss, `[batch]` or `[batch, positions]`."""
        raise MethodError(f"{type(self).__name__} has no soft loss: define soft(student, teacher, batch)")

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` and `soft`, with their weights; without labels `soft` alone."""
        taught = require_teacher(self, teacher)
        # Not promote_types, which refuses float64 beside float32 where nothing may be promoted.
        alpha = jnp.asarray(self.alpha, jnp.float64 if student.logits.dtype == jnp.float64 else jnp.float32)
        # What has the weight 0 must not matter, whatever it is: it is replaced by what certainly is finite. A `where`
        # around the product would do, too, but for rounding, which also knows which of both comes first.
        ours = jax.lax.stop_gradient(student.logits)
        hard = {}
        if batch.labels is not None:
            answers = jnp.minimum(first_of_largest(ours), ours.shape[-1] - 1)
            if not self.needs_labels:
                labels = instead = answers
            elif are_soft(batch.labels):
                labels = as_soft_labels(batch.labels, ours)
                instead = jax.nn.one_hot(answers, ours.shape[-1], dtype=labels.dtype)
            else:
                labels, instead = as_labels(batch.labels, ours).astype(jnp.int32), answers
            known = batch._replace(labels=jnp.where(alpha == 0, instead, labels))
            hard = {"hard": alpha * hard_loss(self, student, known)}
        safe = taught._replace(logits=jnp.where(alpha == 1, ours.astype(taught.logits.dtype), taught.logits))
        return {**hard, "soft": (1 - alpha) * self.soft(student, safe, batch)}


@dataclass(frozen=True)
class KD(SoftLoss):
    """Hinton, Vinyals and Dean (2015), https://arxiv.org/abs/1503.02531: alpha · CE + (1 − alpha) · T² KL.

    alpha: the weight of the hard loss, in [0, 1]. temperature: T > 0.
    """

    alpha: Share = 0.1
    temperature: Temperature = 4.0

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """T² KL(teacher ‖ student)."""
        return losses.kd(student.logits, teacher.logits, temperature=self.temperature)


@dataclass(frozen=True)
class KDWithoutTSquared(SoftLoss):
    """`KD` without the factor T², as the reference notebook has it: its soft gradients shrink as 1/T²."""

    alpha: Share = 0.5
    temperature: Temperature = 20.0

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """KL(teacher ‖ student) at the temperature."""
        return losses.distillation_kl(student.logits, teacher.logits, temperature=self.temperature)


class BesideHard(Method):
    """The base of methods that are a soft loss, and beside it the cross entropy with a weight of its own.

    hard: the weight of the cross entropy. At 0 the labels may be missing; those that are given must fit it.
    """

    hard: Scalar
    of_classes: ClassVar[bool] = True

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Unless `hard` is 0."""
        return not is_zero(self.hard)

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """The soft loss."""
        raise MethodError(f"{type(self).__name__} compares nothing: define soft(student, teacher, batch)")

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        soft = self.soft(student, require_teacher(self, teacher), batch)
        return {**hard_term(self, self.hard, student, batch), "soft": soft}


def hard_loss(method: Method, student: Output, batch: Batch) -> Values:
    """Cross entropy of the batch's labels, whole or soft. Raises `MethodError` where there are none."""
    return losses.cross_entropy(student.logits, require_labels(method, batch))


def hard_term(method: Method, weight: Scalar, student: Output, batch: Batch) -> dict[str, Values]:
    """The term `hard` with its weight, unless it `is_left_out`."""
    return {} if is_left_out(weight, batch) else {"hard": weighted(weight, hard_loss(method, student, batch))}


def is_left_out(weight: Scalar, batch: Batch) -> bool:
    """Whether a weight of the labels' term is known to be 0, or traced where labels are missing.

    Whether a traced weight is 0 was looked at before (`needs_labels`).
    """
    return is_zero(weight) or (batch.labels is None and isinstance(weight, jax.core.Tracer))


def require_labels(method: Method, batch: Batch) -> Array:
    """The batch's labels. Raises `MethodError` where there are none."""
    if batch.labels is None:
        raise MethodError(
            f"{type(method).__name__} needs labels, and the batch has none: give kd.Batch(inputs, labels), or a method "
            "of the teacher alone such as kd.KD(alpha=0)"
        )
    return jnp.asarray(batch.labels)


def require_teacher(method: Method, teacher: Output | None) -> Output:
    """The teacher's output. Raises `MethodError` where there is no teacher."""
    if teacher is None:
        raise MethodError(
            f"{type(method).__name__} needs a teacher, and none was given: give one, or train with kd.CrossEntropy()"
        )
    return teacher


def rest(alpha: Scalar) -> Scalar:
    """1 − alpha; of a Python number in Python's precision, of an array in its own type."""
    return 1 - alpha if isinstance(alpha, int | float) else 1 - jnp.asarray(alpha)


def is_zero(number: Scalar) -> bool:
    """Whether a number is known to be 0 everywhere; False for what is traced."""
    return not isinstance(number, jax.core.Tracer) and not np.any(np.asarray(number))
