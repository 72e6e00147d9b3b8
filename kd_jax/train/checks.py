"""What a training asks of its data, method, model and teacher before anything is compiled."""

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax.data.batch import Batch, check_counts, check_values, check_whole, epoch_order, take
from kd_jax.data.mixing import mixes, prepared
from kd_jax.errors import ConfigError, DataError, FeatureError, MethodError, ShapeError
from kd_jax.files.names import path_name
from kd_jax.losses.softmax import in_training
from kd_jax.methods import Method, SimKD, check_rows, is_on_policy, resampled
from kd_jax.methods.base import Parts, Sum, Wrapped, as_parts
from kd_jax.methods.bounds import check_numbers, walk
from kd_jax.methods.contrastive import check_memory
from kd_jax.methods.sparse import check_sparse
from kd_jax.models import Model, Output
from kd_jax.models.compiled import hashable
from kd_jax.models.trying import CALL, PREPARE, reason, told
from kd_jax.models.vocabulary import check_tokens
from kd_jax.teacher import LiveTeacher, SeveralTeachers, Teacher
from kd_jax.train.matches import (
    check_mean,
    check_same_outputs,
    check_several_labels,
    known_vocabularies,
    label_classes,
    unfit_student,
    unfit_teacher,
    unneeded_labels,
    warn_of_views,
)
from kd_jax.train.measures import Measure
from kd_jax.train.step import Training, all_terms, as_optimized, fit_labels, student_output, weighted_sum

PyTree = Any

_RESERVED = ("accuracy", "examples", "seconds")  # what a history has beside the terms


class Checked(NamedTuple):
    """What is known before anything is compiled: the shapes of the student's output on a batch, and the terms."""

    student: Output
    terms: tuple[str, ...]


def make_training(
    model: Model, optimizer: Any, *, prepare: Any = None, measures: Mapping[str, Measure] | None = None,
    dtype: Any = None,
) -> Training:  # fmt: skip
    """What is compiled. Raises `ConfigError` for an optimiser that is none, or a type that is none of floats."""
    if not isinstance(optimizer, optax.GradientTransformation):
        said = repr(optimizer) if len(repr(optimizer)) < 60 else f"of the type {type(optimizer).__name__}"
        raise ConfigError(f"optimizer is {said}: give an optax.GradientTransformation such as optax.adamw(1e-3)")
    if dtype is not None:
        try:
            known = jnp.dtype(dtype)
        except TypeError:
            raise ConfigError(f"dtype is {dtype!r}: give a type of floats such as jnp.bfloat16") from None
        if not jnp.issubdtype(known, jnp.floating):
            raise ConfigError(f"dtype is {known}: give a type of floats such as jnp.bfloat16")
    if prepare is not None and not callable(prepare):
        raise ConfigError(f"prepare is {prepare!r}: give a function prepare(key, inputs, train) of the inputs")
    return Training(model.network, optimizer, hashable(prepare), tuple((measures or {}).items()), dtype)


def check(
    training: Training, method: Method, data: Batch, teacher: Teacher | None, start: PyTree, *, batch_size: Any
) -> Checked:
    """What is known of a training on in-memory data.

    Raises `MethodError`, `ConfigError` or `DataError` where data, method, model and teacher do not go together.
    """
    count = check_counts(data)
    check_epochs(batch_size, "batch_size")
    # The same refusals as when the order is drawn, before anything else is done.
    jax.eval_shape(lambda key: epoch_order(key, 0, examples=count, batch_size=batch_size), jax.random.key(0))
    if teacher is not None and teacher.examples is not None and teacher.examples != count:
        raise ConfigError(
            f"there are {count} examples and the teacher's outputs of {teacher.examples}: give its outputs of every "
            "example, in the examples' order"
        )
    if teacher is not None:
        teacher.check_inputs(data.inputs)
    if is_on_policy(method) and training.prepare is None:
        check_rows(data)
    check_memory(method, data)
    found = check_batch(training, method, *first_batch(data, teacher, batch_size), start)
    for sizes in known_vocabularies(training, start, teacher):
        check_tokens(sizes, data.inputs, data.weights)
    check_values(data, label_classes(method, found.student.logits.shape[-1]), **float_labels(method))
    return found


