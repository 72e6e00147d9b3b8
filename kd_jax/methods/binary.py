"""Distillation of sigmoid outputs: two classes by one logit, or several labels at once."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError
from kd_jax.methods.base import Method, Parts, Terms, weighted
from kd_jax.methods.bounds import Share, Temperature
from kd_jax.methods.logits import is_left_out, is_zero, require_labels, require_teacher, rest
from kd_jax.models import Output


@dataclass(frozen=True)
class BinaryKD(Method):
    """KD of sigmoids, each output a label of its own: Hinton, Vinyals and Dean (2015), https://arxiv.org/abs/1503.02531.

    alpha: the weight of the hard loss, the cross entropy of the sigmoids; 1 − alpha that of T² KL. Both are sums over
    the outputs, where others take the mean. Labels are floats of the logits' shape, 0 or 1 or between, or truth values;
    for one output `[batch]` will do.
    """

    alpha: Share = 0.1
    temperature: Temperature = 4.0
    of_sigmoids: ClassVar[bool] = True

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Unless alpha is 0."""
        return not is_zero(self.alpha)

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` and `soft`, with their weights; at alpha 0 `soft` alone."""
        soft = losses.binary_kd(student.logits, require_teacher(self, teacher).logits, temperature=self.temperature)
        absent = is_left_out(self.alpha, batch)
        hard = {} if absent else {"hard": weighted(self.alpha, self._hard(student, batch))}
        return {**hard, "soft": weighted(rest(self.alpha), soft)}

    def _hard(self, student: Output, batch: Batch) -> Any:
        labels = require_labels(self, batch)
        # Truth values can be nothing else, where whole numbers may be meant to name classes.
        if not jnp.issubdtype(labels.dtype, jnp.floating) and labels.dtype != jnp.bool_:
            raise MethodError(
                f"the labels of BinaryKD are {labels.dtype}, which count classes elsewhere: give floats, 0 or 1 for "
                "each output, as labels.astype(float)"
            )
        return losses.binary_cross_entropy(student.logits, labels)
