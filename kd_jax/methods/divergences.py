"""Methods that are cross entropy and another divergence than KL in its place."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError
from kd_jax.methods.base import Method, Parts, Terms, Values, static
from kd_jax.methods.blocks import step_key, stored_key
from kd_jax.methods.bounds import Bounds, Finite, Share, Temperature, Weight
from kd_jax.methods.logits import BesideHard, SoftLoss, hard_term, is_zero, require_teacher
from kd_jax.methods.sparse import CLASSES, LOG_PROBABILITIES, LOG_REST, WEIGHTS, Sparse, require_kind
from kd_jax.models import Output


@dataclass(frozen=True)
class ReverseKL(SoftLoss):
    """alpha · CE + (1 − alpha) · T² KL(student ‖ teacher): MiniLLM, Gu et al. (2024),
    https://arxiv.org/abs/2306.08543.
    """

    alpha: Share = 0.1
    temperature: Temperature = 1.0

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """T² KL(student ‖ teacher)."""
        return losses.reverse_kl(student.logits, teacher.logits, temperature=self.temperature)


@dataclass(frozen=True)
class SymmetricKL(SoftLoss):
    """alpha · CE + (1 − alpha) · a mean of both KLs, of which the reverse one weighs `skew`: Ko et al. (2024),
    https://arxiv.org/abs/2402.03898.
    """

    alpha: Share = 0.1
    skew: Share = 0.9
    temperature: Temperature = 1.0

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.symmetric_kl`."""
        return losses.symmetric_kl(student.logits, teacher.logits, skew=self.skew, temperature=self.temperature)


@dataclass(frozen=True)
class SkewKL(SoftLoss):
    """DistiLLM's skewed KL to a mixture: Ko et al. (2024), https://arxiv.org/abs/2402.03898. skew: the teacher's
    share.
    """

    alpha: Share = 0.1
    skew: Share = 0.1
    temperature: Temperature = 1.0

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.skew_kl`."""
        return losses.skew_kl(student.logits, teacher.logits, skew=self.skew, temperature=self.temperature)


@dataclass(frozen=True)
class SkewReverseKL(SoftLoss):
    """DistiLLM's skewed reverse KL: Ko et al. (2024), https://arxiv.org/abs/2402.03898.

    detached: no gradient through the student in the mixture, as DistiLLM-2's code has it.
    """

    alpha: Share = 0.1
    skew: Share = 0.1
    temperature: Temperature = 1.0
    detached: bool = False

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.skew_reverse_kl`."""
        return losses.skew_reverse_kl(
            student.logits, teacher.logits, skew=self.skew, temperature=self.temperature, detached=self.detached
        )


@dataclass(frozen=True)
class JSD(SoftLoss):
    """Generalised Jensen-Shannon divergence: GKD, Agarwal et al. (2024), https://arxiv.org/abs/2306.13649."""

    alpha: Share = 0.1
    beta: Share = 0.5
    temperature: Temperature = 1.0
    convention: str = "paper"

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.jsd`."""
        return losses.jsd(
            student.logits, teacher.logits, beta=self.beta, temperature=self.temperature, convention=self.convention
        )


@dataclass(frozen=True)
class AdaptiveKL(SoftLoss):
    """Adaptive KL: Wu et al. (2024), https://arxiv.org/abs/2404.02657. mu: the share of the mass that is the head."""

    alpha: Share = 0.1
    mu: Share = 0.5
    temperature: Temperature = 1.0

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.adaptive_kl`."""
        return losses.adaptive_kl(student.logits, teacher.logits, mu=self.mu, temperature=self.temperature)


@dataclass(frozen=True)
class TotalVariation(SoftLoss):
    """alpha · CE + (1 − alpha) · half the sum of the absolute differences of the probabilities: Wen et al. (2023),
    https://arxiv.org/abs/2307.15190.
    """

    alpha: Share = 0.1
    temperature: Temperature = 1.0

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.total_variation`."""
        return losses.total_variation(student.logits, teacher.logits, temperature=self.temperature)


@dataclass(frozen=True)
class LogitMSE(SoftLoss):
    """Logit matching: Ba and Caruana (2014), https://arxiv.org/abs/1312.6184; the mean over the classes."""

    alpha: Share = 0.1

    @property
    def of_classes(self) -> bool:  # type: ignore[override]
        """As the hard loss does."""
        return self.needs_labels

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.logit_mse`."""
        return losses.logit_mse(student.logits, teacher.logits)


@dataclass(frozen=True)
class TTM(SoftLoss):
    """Transformed teacher matching: Zheng and Yang (2024), https://arxiv.org/abs/2402.11148. gamma: 1/T, of the
    teacher alone.
    """

    alpha: Share = 0.1
    gamma: Temperature = 0.1

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.ttm`."""
        return losses.ttm(student.logits, teacher.logits, gamma=self.gamma)


@dataclass(frozen=True)
class WTTM(SoftLoss):
    """`TTM` with each example weighted by how uncertain its teacher is: Zheng and Yang (2024),
    https://arxiv.org/abs/2402.11148. gamma: 1/T.
    """

    alpha: Share = 0.1
    gamma: Temperature = 0.1

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.wttm`."""
        return losses.wttm(student.logits, teacher.logits, gamma=self.gamma)


