"""A temperature that is learned against the student."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from kd_jax.data.batch import Batch
from kd_jax.methods.base import Parts, Terms
from kd_jax.methods.bounds import Finite, Share, Temperature, Weight
from kd_jax.methods.logits import KD, SoftLoss
from kd_jax.models import Output


@dataclass(frozen=True)
class CTKD(SoftLoss):
    """Curriculum temperature: Li et al. (2023), https://arxiv.org/abs/2211.16231. T = start + span · sigmoid(θ).

    θ is one number, learned by the student's optimiser with its gradient reversed: it makes the loss larger. T² is
    inside, so that it raises the temperature, as in the authors' code. alpha: the weight of the hard loss. reversal:
    the factor of the reversed gradient, after `warmup` steps in which it rises from 0 as half a cosine (10 epochs
    there). One public port has no reversal at all. An optimiser with weight decay pulls θ to 0.
    """

    alpha: Share = 0.1
    start: Temperature = 1.0
    span: Weight = 20.0
    reversal: Finite = 1.0
    warmup: Weight = 0

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """θ, which starts at 1."""
        return Parts(jnp.ones((), jnp.float32))

    def temperature_of(self, theta: Float[Array, ""]) -> Float[Array, ""]:
        """The temperature of what is learned, `state.learned` of a training."""
        start, span = (jnp.asarray(number, theta.dtype) for number in (self.start, self.span))
        return start + span * jax.nn.sigmoid(theta)

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Those of `KD` at the temperature."""
        theta = parts.learned
        steps = jnp.asarray(self.warmup, theta.dtype)
        done = jnp.where(steps > 0, jnp.minimum(step.astype(theta.dtype) / jnp.where(steps > 0, steps, 1), 1), 1)
        strength = jnp.asarray(self.reversal, theta.dtype) * (1 - jnp.cos(jnp.pi * done)) / 2
        # θ itself, with the derivative -strength.
        still = jax.lax.stop_gradient(theta)
        temperature = self.temperature_of(still - strength * (theta - still))
        return KD(self.alpha, temperature).loss(parts, student, teacher, batch, step)
