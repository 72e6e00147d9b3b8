"""Numbers of a method that change with the steps: schedules of any of them, and TAID's mixing."""

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError
from kd_jax.methods.base import Method, Parts, PyTree, Terms, Wrapped, as_method, terms_of, weighted
from kd_jax.methods.bounds import Share, Temperature, Weight
from kd_jax.methods.logits import hard_term, is_zero, require_teacher, rest
from kd_jax.methods.relations import example_weights
from kd_jax.methods.sparse import Sparse
from kd_jax.models import Output

Schedule = Callable[[Any], Any]
"""`schedule(steps done) -> number`, as optax has them."""


@dataclass(frozen=True)
class Scheduled(Wrapped):
    """A method some of whose numbers follow schedules; `scheduled` makes it."""

    method: Method
    names: tuple[str, ...]
    schedules: tuple[Schedule, ...]

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """As the method, with any number where a schedule stands."""
        return bool(self._with([float("nan")] * len(self.names)).needs_labels)

    def loss(
        self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Terms, PyTree]:
        """The method's terms with its numbers of this step."""
        return terms_of(self.at(step), parts, student, teacher, batch, step)

    def check_sparse(self, sparse: Sparse) -> None:
        """Raises `MethodError` for a schedule of what the part of the classes that is known is fixed at."""
        fixed = [
            name for name in ("temperature", "power") if name in self.names and hasattr(self.method, "check_sparse")
        ]
        if fixed and getattr(self.method, "rest", None) != "renormalised":
            raise MethodError(
                f"the {fixed[0]} of {type(self.method).__name__} follows a schedule, and the teacher knows {sparse} at "
                "one alone: leave the schedule out, or take a teacher of all classes"
            )

    def at(self, step: Int[Array, ""]) -> Method:
        """The method with its numbers of this step."""
        done = step.astype(jnp.float32)
        return self._with([jnp.asarray(schedule(done), jnp.float32) for schedule in self.schedules])

    def _with(self, values: list[Any]) -> Any:
        return dataclasses.replace(self.method, **dict(zip(self.names, values, strict=True)))  # type: ignore[type-var]


def scheduled(method: Method, **schedules: Any) -> Scheduled:
    """The method with numbers that follow schedules `steps done -> number`, by name, say those of optax.

    `kd.scheduled(kd.KD(), temperature=optax.linear_schedule(8, 2, 1000))`; of a weight, `kd.scheduled(100 *
    kd.FitNet("hint"), factor=optax.linear_schedule(0, 100, 500))`. Raises `MethodError` for a name that is no number
    of the method.
    """
    method = as_method(method)
    fields: Any = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    known = [
        field.name for field in fields
        if len(jax.tree.leaves(getattr(method, field.name))) == 1 and not field.metadata.get("static")
        and not isinstance(getattr(method, field.name), str | bool | Method)
    ]  # fmt: skip
    for name, schedule in schedules.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            has = f"did you mean {close[0]}?" if close else f"it has {', '.join(known) or 'none'}"
            raise MethodError(f"{name} is no number of {type(method).__name__} that can follow a schedule: {has}")
        if not callable(schedule):
            raise MethodError(f"the schedule of {name} is {schedule!r}: give a function of the steps done")
    return Scheduled(method, tuple(schedules), tuple(schedules.values()))


@dataclass(frozen=True)
class TAID(Method):
    """TAID: Shing et al. (2025), https://arxiv.org/abs/2501.16937. KL to a mixture that moves to the teacher.

    The target is the softmax of (1 − t) z_s + t z_t, the student's logits without a gradient. steps: of the whole
    training. t is at least on the line from start to end over them. In each step it rises by
    rate · sigmoid(m) · (1 − t), m being the momentum (the share of the old one) of the loss's relative fall; at rate 0
    it stays on the line. The loss is the KL of the whole batch; public code takes the cross entropy. hard: the weight
    of the cross entropy of the labels.
    """

    steps: Temperature
    start: Share = 0.4
    end: Share = 1.0
    rate: Weight = 5e-4
    momentum: Share = 0.99
    temperature: Temperature = 1.0
    hard: Weight = 0.0
    of_classes: ClassVar[bool] = True

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Unless `hard` is 0."""
        return not is_zero(self.hard)

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """t, the momentum, and the loss of the step before, infinite where there was none."""
        start = jnp.asarray(self.start, jnp.float32)
        return Parts((), {"t": start, "momentum": jnp.zeros_like(start), "loss": jnp.full_like(start, jnp.inf)})

    def loss(
        self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Terms, PyTree]:
        """Two terms, `hard` with its weight, and `soft`; and t of the next step."""
        taught, known = require_teacher(self, teacher), parts.carried
        ours = jax.lax.stop_gradient(student.logits).astype(jnp.float32)
        t = known["t"]
        mixed = weighted(rest(t), ours) + weighted(t, taught.logits.astype(jnp.float32))
        soft = losses.kd(student.logits, mixed, temperature=self.temperature)
        now = jax.lax.stop_gradient(_mean(soft, batch)).astype(jnp.float32)
        return {**hard_term(self, self.hard, student, batch), "soft": soft}, self._after(known, now, step)

    def _after(self, known: Any, now: Array, step: Int[Array, ""]) -> Any:
        start, end, rate, share, steps = (
            jnp.asarray(number, jnp.float32) for number in (self.start, self.end, self.rate, self.momentum, self.steps)
        )
        first = jnp.isinf(known["loss"])
        fall = (known["loss"] - now) / (known["loss"] + 1e-15)
        momentum = jnp.where(
            first, known["momentum"], share * known["momentum"] + (1 - share) * jnp.where(first, 0, fall)
        )
        line = start + (end - start) * (step + 1).astype(jnp.float32) / steps
        ahead = known["t"] + jnp.where(first, 0, rate * jax.nn.sigmoid(momentum) * (1 - known["t"]))
        return {"t": jnp.minimum(end, jnp.maximum(line, ahead)), "momentum": momentum, "loss": now}


def _mean(values: Array, batch: Batch) -> Array:
    """The mean over the batch, by its weights."""
    weights = batch.weights
    if weights is None:
        return jnp.mean(values)
    if jnp.ndim(weights) < values.ndim:
        values = jnp.mean(values, axis=tuple(range(jnp.ndim(weights), values.ndim)))
    share = jnp.asarray(weights, values.dtype) if jnp.ndim(weights) == values.ndim else example_weights(batch)
    total = jnp.sum(share)
    return jnp.sum(jnp.where(share == 0, 0, share * values)) / jnp.where(total == 0, 1, total)