@dataclass(frozen=True)
class TopKKL(SoftLoss):
    """KL by the teacher's k largest classes, discussed by Anshumann et al. (2025), https://arxiv.org/abs/2503.16870.

    rest: `tail` (one bucket), `renormalised` or `zero`. A teacher whose most probable classes were kept, k of them at
    least, needs no others.
    """

    alpha: Share = 0.1
    k: Annotated[int, Bounds(1)] = static(64)
    temperature: Temperature = 1.0
    rest: str = "tail"

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.top_k_kl`, or `kd.losses.top_k_targets`."""
        known = teacher.features
        if LOG_REST in known:
            return losses.top_k_targets(
                student.logits, known[CLASSES], known[LOG_PROBABILITIES], known[LOG_REST],
                k=self.k, temperature=self.temperature, rest=self.rest,
            )  # fmt: skip
        return losses.top_k_kl(student.logits, teacher.logits, k=self.k, temperature=self.temperature, rest=self.rest)

    def check_sparse(self, sparse: Sparse) -> None:
        """Raises `MethodError` where more is asked for than is known."""
        more = self.k if self.k > sparse.number else None
        require_kind(self, sparse, "top-k", "k", more, 1 if self.rest == "renormalised" else self.temperature)


@dataclass(frozen=True)
class SampledKL(Method):
    """Random-sampling KD (RS-KD): Anshumann et al. (2025), https://arxiv.org/abs/2503.16870. KL by classes drawn from
    the teacher, anew in each step; on average its gradient is that of `kd`, which no top-k's is. A teacher of whom
    draws were kept says its own, of the same number and power; the term is then the cross entropy with them, and at
    temperature 1.

    samples: drawn with replacement. power: what the teacher's probabilities are raised to before. hard: the weight of
    the cross entropy.
    """

    samples: Annotated[int, Bounds(1)] = static(50)
    power: Temperature = 1.0
    temperature: Temperature = 1.0
    hard: Weight = 0.0
    of_classes: ClassVar[bool] = True

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Unless `hard` is 0."""
        return not is_zero(self.hard)

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """The key of the draws is carried."""
        return Parts((), stored_key(key))

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        taught = require_teacher(self, teacher)
        if WEIGHTS in taught.features:
            soft = losses.sampled_targets(student.logits, taught.features[CLASSES], taught.features[WEIGHTS])
        else:
            soft = losses.sampled_kl(
                student.logits, taught.logits, key=step_key(parts.carried, step),
                samples=self.samples, power=self.power, temperature=self.temperature,
            )  # fmt: skip
        return {**hard_term(self, self.hard, student, batch), "soft": soft}

    def check_sparse(self, sparse: Sparse) -> None:
        """Raises `MethodError` for other draws than were kept."""
        other = None if self.samples == sparse.number else self.samples
        require_kind(self, sparse, "samples", "samples", other, self.temperature)
        if not isinstance(self.power, jax.core.Tracer) and np.any(np.asarray(self.power) != sparse.power):
            raise MethodError(
                f"the power of SampledKL is {self.power}, and the teacher's draws have {sparse.power:g}: give the same"
            )


@dataclass(frozen=True)
class ULD(BesideHard):
    """Universal logit distillation, between vocabularies: Boizard et al. (2024), https://arxiv.org/abs/2402.12030.

    The teacher may have other classes, and another number of them. hard: the weight of the cross entropy. Usual weight:
    1.5, as `kd.CrossEntropy() + 1.5 * kd.ULD(hard=0)`. Positions of the two must be aligned before.
    """

    temperature: Temperature = 1.0
    hard: Weight = 1.0
    compares_logits: ClassVar[bool] = False

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """`kd.losses.uld`."""
        return losses.uld(student.logits, teacher.logits, temperature=self.temperature)


@dataclass(frozen=True)
class AlphaBeta(SoftLoss):
    """Alpha-beta divergence: ABKD, Wang et al. (2025), https://arxiv.org/abs/2505.04560.

    alpha, beta: the divergence's own. hard: the weight of the cross entropy, beside it.
    """

    alpha: Finite = 0.2
    beta: Finite = 0.7
    temperature: Temperature = 1.0
    hard: Weight = 0.0

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Unless `hard` is 0."""
        return not is_zero(self.hard)

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `soft`."""
        taught = require_teacher(self, teacher)
        soft = losses.alpha_beta(
            student.logits, taught.logits, alpha=self.alpha, beta=self.beta, temperature=self.temperature
        )
        return {**hard_term(self, self.hard, student, batch), "soft": soft}
