"""A method: which losses, with which weights and which learned parts. `Method = (init, loss)`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, Key

from kd_jax import losses
from kd_jax.models.network import Output

Learned = Any
Weights = Any


class Method(NamedTuple):
    """What a student is trained to minimise, as two pure functions.

    init: `init(key) -> learned`, the method's own trained parts (a regressor, say), or `()`.
    loss: `loss(weights, learned, student, teacher, labels) -> [batch]`; `weights` are the method's hyperparameters as
        arrays, `student` and `teacher` are `Output`s, and `teacher` is None where the method has none.
    """

    init: Callable[[Key[Array, ""]], Learned]
    loss: Callable[[Weights, Learned, Output, Output | None, Int[Array, " batch"]], Float[Array, " batch"]]


class KDWeights(NamedTuple):
    """Hyperparameters of `kd`. alpha: weight of the hard loss, in [0, 1]. temperature: T > 0."""

    alpha: float | Float[Array, ""]
    temperature: float | Float[Array, ""]


class SmoothingWeights(NamedTuple):
    """Hyperparameter of `LABEL_SMOOTHING`. smoothing: epsilon in [0, 1], the share of the uniform distribution."""

    smoothing: float | Float[Array, ""]


def _nothing_learned(key: Key[Array, ""]) -> tuple[()]:
    return ()


def _cross_entropy(
    weights: tuple[()], learned: Learned, student: Output, teacher: Output | None, labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    return losses.cross_entropy(student.logits, labels)


def _label_smoothing(
    weights: Weights, learned: Learned, student: Output, teacher: Output | None, labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    if not isinstance(weights, SmoothingWeights):
        raise ValueError(
            "label smoothing has a weight: give Hyperparameters(learning_rate, SmoothingWeights(smoothing))"
        )
    return losses.label_smoothing(student.logits, labels, smoothing=weights.smoothing)


def _with_soft_loss(soft_loss: Callable[..., Float[Array, " batch"]]) -> Method:
    """alpha · cross entropy + (1 - alpha) · `soft_loss` at a temperature."""

    def loss(
        weights: Weights, learned: Learned, student: Output, teacher: Output | None, labels: Int[Array, " batch"]
    ) -> Float[Array, " batch"]:
        if teacher is None:
            raise ValueError("this method needs a teacher, and none was given: use CROSS_ENTROPY to train without one")
        if not isinstance(weights, KDWeights):
            raise ValueError(
                "this method has weights: give Hyperparameters(learning_rate, KDWeights(alpha, temperature))"
            )
        hard = losses.cross_entropy(student.logits, labels)
        soft = soft_loss(student.logits, teacher.logits, temperature=weights.temperature)
        return losses.mix(hard, soft, alpha=weights.alpha)

    return Method(_nothing_learned, loss)


CROSS_ENTROPY = Method(_nothing_learned, _cross_entropy)
"""Labels alone; weights `()`. How teachers and baselines are trained."""

LABEL_SMOOTHING = Method(_nothing_learned, _label_smoothing)
"""Szegedy et al. (2016): a baseline with soft labels and without a teacher; weights `SmoothingWeights`."""

KD = _with_soft_loss(losses.kd)
"""Hinton, Vinyals and Dean (2015): alpha · CE + (1 - alpha) · T² KL; weights `KDWeights`."""

KD_WITHOUT_T_SQUARED = _with_soft_loss(losses.distillation_kl)
"""The reference notebook as it was meant: alpha · CE + (1 - alpha) · KL, without T²; weights `KDWeights`."""

KD_AS_WRITTEN = _with_soft_loss(losses.kd_as_written)
"""The reference notebook with its wrong use of `KLDivLoss`; weights `KDWeights`."""