def check_batch(training: Training, method: Method, batch: Batch, teacher: Teacher | None, start: PyTree) -> Checked:
    """As `check`, of one batch, whose shapes are enough; values are not looked at."""
    check_numbers(method)
    if method.needs_teacher and teacher is None:
        raise MethodError(
            f"{type(method).__name__} needs a teacher, and none was given: give one, or train with kd.CrossEntropy()"
        )
    if method.needs_labels and batch.labels is None:
        raise MethodError(
            f"{type(method).__name__} needs labels, and the data has none: give kd.Batch(inputs, labels), or a method "
            "of the teacher alone such as kd.KD(alpha=0)"
        )
    if teacher is not None and teacher.sparse is not None:
        check_sparse(method, teacher.sparse)
    key = jax.random.key(0)
    prepare = training.prepare
    if mixes(prepare) and teacher is not None and teacher.per_example:
        raise ConfigError(
            "prepare mixes examples, and the teacher's outputs are kept for each example as it is: give the teacher "
            "itself, which then sees the mixed ones"
        )
    if is_on_policy(method) and teacher is not None and teacher.per_example:
        raise ConfigError(
            "the student writes sequences of its own, and the teacher's outputs are kept for each example as it is: "
            "give the teacher itself"
        )
    seen = batch
    if prepare is not None:
        seen = _tried("prepare", batch.inputs, lambda batch: prepared(prepare, batch, key), batch, remedy=PREPARE)
        warn_of_views(prepare, batch, teacher)
    inputs = seen.inputs

    def ask(inputs: PyTree, variables: PyTree) -> tuple[Output, PyTree, PyTree]:
        variables = training.network.init(key) if variables is None else variables
        return *student_output(training, method, variables, inputs, key), training.network.split(variables)[1]

    def own(batch: Batch, variables: PyTree) -> Batch:
        variables = training.network.init(key) if variables is None else variables
        return resampled(method, key, training.network, variables, batch, jnp.int32(0))

    if is_on_policy(method):
        seen = _tried("the student", inputs, own, seen, start)
        inputs = seen.inputs
    try:
        student, after, before = _tried("the student", inputs, ask, inputs, start)
    except FeatureError as error:
        raise unfit_student(method, error) from None
    _check_output("the student", student, batch)
    check_mean(method, teacher, student.logits.shape[-1])
    _check_carried(before, after)
    softmax = next((type(one).__name__ for one in walk(method) if one.of_classes), None)
    if softmax is not None and student.logits.shape[-1] == 1:
        raise MethodError(
            f"the student has 1 output, and {softmax} takes a softmax over the classes, which is 1 whatever it says: "
            "give an output for each class, or a loss of sigmoids such as kd.losses.binary_kd, or one of your own"
        )
    taught: tuple[Output, ...] = ()
    if teacher is not None:
        try:
            taught = _tried(
                "the teacher", inputs,
                lambda inputs, teacher: teacher.outputs(inputs, features=method.teacher_features), inputs, teacher,
            )  # fmt: skip
        except FeatureError as error:
            raise unfit_teacher(method, error) from None
        for one in taught:
            _check_output("the teacher", one, batch)
            check_same_outputs(method, student, one)
    check_several_labels(method, seen, student)
    fitted = jax.eval_shape(fit_labels, seen, student.logits)
    try:
        terms = _check_loss(training, method, fitted, student, taught, start)
    except (MethodError, ShapeError) as error:
        if fitted.labels is not None and not method.needs_labels:
            with contextlib.suppress(ConfigError, DataError):
                _check_loss(training, method, fitted._replace(labels=None), student, taught, start)
                error = unneeded_labels(method, error)
        if mixes(prepare) and method.needs_labels:
            whole = jax.eval_shape(fit_labels, batch._replace(inputs=inputs), student.logits)
            _check_loss(training, method, whole, student, taught, start)
            raise MethodError(
                f"{type(method).__name__} takes whole numbers as labels, and those of mixed examples are soft: take a "
                "method of soft labels such as kd.KD(), or leave mixup and cutmix out"
            ) from None
        raise error from error.__cause__
    _warn_of_outputs(method)
    return Checked(student, terms)


