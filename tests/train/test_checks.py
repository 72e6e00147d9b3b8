"""What does not fit is told in one sentence, before anything is compiled."""

import inspect
import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import CNN, DATA, HOW, IMAGES, SGD, Residual, X, Y, net, teacher

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError, MethodError, ShapeError
from kd_jax.models import as_model, programs
from kd_jax.teacher import as_teacher
from kd_jax.train.checks import check_not_own

FLOAT_IMAGES = IMAGES.astype(np.float32)


class ForFloats(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.dtype != jnp.float32:
            raise TypeError(f"float32 is needed, not {x.dtype}")
        return self.head(x)


class Twice(ForFloats):
    def __call__(self, x: jax.Array) -> Any:
        return self.head(x), x


@dataclass(frozen=True)
class Unfinished(kd.Method):
    needs_teacher: ClassVar[bool] = False


def functional(apply: Callable[..., Any]) -> kd.Model:
    return kd.from_function(apply, {"w": jnp.ones((6, 4))})


class OfLabels(kd.Method):
    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def factor(self) -> Any:
        return 1.0

    def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
        return {"own": self.factor() * kd.losses.cross_entropy(student.logits, batch.labels)}


@dataclass(frozen=True)
class OfFeatures(kd.Method):
    def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
        return jnp.sum(student.features["hidden.0"], axis=-1)


@dataclass(frozen=True)
class Short(kd.Method):
    def loss(self, student: Any, teacher: Any, batch: Any) -> Any:  # type: ignore[override]
        return jnp.sum(student.logits, axis=-1)


def of_state(start: Any, after: Callable[..., Any]) -> kd.Model:
    """Outputs of the inputs alone, beside a state."""
    return kd.from_function(lambda p, state, x: (x @ p["w"], after(state, x)), {"w": jnp.ones((6, 4))}, state=start)


def tuple_of(state: Any, x: Any) -> Any:
    return tuple(state)


class Narrow(ForFloats):
    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs=rngs)
        self.mean = nnx.BatchStat(jnp.zeros(6, jnp.bfloat16))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.mean.set_value(jnp.mean(x, axis=0))
        return super().__call__(x)


@jax.tree_util.register_dataclass
@dataclass
class Called:
    weight: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight


