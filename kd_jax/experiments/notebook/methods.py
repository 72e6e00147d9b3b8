"""The methods that the notebook's commands know by name, its own mistake among them."""

from dataclasses import dataclass

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.methods import KD, KDWithoutTSquared
from kd_jax.methods.base import Scalar, Values
from kd_jax.methods.logits import SoftLoss
from kd_jax.models import Output


@dataclass(frozen=True)
class KDAsWritten(SoftLoss):
    """The reference notebook with its wrong use of `KLDivLoss`, for checking its numbers; without T²."""

    alpha: Scalar = 0.5
    temperature: Scalar = 20.0

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """What the notebook computed in place of a KL."""
        return losses.kd_as_written(student.logits, teacher.logits, temperature=self.temperature)


METHODS = {"kd": KD, "kd-without-t2": KDWithoutTSquared, "kd-as-written": KDAsWritten}
"""By the name that `--method` takes."""