def _check_output(who: str, output: Output, batch: Batch) -> None:
    shape, examples = output.logits.shape, jax.tree.leaves(batch.inputs)[0].shape[0]
    if len(shape) < 2 or shape[0] != examples:
        raise ConfigError(
            f"{who} gives logits of the shape {shape} for {examples} examples: they must have the shape "
            f"({examples}, …, classes), with an axis of 1 for one output"
        )


def _check_carried(before: PyTree, after: PyTree) -> None:
    """Raises `ConfigError` for a state that is another kind of thing after a call than before it."""
    old, new = (
        {path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree.leaves_with_path(state)}
        for state in (before, after)
    )
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    structures: list[Any] = [jax.tree.structure(state) for state in (before, after)]
    if not changed and structures[0] != structures[1]:
        raise ConfigError(
            "the student's state has another structure after a call in training than before it: return it in the same "
            "containers"
        )
    if changed:
        name = changed[0]
        raise ConfigError(
            f"the student's state {name or 'itself'} is {old.get(name, 'nothing')} before a call in training and "
            f"{new.get(name, 'nothing')} after it: keep its type and shape, and begin with what a call leaves there"
        )


def _check_loss(
    training: Training, method: Method, batch: Batch, student: Output, taught: tuple[Output, ...], start: PyTree
) -> tuple[str, ...]:
    """The terms of the loss. Whether it, the measures and the optimiser can be computed at all."""
    key, name = jax.random.key(0), type(method).__name__

    def made(method: Method) -> Parts:
        return as_parts(method.init(key, student, taught[0] if taught else None), method)

    # The method is an argument, as in a step: its numbers are traced there.
    numbers = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), method)
    parts = _tried_loss(name, batch, student, made, numbers)

    def loss(method: Method, parts: PyTree, student: Output, taught: tuple[Output, ...], batch: Batch) -> Any:
        terms = all_terms(method, parts, student, taught, batch, jnp.int32(0))[0]
        return weighted_sum(terms, batch.weights), terms

    terms = tuple(_tried_loss(name, batch, student, loss, numbers, parts, student, taught, batch)[1])
    own = dict(training.measures)
    for term in terms:
        if term in (*_RESERVED, *own) or (term == "loss" and len(terms) > 1):
            raise MethodError(
                f"a term of {name} is called {term}, which is the name of something else in a history: give it another"
            )
    for measure, function in own.items():
        try:
            jax.eval_shape(function, student, batch, taught)
        except Exception as error:
            if batch.labels is None and measure in _RESERVED:
                raise DataError(
                    "a batch has no labels, and one before it has: give labels in all batches (-1 where there is none) "
                    "or in none"
                ) from None
            raise ConfigError(
                f"the measure {measure} cannot be computed ({reason(error)}): inside a step it is a function "
                "(student's output, batch, teachers' outputs) -> values"
            ) from error
    variables = jax.eval_shape(training.network.init, key) if start is None else start
    trained = as_optimized(training.network.split(variables)[0], parts.learned)
    for path, leaf in jax.tree.leaves_with_path(trained):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ConfigError(
                f"the parameter {path_name(path)} is {jnp.result_type(leaf)}, which has no gradient: give floats, or "
                "keep it in the state, or in the function itself"
            )

    def update(trained: PyTree) -> Any:
        optimizer = optax.with_extra_args_support(training.optimizer)
        return optimizer.update(trained, optimizer.init(trained), trained, value=jnp.float32(0))

    try:
        jax.eval_shape(update, trained)
    except Exception as error:
        raise ConfigError(
            f"the optimizer cannot update these parameters ({reason(error)}): give one that needs gradients, "
            "parameters and the loss alone"
        ) from error
    return terms


