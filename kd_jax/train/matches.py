"""Whether a method, its student and its teachers belong together."""

from kd_jax.errors import ConfigError, FeatureError, MethodError, ShapeError
from kd_jax.methods import DML, Method, SelfTaught, SimKD
from kd_jax.methods.base import Sum, Wrapped
from kd_jax.methods.bounds import walk
from kd_jax.methods.moving_average import AVERAGE
from kd_jax.methods.simkd import PROJECTED
from kd_jax.models import Output
from kd_jax.teacher import SeveralTeachers, Teacher


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


def check_mean(method: Method, teacher: Teacher | None) -> None:
    """Raises `MethodError` for the mean of several teachers' softmaxes where their outputs are compared as they are."""
    if not isinstance(teacher, SeveralTeachers):
        return
    for one in teacher.teachers:
        check_mean(method, one)
    every = [one for one in walk(method) if not isinstance(one, Sum | Wrapped)]
    raw = next((type(one).__name__ for one in every if one.compares_logits and not one.of_classes), None)
    if teacher.mean == "probabilities" and len(teacher.teachers) > 1 and raw:
        raise MethodError(
            f"the mean of the teachers is that of their probabilities, by a softmax over classes, and {raw} does not "
            'say that it takes one (of_classes): give kd.several(teachers, mean="logits") or mean="losses"'
        )


# What a student must be for a method, by the feature that others do not have.
_STUDENTS: dict[str, tuple[type[Method], str]] = {
    AVERAGE: (SelfTaught, "carries its average: give kd.with_average(student)"),
    PROJECTED: (SimKD, "ends in its teacher's classifier: give kd.with_classifier(student, teacher, inputs, …)"),
    "members.0": (DML, "is a cohort: give kd.cohort([student, …])"),
}


def unfit_student(method: Method, error: FeatureError) -> ConfigError:
    """The error for a student without the feature that another kind of student has."""
    kind, needed = _STUDENTS.get(error.path, (None, ""))
    if kind is None or not any(isinstance(one, kind) for one in walk(method)):
        return error
    return MethodError(f"{kind.__name__} needs a student that {needed}")


def unneeded_labels(method: Method, error: MethodError | ShapeError) -> MethodError | ShapeError:
    """The same error, of labels that do not fit a method which needs none."""
    return type(error)(f"{error}, or leave the labels out, as {type(method).__name__} needs none")
