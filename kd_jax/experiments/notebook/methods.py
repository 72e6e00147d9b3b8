"""The methods that the notebook's commands know by name, its own mistake among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import ConfigError
from kd_jax.methods import KD, KDWithoutTSquared, Method, catalogue
from kd_jax.methods.base import Scalar, Values, as_parts, terms_of
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


METHODS: dict[str, type[KD | KDWithoutTSquared | KDAsWritten]] = {
    "kd": KD,
    "kd-without-t2": KDWithoutTSquared,
    "kd-as-written": KDAsWritten,
}
"""Those whose numbers are `--alpha` and `--temperature`."""


def known() -> dict[str, type[Method]]:
    """Every method by the name that `--method` takes."""
    others = {name: method for name, method in catalogue.named().items() if method not in METHODS.values()}
    return {**others, **METHODS}


def make(name: str, alpha: float, temperature: float, options: Sequence[str]) -> Method:
    """The method of a configuration. Raises `ConfigError`."""
    if name in METHODS:
        if options:
            raise ConfigError(f"--method-option is {options[0]}: the numbers of {name} are --alpha and --temperature")
        return METHODS[name](alpha, temperature)
    return catalogue.make(name, known()[name], options)


def check(method: Method, name: str, classes: int) -> None:
    """Raises `ConfigError` where a method cannot be trained on labelled images by its logits alone."""
    if method.student_features:
        raise ConfigError(
            f"--method is {name}, which compares features, and the command knows logits alone: train with kd.distill "
            "from Python"
        )
    output = jax.ShapeDtypeStruct((2, classes), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)

    def loss(logits: Any, labels: Any) -> Any:
        both = Output(logits), Output(logits)
        parts = as_parts(method.init(jax.random.key(0), *both), method)
        return terms_of(method, parts, *both, Batch(logits, labels), jnp.int32(0))

    try:
        jax.eval_shape(loss, output, labels)
    except ValueError as error:
        raise ConfigError(f"--method is {name}: {error}") from None
