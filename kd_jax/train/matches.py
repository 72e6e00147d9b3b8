"""Whether a method, its student and its teachers belong together."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.data.batch import Batch
from kd_jax.data.mixing import prepared
from kd_jax.errors import ConfigError, FeatureError, MethodError, ShapeError
from kd_jax.methods import DML, FusedLinear, Method, SelfTaught, SimKD, is_fused
from kd_jax.methods.base import LossFunction, Sum, Wrapped
from kd_jax.methods.bounds import walk
from kd_jax.methods.moving_average import AVERAGE
from kd_jax.methods.simkd import PROJECTED
from kd_jax.models import Output
from kd_jax.models.heads import HIDDEN
from kd_jax.models.vocabulary import vocabulary_sizes
from kd_jax.teacher import LiveTeacher, SeveralTeachers, Teacher
from kd_jax.train.step import Training

PyTree = Any


def check_same_outputs(method: Method, student: Output, teacher: Output) -> None:
    """Raises `ConfigError` where a method compares logits and they are not of the same shape."""
    ours, theirs = student.logits.shape, teacher.logits.shape
    if not method.compares_logits or ours == theirs:
        return
    if ours[:-1] == theirs[:-1]:
        other = ", or for two vocabularies a method such as kd.ULD()" if len(ours) > 2 else ""
        raise ConfigError(
            f"the teacher has {theirs[-1]} classes and the student {ours[-1]}: {type(method).__name__} needs the same "
            f"classes in both, in the same order{other}"
        )
    raise ConfigError(
        f"the teacher's logits have the shape {theirs} and the student's {ours}: {type(method).__name__} needs the same"
    )


def label_classes(method: Method, outputs: int) -> int | None:
    """How many classes a label may name: the outputs, or what is real of them where heads are padded. None for any."""
    if not method.needs_labels:
        return None
    real = [one.vocabulary for one in walk(method) if isinstance(one, FusedLinear) and one.vocabulary is not None]
    return min([outputs, *real])


def check_mean(method: Method, teacher: Teacher | None, outputs: int) -> None:
    """Raises `MethodError` for the mean of several teachers' softmaxes where their outputs are compared as they are."""
    if not isinstance(teacher, SeveralTeachers):
        return
    for one in teacher.teachers:
        check_mean(method, one, outputs)
    every = [one for one in walk(method) if not isinstance(one, Sum | Wrapped)]
    if outputs > 1:
        # A function says nothing of what it takes.
        every = [one for one in every if not isinstance(one, LossFunction)]
    raw = next((type(one).__name__ for one in every if one.compares_logits and not one.of_classes), None)
    if teacher.mean == "probabilities" and len(teacher.teachers) > 1 and raw:
        raise MethodError(
            f"the mean of the teachers is that of their probabilities, by a softmax over classes, and {raw} does not "
            'say that it takes one (of_classes): give kd.several(teachers, mean="logits") or mean="losses"'
        )


def check_several_labels(method: Method, batch: Batch, student: Output) -> None:
    """Raises `MethodError` for whole numbers, one for each output, where a method takes sigmoids of them."""
    labels, sigmoids = batch.labels, [type(one).__name__ for one in walk(method) if one.of_sigmoids]
    whole = hasattr(labels, "dtype") and jnp.issubdtype(labels.dtype, jnp.integer)
    if sigmoids and whole and labels.shape == student.logits.shape:
        raise MethodError(
            f"the labels are {labels.dtype}, one for each output, and whole numbers name classes elsewhere: give "
            f"{sigmoids[0]} floats, as labels.astype(float)"
        )


def warn_of_views(prepare: Any, batch: Batch, teacher: Teacher | None) -> None:
    """Warns where views are random, and the teacher's answers are kept, of the inputs as they are."""
    if teacher is None or not teacher.per_example:
        return
    program = jax.make_jaxpr(lambda key, batch: prepared(prepare, batch, key).inputs)(jax.random.key(0), batch)
    if any(program.jaxpr.invars[0] in equation.invars for equation in program.jaxpr.eqns):
        warnings.warn(
            "prepare draws random views, and the teacher's answers are kept, of the inputs as they are: give the "
            "teacher itself, which then sees the view that the student sees",
            stacklevel=5,
        )


_HEAD = (
    "has a linear layer last (an nnx.Linear, or nnx.Embed.attend) and nothing behind it: give one, or a model that "
    "returns kd.Output(logits, {'linear_head.hidden': …, 'linear_head.kernel': …})"
)

# What a student must be for a method, by the feature that others do not have.
_STUDENTS: dict[str, tuple[type[Method], str]] = {
    AVERAGE: (SelfTaught, "carries its average: give kd.with_average(student)"),
    PROJECTED: (SimKD, "ends in its teacher's classifier: give kd.with_classifier(student, teacher, inputs, …)"),
    HIDDEN: (FusedLinear, _HEAD),
    "members.0": (DML, "is a cohort: give kd.cohort([student, …])"),
}


def unfit_student(method: Method, error: FeatureError) -> ConfigError:
    """The error for a student without the feature that another kind of student has."""
    kind, needed = _STUDENTS.get(error.path, (None, ""))
    if kind is None or not any(isinstance(one, kind) for one in walk(method)):
        return error
    return MethodError(f"{kind.__name__} needs a student that {needed}")


def unfit_teacher(method: Method, error: FeatureError) -> ConfigError:
    """The error for a teacher without a head, where a method needs it."""
    if error.path != HIDDEN or not is_fused(method):
        return error
    return MethodError(f"FusedLinear needs a teacher that {_HEAD}, or is kept with kd.cached(…, keep='hidden')")


def unneeded_labels(method: Method, error: MethodError | ShapeError) -> MethodError | ShapeError:
    """The same error, of labels that do not fit a method which needs none."""
    return type(error)(f"{error}, or leave the labels out, as {type(method).__name__} needs none")


def known_vocabularies(training: Training, start: PyTree, teacher: Teacher | None) -> tuple[Mapping[str, int], ...]:
    """Of the student and of every teacher that answers in the step, of those that tell them.

    None are known where `prepare` may make other tokens. start: the student's variables, or None.
    """
    if training.prepare is not None:
        return ()
    live = [(one.network, one.variables) for one in _single(teacher) if isinstance(one, LiveTeacher)]
    return tuple(sizes for one in [(training.network, start), *live] if (sizes := vocabulary_sizes(*one)))


def _single(teacher: Teacher | None) -> list[Teacher | None]:
    if isinstance(teacher, SeveralTeachers):
        return [one for several in teacher.teachers for one in _single(several)]
    return [teacher]