def check_not_own(model: Model, teacher: Teacher | None) -> None:
    """Raises `ConfigError` where a student is its teacher, or one of several, itself."""
    for one in teacher.teachers if isinstance(teacher, SeveralTeachers) else (teacher,):
        if isinstance(one, SeveralTeachers):
            check_not_own(model, one)
        if not isinstance(one, LiveTeacher) or model.variables is None:
            continue
        module, same = model.origin and model.origin(), one.variables is model.variables
        if (same and one.network == model.network) or (module is not None and one.origin and one.origin() is module):
            raise ConfigError("the student is its teacher's own object: give another model, or a copy (nnx.clone)")


def float_labels(method: Method) -> dict[str, bool]:
    """What float labels must be for a method, as `check_values` asks: probabilities of the classes, several labels."""
    needing = [one for one in walk(method) if one.needs_labels]
    return {"soft": any(one.of_classes for one in needing), "several": any(one.of_sigmoids for one in needing)}


def _warn_of_outputs(method: Method) -> None:
    """Methods of features alone train no layer behind these; SimKD needs none, for its last one is the teacher's."""
    of_features = all(one.student_features and not isinstance(one, SimKD) for one in walk(method))
    if of_features and not (method.compares_logits or method.needs_labels):
        name = next(type(one).__name__ for one in walk(method) if not isinstance(one, Sum | Wrapped))
        warnings.warn(
            f"the method compares features alone, so nothing trains the layers behind them: add a method of logits, "
            f"kd.KD() + kd.{name}(…), unless that comes after",
            stacklevel=4,
        )


def check_epochs(epochs: Any, name: str = "epochs") -> None:
    """Raises `ConfigError` unless `epochs` is a whole number of at least 1."""
    check_whole(epochs, name)


def first_batch(data: Batch, teacher: Teacher | None, batch_size: int) -> tuple[Batch, Teacher | None]:
    """The shapes of a batch, and of what the teacher knows of it."""
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return jax.eval_shape(take, jax.tree.map(jnp.asarray, data), rows), teacher and teacher.shapes(batch_size)


def _tried_loss(name: str, batch: Batch, student: Output, function: Any, *arguments: Any) -> Any:
    try:
        with in_training():
            return jax.eval_shape(function, *arguments)
    except (ConfigError, DataError):
        raise
    except Exception as error:
        if isinstance(error, jax.errors.JAXTypeError | jax.errors.JAXIndexError) or "Tracer" in str(error):
            raise MethodError(
                f"the loss of {name} needs the value of a number while it is compiled ({reason(error)}): mark a field "
                "that shapes or conditions depend on, as width: int = kd.static(128), or use jnp.where"
            ) from error
        labels = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(batch.labels)) or "none"
        remedy = "mend the loss, or give labels as it takes them"
        if isinstance(error, KeyError):
            remedy = f"name the features that it reads in student_features and teacher_features, or {remedy}"
        elif ".loss() " in str(error):
            remedy = "define loss(self, parts, student, teacher, batch, step)"
        raise MethodError(
            f"the loss of {name} cannot be computed with logits of {list(student.logits.shape)} and labels of {labels} "
            f"({reason(error)}): {remedy}"
        ) from error


def _tried(who: str, inputs: PyTree, function: Any, *arguments: Any, remedy: str = CALL) -> Any:
    """The shapes of a result; what a model raises is told in one sentence, with what it was given."""
    with told(who, inputs, remedy):
        return jax.eval_shape(function, *arguments)
