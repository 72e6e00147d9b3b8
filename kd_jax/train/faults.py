"""Whether a teacher or a schedule is why a training is not finite: looked at when it is too late, at no cost before."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kd_jax.data.batch import Batch, check_counts, take
from kd_jax.data.mixing import prepared
from kd_jax.errors import NotFiniteError
from kd_jax.methods import Method, Parts
from kd_jax.methods.bounds import bounds_of, walk
from kd_jax.methods.schedules import Scheduled
from kd_jax.models import Output
from kd_jax.teacher import Teacher
from kd_jax.train.step import all_terms, fit_labels

PyTree = Any

# So many examples are asked about.
_MOST = 1000


def check_teacher(method: Method, data: Batch, teacher: Teacher | None, prepare: Any) -> None:
    """Raises `NotFiniteError` where inputs or a teacher's logits are not finite, or so low that the method is not.

    data: one batch, or all examples, of which the first are looked at.
    """
    count = check_counts(data)
    weights = np.ones(count) if data.weights is None else np.asarray(data.weights).reshape(count, -1).any(axis=-1)
    rows = jnp.asarray(np.flatnonzero(weights)[:_MOST])
    batch = take(jax.tree.map(jnp.asarray, data), rows)
    _check_inputs(batch.inputs, rows)
    if teacher is None:
        return
    batch = prepared(prepare, batch, jax.random.key(0))
    for said in teacher.take(rows).outputs(batch.inputs):
        logits = np.asarray(said.logits, np.float32)
        if np.isnan(logits).any() or np.isposinf(logits).any():
            kind = "NaN" if np.isnan(logits).any() else "infinite"
            raise NotFiniteError(
                f"the teacher's logits are {kind} on the training data, and so is the loss: look at its parameters, "
                "whether it gets its inputs as it was trained on them, and whether images are too small for its pools"
            )
        if np.isneginf(logits).any() and not _is_finite(method, batch, said):
            raise NotFiniteError(
                f"the teacher rules classes out (its logits are -inf), where {type(method).__name__} is not finite: "
                'give logits of all classes (kd.from_top_k(…, rest="uniform")), or take another method such as kd.KD()'
            )


def check_schedules(method: Method, steps: Sequence[int]) -> None:
    """Raises `NotFiniteError` where a schedule gives a number out of its bounds after so many `steps`."""
    done = jnp.asarray(steps, jnp.float32)
    for one in (one for one in walk(method) if isinstance(one, Scheduled)):
        for name, schedule in zip(one.names, one.schedules, strict=True):
            bounds = bounds_of(one.method, name)
            values = np.asarray(jax.vmap(lambda done, of=schedule: jnp.asarray(of(done), jnp.float32))(done))
            wrong = [place for place, value in enumerate(values) if not bounds.hold(float(value))]
            if wrong:
                first = wrong[0]
                raise NotFiniteError(
                    f"the {name} of {type(one.method).__name__} is {values[first]:g} by its schedule after "
                    f"{steps[first]:,} steps, and the loss is not finite there: it must be {bounds}"
                )


def _check_inputs(inputs: PyTree, rows: Int[Array, " examples"]) -> None:
    """Raises `NotFiniteError` for inputs that are NaN or infinite; -inf may be a mask."""
    for leaf in jax.tree.leaves(inputs):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            values = np.asarray(leaf, np.float32).reshape(leaf.shape[0], -1)
            for kind, wrong in (("NaN", np.isnan(values)), ("infinite", np.isposinf(values))):
                examples = wrong.any(axis=-1)
                if examples.any():
                    raise NotFiniteError(
                        f"the inputs of example {int(rows[int(examples.argmax())])} are {kind}, and so is the loss: "
                        "mend them, or give that example the weight 0"
                    )


def _is_finite(method: Method, batch: Batch, taught: Output) -> bool:
    """Whether the loss of a student that knows nothing is; True where that cannot be said."""
    student = Output(jnp.zeros(taught.logits.shape, jnp.float32))
    with contextlib.suppress(Exception):
        terms, _ = all_terms(method, Parts(), student, (taught,), fit_labels(batch, student.logits), jnp.int32(0))
        return all(bool(jnp.isfinite(values).all()) for values in terms.values())
    return True
