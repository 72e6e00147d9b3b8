"""Methods whose soft loss knows the label (DKD, NKD, RLD, OFA, PLD, WKD-L) or couples a batch (DIST, MLKD)."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.methods.base import Method, Parts, Scalar, Terms, Values, static, weighted
from kd_jax.methods.bounds import Bounds, Share, Temperature, Weight
from kd_jax.methods.logits import BesideHard, hard_term, is_zero, require_labels, require_teacher, rest
from kd_jax.methods.relations import example_weights
from kd_jax.models import Output


@dataclass(frozen=True)
class DKD(Method):
    """Decoupled KD: Zhao et al. (2022), https://arxiv.org/abs/2203.08679.

    alpha, beta: of the target's and of the other classes' part. warmup: steps in which both rise in a line from 0.
    hard: the weight of the cross entropy.
    """

    alpha: Weight = 1.0
    beta: Weight = 8.0
    temperature: Temperature = 4.0
    hard: Weight = 1.0
    warmup: Weight = 0
    needs_labels: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        taught, labels = require_teacher(self, teacher), require_labels(self, batch)
        soft = losses.dkd(
            student.logits, taught.logits, labels, alpha=self.alpha, beta=self.beta, temperature=self.temperature
        )
        return {**hard_term(self, self.hard, student, batch), "soft": _warmed(soft, self.warmup, step)}


@dataclass(frozen=True)
class NKD(Method):
    """Normalised KD: Yang et al. (2023), https://arxiv.org/abs/2303.13005.

    gamma: the weight of the other classes' part. hard: the weight of the cross entropy.
    """

    gamma: Weight = 1.5
    temperature: Temperature = 1.0
    hard: Weight = 1.0
    needs_labels: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        taught, labels = require_teacher(self, teacher), require_labels(self, batch)
        soft = losses.nkd(student.logits, taught.logits, labels, gamma=self.gamma, temperature=self.temperature)
        return {**hard_term(self, self.hard, student, batch), "soft": soft}


@dataclass(frozen=True)
class RLD(Method):
    """Refined logit distillation: Sun et al. (2025), https://arxiv.org/abs/2408.07666.

    alpha, beta: of the part of the sample's confidence and of the masked classes'. warmup: steps in which both rise in
    a line from 0. hard: the weight of the cross entropy.
    """

    alpha: Weight = 1.0
    beta: Weight = 8.0
    temperature: Temperature = 4.0
    hard: Weight = 1.0
    warmup: Weight = 0
    needs_labels: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        taught, labels = require_teacher(self, teacher), require_labels(self, batch)
        soft = losses.rld(
            student.logits, taught.logits, labels, alpha=self.alpha, beta=self.beta, temperature=self.temperature
        )
        return {**hard_term(self, self.hard, student, batch), "soft": _warmed(soft, self.warmup, step)}


def _warmed(soft: Array, warmup: Scalar, step: Int[Array, ""]) -> Array:
    """A loss that rises in a line from 0 over the first `warmup` steps."""
    if is_zero(warmup):
        return soft
    return soft * jnp.minimum(1.0, (step + 1).astype(soft.dtype) / jnp.asarray(warmup, soft.dtype))


@dataclass(frozen=True)
class OFA(Method):
    """One-for-all's loss on logits: Hao et al. (2023), https://arxiv.org/abs/2310.19444.

    gamma: the exponent. hard: the weight of the cross entropy.
    """

    gamma: Annotated[Scalar, Bounds(1)] = 1.0
    temperature: Temperature = 1.0
    hard: Weight = 1.0
    needs_labels: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        taught, labels = require_teacher(self, teacher), require_labels(self, batch)
        soft = losses.ofa(student.logits, taught.logits, labels, gamma=self.gamma, temperature=self.temperature)
        return {**hard_term(self, self.hard, student, batch), "soft": soft}


@dataclass(frozen=True)
class PLD(Method):
    """Plackett-Luce distillation: Bassam et al. (2025), https://arxiv.org/abs/2506.12542. The hard loss is in it."""

    temperature: Temperature = 1.0
    hard: Weight = 0.0
    needs_labels: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        taught, labels = require_teacher(self, teacher), require_labels(self, batch)
        soft = losses.pld(student.logits, taught.logits, labels, temperature=self.temperature)
        return {**hard_term(self, self.hard, student, batch), "soft": soft}


