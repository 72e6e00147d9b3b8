"""What methods read of a teacher of whom a part of the classes alone is known."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from kd_jax.errors import MethodError
from kd_jax.methods.base import Method, Scalar, Sum, Wrapped
from kd_jax.methods.bounds import walk

CLASSES, LOG_PROBABILITIES, LOG_REST, WEIGHTS = (
    f"known.{name}" for name in ("classes", "log_probabilities", "log_rest", "weights")
)
"""The features by which such a teacher says what it knows."""


class Sparse(NamedTuple):
    """How much of the classes a teacher knows.

    keep: "top-k", with what the others sum to, or "samples". number: k, or the number of draws. power: of the draws.
    """

    keep: str
    number: int
    power: float = 1.0

    def __str__(self) -> str:
        """In words."""
        if self.keep == "top-k":
            return f"the {self.number} most probable classes of each example or position"
        return f"{self.number} draws of classes for each example or position"


def check_sparse(method: Method, sparse: Sparse) -> None:
    """Raises `MethodError` where a method needs more of the classes than a teacher knows.

    A method that reads the part that is known has `check_sparse`, a function of a `Sparse`.
    """
    for one in walk(method):
        own: Callable[[Sparse], None] | None = getattr(one, "check_sparse", None)
        if own is not None:
            own(sparse)
        elif not isinstance(one, Sum | Wrapped) and (
            one.compares_logits or (one.needs_teacher and not one.teacher_features)
        ):
            raise needs_all(one, sparse)


def require_kind(method: Method, sparse: Sparse, keep: str, name: str, count: Any, temperature: Scalar) -> None:
    """Raises `MethodError` for a teacher of another kind, another number, or a temperature that is not 1.

    name: of the number. temperature: 1 itself where any will do.
    """
    if sparse.keep != keep:
        raise needs_all(method, sparse)
    kind = type(method).__name__
    if count is not None:
        raise MethodError(f"{name} of {kind} is {count}, and the teacher knows {sparse}: give the same number")
    if not isinstance(temperature, jax.core.Tracer) and np.any(np.asarray(temperature) != 1):
        raise MethodError(
            f"the temperature of {kind} is {float(np.ravel(np.asarray(temperature))[0]):g}, and the teacher knows "
            f"{sparse} at temperature 1: give temperature=1, or a teacher of all classes"
        )


def needs_all(method: Method, sparse: Sparse) -> MethodError:
    """The error for a method that reads all logits."""
    fitting = "kd.TopKKL" if sparse.keep == "top-k" else "kd.SampledKL"
    also = ', or keep them with rest="uniform"' if sparse.keep == "top-k" else ""
    return MethodError(
        f"{type(method).__name__} needs the logits of all classes, and the teacher knows {sparse}: take "
        f"{fitting}{also}, or a teacher of all classes"
    )