class Unseeded(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.head, self.dropout = nnx.Linear(6, 4, rngs=rngs), nnx.Dropout(0.2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.head(x))


@dataclass(frozen=True)
class Wide(OfLabels):
    width: int = 2

    def factor(self) -> Any:
        return jnp.ones(self.width)[0]


@dataclass(frozen=True)
class If(OfLabels):
    weight: float = 2.0

    def factor(self) -> Any:
        return 2.0 if self.weight > 1 else 1.0


class Plain(OfLabels):
    def __init__(self, weight: float):
        self.weight, self.name = weight, "plain"

    def factor(self) -> Any:
        return self.weight


# Without the run-time types of the tests, which users do not have.
DISTILL, FIT, EARLY_STOPPING = map(inspect.unwrap, (kd.distill, kd.fit, kd.callbacks.early_stopping))


def distill(student: Any = None, taught: Any = None, data: Any = DATA, **named: Any) -> Any:
    return DISTILL(net() if student is None else student, taught, data, **(HOW | named))


def stream(data: Any, **named: Any) -> Any:
    return distill(data=data, batch_size=None, **named)


def trained_module() -> nnx.Module:
    return CNN(rngs=nnx.Rngs(0))


def student_is_teacher() -> Any:
    module = trained_module()
    return distill(module, module, kd.Batch(FLOAT_IMAGES, Y[:16]))


def its_own(pair: Callable[[Any], tuple[Any, Any]]) -> Any:
    return distill(*pair(trained_module()), kd.Batch(FLOAT_IMAGES, Y[:16]))


def student_among_teachers() -> Any:
    module = trained_module()
    return distill(module, [trained_module(), module], kd.Batch(FLOAT_IMAGES, Y[:16]))


W = np.ones(24, np.float32)
BAD: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "classes differ": (
        ConfigError,
        "the teacher has 7 classes and the student 4",
        lambda: distill(None, teacher(6, 7)),
    ),
    "one column": (ConfigError, "the teacher has 1 classes and the student 4", lambda: distill(None, teacher(6, 1))),
    "teacher without an axis": (
        ConfigError,
        r"the teacher gives logits of the shape \(8,\) for 8 examples",
        lambda: distill(None, lambda x: x[:, 0]),
    ),
    "student without examples": (
        ConfigError,
        r"the student gives logits of the shape \(1, 4\) for 8 examples",
        lambda: distill(functional(lambda p, x: jnp.mean(x @ p["w"], axis=0, keepdims=True))),
    ),
    "labels above": (
        DataError,
        "the label 4 is outside the 4 classes",
        lambda: distill(data=kd.Batch(X, np.where(Y == 3, 4, Y))),
    ),
    "labels below": (DataError, "the label -1 is outside", lambda: distill(data=kd.Batch(X, Y - 1))),
    "labels outside, of an iterator": (DataError, "the label -1 is outside", lambda: stream([(X, Y - 1)])),
    "labels one-hot of whole numbers": (
        ShapeError,
        r"the labels have the shape \(8, 4\) .*one-hot and soft labels must be floats",
        lambda: distill(data=kd.Batch(X, np.eye(4, dtype=np.int32)[Y])),
    ),
    **{
        f"labels as {kind}, of {type(method).__name__}": (
            ShapeError,
            says,
            lambda labels=labels, method=method: distill(None, teacher(), kd.Batch(X, labels), method=method),
        )
        for method in (kd.CrossEntropy(), kd.KD(), kd.KD(alpha=0.0), kd.LabelSmoothing(), kd.DKD())
        for kind, labels, says in (
            ("floats", Y.astype(np.float32), r"give labels.astype\(int\)"),
            ("a column of floats", Y[:, None].astype(np.float32), r"give labels\[..., 0\].astype\(int\)"),
            ("truth values", np.eye(4, dtype=bool)[Y], r"give labels.argmax\(-1\)"),
        )
    },
    "soft labels where whole numbers are needed": (
        ShapeError,
        r"labels are float32 \[8, 4\], and this takes whole numbers \[8\]: give labels.argmax\(-1\)",
        lambda: distill(None, teacher(), kd.Batch(X, np.eye(4, dtype=np.float32)[Y]), method=kd.DKD()),
    ),
    "validation by soft labels": (
        ConfigError,
        r"best is 'validation_accuracy', which needs labels of whole numbers, and the labels are float32 .*argmax",
        lambda: distill(validation=kd.Batch(X, np.eye(4, dtype=np.float32)[Y]), best="validation_accuracy"),
    ),
    "too few labels": (DataError, "24 examples and labels of 23", lambda: distill(data=kd.Batch(X, Y[:23]))),
    "no labels": (MethodError, "CrossEntropy needs labels, and the data has none", lambda: distill(data=kd.Batch(X))),
    "no labels for a function": (
        MethodError,
        "LossFunction needs labels",
        lambda: distill(None, teacher(), kd.Batch(X), method=lambda s, t, y: s[:, 0]),
    ),
    "a feature that does not exist": (
        ConfigError,
        "the feature 'convv' of the student does not exist: the nearest are 'conv'",
        lambda: distill(
            trained_module(), trained_module(), kd.Batch(FLOAT_IMAGES, Y[:16]), method=kd.FitNet("convv", "conv")
        ),
    ),
    "a teacher's feature that does not exist": (
        ConfigError,
        "the feature 'nor' of the teacher does not exist: the nearest are 'norm'",
        lambda: distill(
            trained_module(), trained_module(), kd.Batch(FLOAT_IMAGES, Y[:16]), method=kd.FitNet("conv", "nor")
        ),
    ),
    "the student its own teacher": (ConfigError, "its teacher's own object", student_is_teacher),
    "the student among its teachers": (ConfigError, "its teacher's own object", student_among_teachers),
    "a batch above the data": (
        DataError,
        "batch_size is 25: it must be at most the 24",
        lambda: distill(batch_size=25),
    ),
    "a batch of nothing": (ConfigError, "batch_size is 0: it must be a whole number", lambda: distill(batch_size=0)),
    "a batch of a half": (ConfigError, "batch_size is 2.5", lambda: distill(batch_size=2.5)),
    "no batch size": (ConfigError, "batch_size is missing", lambda: distill(batch_size=None)),
    "epochs of a half": (ConfigError, "epochs is 1.5", lambda: distill(epochs=1.5)),
    "an empty iterator": (DataError, "the iterator of training batches is empty", lambda: stream([])),
    "an endless iterator": (
        ConfigError,
        "an iterator, which may have no end, and epochs is 1: say with steps=",
        lambda: stream(itertools.repeat((X, Y))),
    ),
    "batch_size of an iterator": (
        ConfigError,
        "batch_size is 8, and the data is an iter",
        lambda: distill(data=[(X, Y)]),
    ),
    "steps in memory": (ConfigError, "steps is 3, and the data is in memory", lambda: distill(steps=3)),
    "inputs alone": (DataError, "the data is a ndarray: give kd.Batch", lambda: distill(data=X)),
    "NaN weights": (DataError, "a weight is NaN", lambda: distill(data=kd.Batch(X, Y, W * np.nan))),
    "weights below 0": (DataError, "a weight is -1", lambda: distill(data=kd.Batch(X, Y, -W))),
    "weights of 0": (DataError, "the weights sum to 0", lambda: distill(data=kd.Batch(X, Y, 0 * W))),
    "weights of an iterator of 0": (DataError, "the weights sum to 0", lambda: stream([kd.Batch(X, Y, 0 * W)])),
    "weights of classes": (
        ShapeError,
        r"the weights have the shape \(8, 4\)",
        lambda: distill(data=kd.Batch(X, Y, np.ones((24, 4)))),
    ),
    "weights in a column": (
        ShapeError,
        r"the weights have the shape \(8, 1\)",
        lambda: distill(data=kd.Batch(X, Y, W[:, None])),
    ),
    "a type that the model refuses": (
        ConfigError,
        r"the student cannot be called with inputs of float16\[8, 6\] \(TypeError: float32 is needed",
        lambda: distill(ForFloats(rngs=nnx.Rngs(0)), data=kd.Batch(X.astype(np.float16), Y)),
    ),
    "inputs that the teacher refuses": (
        ConfigError,
        "the teacher cannot be called",
        lambda: distill(None, teacher(9, 4)),
    ),
    "a prepare that fails": (
        ConfigError,
        "prepare cannot be called",
        lambda: distill(prepare=lambda key, x, train: x.nothing),
    ),
    "a prepare that is none": (ConfigError, "prepare is 3: give a function", lambda: distill(prepare=3)),
    "an optimizer's class": (
        ConfigError,
        "optimizer is .*: give an optax.GradientTransformation",
        lambda: distill(optimizer=optax.adamw),
    ),
    "a number as optimizer": (ConfigError, "optimizer is 0.001", lambda: distill(optimizer=1e-3)),
    "an optimizer of more than gradients": (
        ConfigError,
        "the optimizer cannot update these parameters",
        lambda: distill(optimizer=optax.lbfgs()),
    ),
    "a module that returns a tuple": (
        ConfigError,
        "a tuple of 2 and no logits",
        lambda: distill(Twice(rngs=nnx.Rngs(0))),
    ),
    "a loss that fails": (
        MethodError,
        r"the loss of LossFunction cannot be computed with logits of \[8, 4\] and labels of int32\[8\] \(TypeError",
        lambda: distill(None, teacher(), method=lambda s, t, y: jnp.dot(s, t)),
    ),
    "a loss of pairs": (
        ShapeError,
        r"the term loss of LossFunction has the shape \(8, 8\) and the logits \(8, 4\)",
        lambda: distill(None, teacher(), method=lambda s, t, y: jnp.dot(s, t.T)),
    ),
    "a loss without terms": (MethodError, "has no terms", lambda: distill(None, teacher(), method=lambda s, t: {})),
    "a loss of whole numbers": (
        MethodError,
        "is of type int32: it must be a float array",
        lambda: distill(None, teacher(), method=lambda s, t: jnp.argmax(s, axis=-1).astype(jnp.int32)),
    ),
    "a method without a loss": (MethodError, "Unfinished has no loss", lambda: distill(method=Unfinished())),
    "a method that is none": (MethodError, "method is 3: give a kd.Method", lambda: distill(method=3)),
    "a function of one": (MethodError, "give a kd.Method", lambda: distill(method=lambda s: s)),
    "a class of methods that needs arguments": (
        MethodError,
        r"FitNet is a class that needs arguments: give FitNet\(…\)",
        lambda: distill(method=kd.FitNet),
    ),
    "a Linen module": (
        ConfigError,
        "Residual is a Linen module, .* give kd.from_linen",
        lambda: distill(Residual(), data=kd.Batch(FLOAT_IMAGES, Y[:16])),
    ),
    "KD without a teacher": (MethodError, "KD needs a teacher, and none was given", lambda: distill(method=kd.KD())),
    "KD without a teacher in a sum": (
        MethodError,
        "needs a teacher",
        lambda: distill(method=kd.CrossEntropy() + 0.5 * kd.KD()),
    ),
    "a teacher without variables": (ConfigError, "the teacher has no variables", lambda: distill(None, net())),
    "one output": (
        MethodError,
        "the student has 1 output, and CrossEntropy takes a softmax .*kd.losses.binary_kd",
        lambda: distill(net(6, 1), data=kd.Batch(X, Y.astype(np.float32)), method=3 * kd.CrossEntropy()),
    ),
    "one output of both": (
        MethodError,
        "the student has 1 output, and KD takes",
        lambda: distill(net(6, 1), teacher(6, 1), method=kd.KD(alpha=0)),
    ),
    "a number out of its bounds": (
        MethodError,
        "the temperature of KD is 0: it must be above 0",
        lambda: distill(None, teacher(), method=kd.KD(temperature=0)),
    ),
    "soft labels below 0": (
        DataError,
        r"a row of soft labels has -1: give probabilities",
        lambda: distill(data=kd.Batch(X, -np.eye(4, dtype=np.float32)[Y])),
    ),
    "soft labels of an iterator": (
        DataError,
        r"a row of soft labels sums to 2: give probabilities",
        lambda: stream([(X, 2 * np.eye(4, dtype=np.float32)[Y])]),
    ),
    "a number that shapes depend on": (
        MethodError,
        r"the loss of Wide needs the value of a number .*kd\.static",
        lambda: distill(method=Wide()),
    ),
    "a number that a condition depends on": (
        MethodError,
        r"the loss of If needs the value of a number .*kd\.static",
        lambda: distill(method=If()),
    ),
    "weights of positions and labels of examples": (
        ShapeError,
        r"the weights have the shape \(8, 3\)",
        lambda: distill(data=kd.Batch(X, Y, np.ones((24, 3)))),
    ),
    "an empty list of teachers": (ConfigError, "there is no teacher in the list", lambda: distill(None, [])),
    "cached logits of other data": (
        ConfigError,
        "24 examples and the teacher's outputs of 23",
        lambda: distill(None, np.zeros((23, 4), np.float32)),
    ),
    "cached logits with an iterator": (
        ConfigError,
        "a cached teacher is looked up by rows",
        lambda: kd.distill(net(), np.zeros((24, 4), np.float32), [(X, Y)], optimizer=SGD),
    ),
    "a key that is none": (DataError, "key is 'a'", lambda: distill(key="a")),
    "a number that is too large": (
        DataError,
        "the data has the number 10995116",
        lambda: distill(data=kd.Batch(X, Y.astype(np.int64) + 2**40)),
    ),
    "a share as validation": (ConfigError, "validation is a float: give a kd.Batch", lambda: distill(validation=0.2)),
    "validation labels outside": (
        DataError,
        r"the label \d is outside the 4 classes",
        lambda: distill(validation=kd.Batch(X, Y + 6)),
    ),
    "validation of an iterator": (
        ConfigError,
        "validation is an iterator",
        lambda: distill(validation=iter([(X, Y)])),
    ),
    "best of nothing": (ConfigError, "there is no validation to measure it on", lambda: distill(best="nll")),
    "best of what nobody knows": (
        ConfigError,
        "best is 'nothing', and there is no such measure: use one of loss, hard, accuracy, correct",
        lambda: distill(best="nothing", validation=DATA),
    ),
    "best of a term": (
        ConfigError,
        "whether more of hard is better",
        lambda: distill(best="hard"),
    ),
    "best of a teacher that is not there": (
        ConfigError,
        "best is 'agreement', and there is no such measure",
        lambda: distill(best="agreement", validation=DATA),
    ),
    "early stopping without validation": (
        ConfigError,
        "the measure of early_stopping is 'validation_nll', and there is no validation",
        lambda: distill(callbacks=[kd.callbacks.early_stopping()]),
    ),
    "early stopping that was not called": (
        ConfigError,
        r"the callback is the function early_stopping: call it",
        lambda: distill(callbacks=kd.callbacks.early_stopping),
    ),
    "a callback of nothing": (
        ConfigError,
        "the callback <lambda> cannot be called with one argument: give a function of a kd.callbacks.Epoch alone",
        lambda: distill(callbacks=lambda: None),
    ),
    "early stopping by a measure that is none": (
        ConfigError,
        "whether more of val_loss is better: use validation_accuracy, .*, or loss, and of another measure say higher=",
        lambda: EARLY_STOPPING("val_loss"),
    ),
    "a callback that is none": (ConfigError, "a callback is 'x': give functions", lambda: distill(callbacks=["x"])),
    "validation of other inputs": (
        ConfigError,
        r"the student cannot be called with inputs of float32\[24, 7\]",
        lambda: distill(validation=kd.Batch(np.zeros((24, 7), np.float32), Y)),
    ),
    "a list whose second batch has labels outside": (
        DataError,
        r"the label \d is outside the 4 classes",
        lambda: distill(validation=[DATA, kd.Batch(X, Y + 6)]),
    ),
    "an empty list as validation": (ConfigError, "validation is an empty list", lambda: distill(validation=[])),
    "float labels of another shape in the validation": (
        ShapeError,
        r"the labels are float32 of the shape .* and the outputs",
        lambda: distill(validation=kd.Batch(X, np.ones((24, 3), np.float32))),
    ),
    "a measure that is none": (
        ConfigError,
        "measures has 3: give functions",
        lambda: distill(validation=DATA, measures={"t": 3}),
    ),
    "measures without names": (ConfigError, r"measures has \[1\]", lambda: distill(validation=DATA, measures=[1])),
    "best that is no name": (ConfigError, "best is 3: give the name of a measure", lambda: distill(best=3)),
    "patience of a half": (ConfigError, "patience is 0.5", lambda: EARLY_STOPPING(patience=0.5)),
    "early stopping by a number": (ConfigError, "the measure of early_stopping is 3", lambda: EARLY_STOPPING(3)),
    "a dtype by another name": (ConfigError, "dtype is 'bf16': give a type", lambda: distill(dtype="bf16")),
    "a key that is too large": (DataError, "key is 118.*: a whole number must be", lambda: distill(key=2**70)),
    "a folder that is none": (ConfigError, "the folder of checkpoints is 5", lambda: distill(checkpoint=5)),
    "a parameter of whole numbers": (
        ConfigError,
        "the parameter k is int32, which has no gradient",
        lambda: distill(
            kd.from_function(
                lambda p, x: x @ p["w"] * p["k"].astype(x.dtype), {"w": jnp.ones((6, 4)), "k": jnp.int32(2)}
            )
        ),
    ),
    "a term with the name of a measure": (
        MethodError,
        "a term of LossFunction is called accuracy, which is the name of something else",
        lambda: distill(None, teacher(), method=lambda s, t: {"accuracy": s[:, 0]}),
    ),
    "a term beside the loss of that name": (
        MethodError,
        "a term of LossFunction is called loss",
        lambda: distill(None, teacher(), method=lambda s, t: {"loss": s[:, 0], "more": s[:, 1]}),
    ),
    "a value for each class": (
        ShapeError,
        r"the term loss of LossFunction has the shape \(8, 4\)",
        lambda: distill(None, teacher(), method=lambda s, t: (s - t) ** 2),
    ),
    "a state that changes its type": (
        ConfigError,
        r"the student's state n is int32\[\] before a call in training and float32\[\] after it: keep its type",
        lambda: distill(of_state({"n": jnp.int32(0)}, lambda state, x: {"n": state["n"].astype(jnp.float32) + 1})),
    ),
    "a state that changes its shape": (
        ConfigError,
        r"the student's state itself is float32\[1, 6\] before a call in training and float32\[8, 6\] after it",
        lambda: stream([(X[:8], Y[:8])], student=of_state(jnp.zeros((1, 6)), lambda state, x: state + x)),
    ),
    "a state that loses a part": (
        ConfigError,
        r"the student's state b is float32\[\] before a call in training and nothing after it",
        lambda: distill(of_state({"a": jnp.zeros(()), "b": jnp.zeros(())}, lambda state, x: {"a": state["a"]})),
    ),
    "a state in other containers": (
        ConfigError,
        "the student's state has another structure after a call in training",
        lambda: distill(of_state([jnp.zeros(())], tuple_of)),
    ),
    "a statistic of another type": (
        ConfigError,
        r"the student's state mean is bfloat16\[6\] before a call in training and float32\[6\] after it",
        lambda: distill(Narrow),
    ),
    "a PyTree that is called": (
        ConfigError,
        "Called is a PyTree that is called, as Equinox has its modules",
        lambda: distill(Called(jnp.ones((6, 4)))),
    ),
    "validation without examples": (
        ConfigError,
        "validation has a batch of 0 examples: give at least one",
        lambda: distill(validation=kd.Batch(X[:0], Y[:0])),
    ),
    "a list of validation without examples": (
        ConfigError,
        "validation has a batch of 0 examples",
        lambda: distill(validation=[DATA, kd.Batch(X[:0], Y[:0])]),
    ),
    "a first batch of nothing": (DataError, "a batch of the iterator has 0 examples", lambda: stream([(X[:0], Y[:0])])),
    "the student in several": (
        ConfigError,
        "its teacher's own object",
        lambda: its_own(lambda s: (s, kd.several([s]))),
    ),
    "the student as a model": (ConfigError, "its teacher's own object", lambda: its_own(lambda s: (s, kd.from_nnx(s)))),
    "the teacher as a model": (ConfigError, "its teacher's own object", lambda: its_own(lambda s: (kd.from_nnx(s), s))),
    "probabilities of outputs that are no classes": (
        MethodError,
        r"by a softmax over classes, and LogitMSE does not say that it takes one .*: give kd.several\(teachers, mean=",
        lambda: distill(None, [teacher(), teacher(6, 3, 4)], method=kd.LogitMSE(alpha=0)),
    ),
    "probabilities and a function": (
        MethodError,
        "and LossFunction does not say that it takes one",
        lambda: distill(
            kd.mlp([6, 1]),
            [teacher(6, 1), kd.several([teacher(6, 1), teacher(6, 3, 1)])],
            kd.Batch(X),
            method=lambda s, t: s[:, 0],
        ),
    ),
    "probabilities of one output": (
        MethodError,
        "by a softmax over classes, and BinaryKD does not say that it takes one",
        lambda: distill(
            kd.mlp([6, 1]), [teacher(6, 1), teacher(6, 3, 1)], kd.Batch(X), method=2 * kd.BinaryKD(alpha=0)
        ),
    ),
    "a cohort's method on one student": (
        MethodError,
        r"DML needs a student that is a cohort: give kd.cohort\(",
        lambda: distill(method=kd.CrossEntropy() + kd.DML()),
    ),
    "an average's method on a plain student": (
        MethodError,
        r"SelfTaught needs a student that carries its average: give kd.with_average\(student\)",
        lambda: distill(method=kd.self_taught(kd.KD())),
    ),
    "SimKD on a plain student": (
        MethodError,
        r"SimKD needs a student that ends in its teacher's classifier: give kd.with_classifier\(",
        lambda: distill(None, teacher(), method=kd.CrossEntropy() + kd.SimKD(teacher_feature="hidden.0")),
    ),
    "a memory that is too small": (
        MethodError,
        "the batch has the index 23 and CRD's memory 4 examples: give examples=24",
        lambda: distill(
            None, teacher(6, 5, 4), kd.Batch(X, Y, indices=np.arange(24)), method=kd.CRD("hidden.0", examples=4)
        ),
    ),
    "a memory that is too small for an iterator": (
        MethodError,
        "the batch has the index 23 and CRD's memory 4 examples",
        lambda: stream(
            [kd.Batch(X, Y, indices=np.arange(24))], taught=teacher(6, 5, 4), method=kd.CRD("hidden.0", examples=4)
        ),
    ),
    "labels that a method does not need": (
        ShapeError,
        r"give labels.astype\(int\), or leave the labels out, as KD needs none",
        lambda: distill(None, teacher(), data=kd.Batch(X, X[:, 0]), method=kd.KD(alpha=0)),
    ),
    "whole labels of sigmoids that need none": (
        MethodError,
        "the labels of BinaryKD are int32, .*, or leave the labels out, as BinaryKD needs none",
        lambda: distill(None, teacher(), method=kd.BinaryKD(alpha=0)),
    ),
    "a convention that is none": (
        ConfigError,
        "^convention 'continous' is unknown: use",
        lambda: distill(None, teacher(), method=kd.JSD(convention="continous")),
    ),
    "resume without a folder": (ConfigError, "resume is asked for without a folder", lambda: distill(resume=True)),
    "whole numbers as dtype": (ConfigError, "dtype is int8: give a type of floats", lambda: distill(dtype=jnp.int8)),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_sentence_before_anything_is_compiled(mistake: str) -> None:
    kind, says, call = BAD[mistake]
    programs.forget()
    with pytest.raises(kind, match=says) as error:
        call()
    sentence = str(error.value)
    assert "\n" not in sentence
    assert re.search(r"[:(]", sentence), "a remedy stands behind a colon"
    assert not programs._by_text


@pytest.mark.parametrize(
    ("says", "changed"),
    [
        ("label 4 is outside", {"data": kd.Batch(X, np.where(Y == 3, 4, Y))}),
        ("KD needs a teacher", {"method": kd.KD()}),
        ("batch_size is 0", {"batch_size": 0}),
        ("optimizer is 0.1", {"optimizer": 0.1}),
        ("give kd.Batch", {"data": iter([(X, Y)])}),
        ("7 classes", {"method": kd.KD(), "teacher": teacher(6, 7)}),
        (r"shape \(8, 4\)", {"data": kd.Batch(X, np.eye(4, dtype=np.int32)[Y])}),
        ("the measure a cannot be computed", {"measures": {"a": lambda logits, labels: logits[:, 0]}}),
    ],
)
def test_fit_refuses_the_same(says: str, changed: dict[str, Any]) -> None:
    given = {"data": DATA, "method": kd.CrossEntropy(), **HOW} | changed
    with pytest.raises((ConfigError, DataError), match=says):
        FIT(0, given.pop("data"), net(), **given)


def test_fit_refuses_a_student_that_is_its_teacher() -> None:
    own = teacher()
    with pytest.raises(ConfigError, match="its teacher's own object"):
        FIT(0, DATA, own, teacher=own, method=kd.KD(), **HOW)


def test_two_functions_may_begin_with_the_same_parameters() -> None:
    """They are two models; the same function of the same parameters is one."""
    shared = {"kernel": jnp.ones((6, 4))}
    one, other = (kd.from_function(f, shared) for f in (lambda p, x: x @ p["kernel"], lambda p, x: -x @ p["kernel"]))
    kd.distill(one, other, DATA, **HOW)
    with pytest.raises(ConfigError, match="its teacher's own object"):
        kd.distill(one, one, DATA, **HOW)


def test_a_copy_and_what_was_trained_may_have_its_teacher() -> None:
    """They have other values, or will have."""
    module = trained_module()
    for student in (nnx.clone(module), kd.Model(kd.from_nnx(module).network, kd.from_nnx(module).variables)):
        check_not_own(as_model(student), as_teacher(module))


def test_a_method_that_is_no_dataclass_works() -> None:
    """Its attributes are its fields."""
    one, other = (distill(method=method).history["own"] for method in (Plain(1.0), Plain(2.0)))
    np.testing.assert_allclose(2 * one, other, rtol=1e-2)
    assert jax.tree.leaves(Plain(2.0)) == [2.0]
    assert repr(Plain(2.0)) == "Plain(weight=2.0, name='plain')"


def test_shapes_are_refused_while_tracing() -> None:
    """So under `jit` and `vmap`, where nothing is known of values."""

    def trained(labels: jax.Array) -> Any:
        return kd.fit(0, kd.Batch(X, labels), net(), method=kd.CrossEntropy(), **HOW)[1]["loss"]

    with pytest.raises(ShapeError, match="one-hot"):
        jax.eval_shape(trained, jax.ShapeDtypeStruct((24, 4), jnp.int32))
    assert jax.eval_shape(jax.vmap(trained), jax.ShapeDtypeStruct((3, 24), jnp.int32)).shape == (3, 1)


@pytest.mark.parametrize(
    ("student", "method", "says"),
    [
        (net(), OfFeatures(), r"name the features that it reads in student_features and teacher_features, or "),
        (net(), Short(), r"define loss\(self, parts, student, teacher, batch, step\)$"),
        (net(), lambda s, t, y: kd.losses.dkd(s, t), r"mend the loss, or give labels as it takes"),  # type: ignore
        (Unseeded, kd.KD(), r"nnx\.Dropout\(0\.2, rngs=rngs\)$"),
        (lambda rngs: net(), kd.KD(), r"the lambda gives a Model and no nnx.Module: give that Model itself"),
    ],
)  # fmt: skip
def test_the_remedy_is_of_what_is_wrong(student: Any, method: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        kd.distill(student, teacher(), DATA, method=method, **HOW)


def test_a_method_of_features_alone_warns_that_nothing_trains_the_outputs() -> None:
    alone = 2 * kd.Cosine("hidden.0") + kd.PKT("hidden.0")
    with pytest.warns(UserWarning, match=r"compares features alone, .* kd\.KD\(\) \+ kd\.Cosine\(…\)"):
        kd.distill(net(), teacher(6, 5, 4), DATA, method=alone, **HOW)
    kd.distill(net(), teacher(6, 5, 4), DATA, method=kd.CrossEntropy() + alone, **HOW)


def test_a_function_may_take_the_mean_of_probabilities() -> None:
    result = distill(None, [teacher(), teacher(6, 3, 4)], method=lambda s, t: kd.losses.kd(s, t, temperature=2.0))
    assert np.isfinite(result.history["loss"]).all()


@pytest.mark.parametrize("prepare", [kd.augment.random_flip(), lambda key, x, train: x / 2])
def test_random_views_beside_answers_that_are_kept_are_told(prepare: Any) -> None:
    images = kd.Batch(IMAGES.astype(np.float32), np.zeros(len(IMAGES), np.int32))
    model, other = (
        kd.from_function(lambda p, x: x.reshape(len(x), -1) @ p, np.full((IMAGES[0].size, 4), of, np.float32))
        for of in (0, 1)
    )
    how = {"optimizer": SGD, "batch_size": 4, "prepare": prepare}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kd.distill(model, kd.cached(other, images), images, **how)
        kd.distill(model, other, images, **how)
    random = isinstance(prepare, type(kd.augment.random_flip()))
    assert [str(one.message)[:30] for one in told] == ["prepare draws random views, an"] * random