@dataclass(frozen=True)
class DIST(BesideHard):
    """DIST: Huang et al. (2022), https://arxiv.org/abs/2205.10536. Correlations within and between classes.

    beta, gamma: of both. hard: the weight of the cross entropy. It couples the examples of a batch: the whole one,
    whatever the devices.
    """

    beta: Weight = 1.0
    gamma: Weight = 1.0
    temperature: Temperature = 1.0
    hard: Weight = 1.0
    of_classes: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = True

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.dist`."""
        return losses.dist(
            student.logits, teacher.logits, beta=self.beta, gamma=self.gamma, temperature=self.temperature,
            weights=example_weights(batch),
        )  # fmt: skip


@dataclass(frozen=True)
class MLKD(BesideHard):
    """Multi-level logit distillation: Jin et al. (2023), CVPR. KL at several temperatures, and Gram matrices.

    temperature: one or several. hard: the weight of the cross entropy. Of one view: the paper adds the loss of a weakly
    and of a strongly augmented one, and its public code takes the wrong view's logits at two temperatures. It couples
    the examples of a batch: the whole one, whatever the devices. Logits `[batch, classes]`.
    """

    temperature: Annotated[Scalar | tuple[Scalar, ...], Bounds(0, above=True)] = (2.0, 3.0, 4.0, 5.0, 6.0)
    hard: Weight = 1.0
    couples_batch: ClassVar[bool] = True

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.mlkd`."""
        return losses.mlkd(student.logits, teacher.logits, temperature=self.temperature, weights=example_weights(batch))


@dataclass(frozen=True)
class WKD(Method):
    """WKD-L: Lv et al. (2024), https://arxiv.org/abs/2412.08139. Optimal transport between the other classes.

    similarity: of classes, `[classes, classes]`, in [0, 1]; say (1 + cosine) / 2 of the columns of the teacher's last
    kernel. gamma: the weight of the transport, 30 at temperature 2 for ImageNet. regulariser: of Sinkhorn's algorithm,
    which public code calls its lambda. iterations: of it. hard: the weight of the cross entropy. Memory
    `[batch, classes, classes]`.
    """

    similarity: Any
    gamma: Weight = 600.0
    temperature: Temperature = 8.0
    regulariser: Temperature = 0.05
    iterations: Annotated[int, Bounds(1)] = static(10)
    hard: Weight = 1.0
    needs_labels: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        taught, labels = require_teacher(self, teacher), require_labels(self, batch)
        soft = losses.wkd(
            student.logits, taught.logits, labels, similarity=self.similarity, gamma=self.gamma,
            temperature=self.temperature, regulariser=self.regulariser, iterations=self.iterations,
        )  # fmt: skip
        return {**hard_term(self, self.hard, student, batch), "soft": soft}


@dataclass(frozen=True)
class VirtualTeacher(Method):
    """A teacher made by hand: Yuan et al. (2020), https://arxiv.org/abs/1909.11723 (Tf-KD). It has no network.

    alpha: the weight of the hard loss; 1 − alpha is that of `kd` from a teacher who gives the label's class
    `probability` and shares the rest equally. Public code takes the softmax of these probabilities divided by the
    temperature, and leaves the student at temperature 1.
    """

    alpha: Share = 0.1
    probability: Share = 0.99
    temperature: Temperature = 20.0
    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True
    compares_logits: ClassVar[bool] = False

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` and `soft`, with their weights."""
        labels = require_labels(self, batch)
        soft = losses.virtual_teacher(
            student.logits, labels, probability=self.probability, temperature=self.temperature
        )
        return {**hard_term(self, self.alpha, student, batch), "soft": weighted(rest(self.alpha), soft)}
