"""Methods whose soft loss knows the label: DKD, NKD, RLD, OFA, PLD; and DIST, which couples a batch."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.methods.base import Method, Parts, Scalar, Terms
from kd_jax.methods.bounds import Bounds, Temperature, Weight
from kd_jax.methods.logits import hard_term, is_zero, require_labels, require_teacher
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
        if not is_zero(self.warmup):
            soft = soft * jnp.minimum(1.0, (step + 1).astype(soft.dtype) / jnp.asarray(self.warmup, soft.dtype))
        return {**hard_term(self, self.hard, student, batch), "soft": soft}


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
    """Refined logit distillation: Sun et al. (2025), ICCV.

    alpha, beta: of the part of the sample's confidence and of the masked classes'. hard: the weight of the cross
    entropy.
    """

    alpha: Weight = 1.0
    beta: Weight = 8.0
    temperature: Temperature = 4.0
    hard: Weight = 1.0
    needs_labels: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        taught, labels = require_teacher(self, teacher), require_labels(self, batch)
        soft = losses.rld(
            student.logits, taught.logits, labels, alpha=self.alpha, beta=self.beta, temperature=self.temperature
        )
        return {**hard_term(self, self.hard, student, batch), "soft": soft}


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
class DIST(Method):
    """DIST: Huang et al. (2022), https://arxiv.org/abs/2205.10536. Correlations within and between classes.

    beta, gamma: of both. hard: the weight of the cross entropy. It couples the examples of a batch: the whole one,
    whatever the devices.
    """

    beta: Weight = 1.0
    gamma: Weight = 1.0
    temperature: Temperature = 1.0
    hard: Weight = 1.0
    of_classes: ClassVar[bool] = True

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Unless `hard` is 0."""
        return not is_zero(self.hard)

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        taught = require_teacher(self, teacher)
        soft = losses.dist(
            student.logits, taught.logits, beta=self.beta, gamma=self.gamma, temperature=self.temperature,
            weights=example_weights(batch),
        )  # fmt: skip
        return {**hard_term(self, self.hard, student, batch), "soft": soft}
