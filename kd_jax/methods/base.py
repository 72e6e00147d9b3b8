"""`Method`: what a student is trained to minimise, as a PyTree: its numbers are leaves, its names static."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from kd_jax.data.batch import Batch
from kd_jax.errors import ArgumentError, MethodError
from kd_jax.methods.arguments import as_factor, check_given, count_arguments, tuple_of_texts
from kd_jax.models import Output

PyTree = Any
Scalar = float | int | Num[Array, "..."]
"""A number; with axes it is a grid, for `vmap`."""
Values = Float[Array, "..."]
Terms = Mapping[str, Values]


class Parts(NamedTuple):
    """What a method has of its own.

    learned: trained with the student, by the same optimiser (a projector, say).
    carried: handed from step to step (a memory bank).
    """

    learned: PyTree = ()
    carried: PyTree = ()


def static(default: Any) -> Any:
    """A field that is a number and yet no leaf, as shapes depend on it: `width: int = kd.static(128)`."""
    return dataclasses.field(default=default, metadata={"static": True})


class Method:
    """The base of every method: subclass it, best as a frozen dataclass, and write `loss`.

    Fields that are numbers or arrays are leaves, so that a grid of them is a `vmap` and compiles once; texts, truth
    values, functions and tuples of these are static, and numbers that `static` marks. Methods add up,
    `kd.KD() + 100 * kd.FitNet("hint", "guided")`.

    needs_teacher, needs_labels: what a training is asked for before anything is compiled.
    compares_logits: whether student and teacher must have logits of the same shape.
    of_classes: whether it takes a softmax over the classes: two at least, and float labels are their probabilities.
    of_sigmoids: whether it takes a sigmoid of each output: float labels are 0 to 1, each by itself.
    couples_batch: whether an example's value depends on the others of its batch: the whole one, whatever the devices.
    needs_rows: whether a batch must tell which rows of the training set its examples are.
    student_features, teacher_features: paths of the features that `loss` reads from the `Output`s.
    """

    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    compares_logits: ClassVar[bool] = True
    of_classes: ClassVar[bool] = False
    of_sigmoids: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = False
    # A number of NumPy times a method asks the method.
    __array_ufunc__ = None

    @property
    def student_features(self) -> tuple[str, ...]:
        """Paths of the student's features that the loss reads."""
        return ()

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """Paths of the teacher's features that the loss reads."""
        return ()

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """What is learned and what is carried, from the shapes of both networks' outputs on a batch."""
        return Parts()

    def loss(
        self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]
    ) -> Terms | tuple[Terms, PyTree]:
        """The terms of the loss by name, each `[batch]` or `[batch, positions]`, and what is carried if it changed.

        Their sum is minimised, averaged with the batch's weights. A term may be one number for the whole batch.
        """
        raise MethodError(f"{type(self).__name__} has no loss: define loss(parts, student, teacher, batch, step)")

    def __add__(self, other: Any) -> Any:
        """Both methods' terms together; a function of logits will do. Raises `MethodError` for what is no method."""
        if not isinstance(other, Method) and hasattr(other, "labels"):
            return NotImplemented  # a grid, which adds the method to each of its own
        return Sum((*_summands(self), *_summands(as_method(other))))

    def __radd__(self, other: Any) -> "Method":
        """As `__add__`; 0, with which `sum` begins, adds nothing."""
        return self if isinstance(other, int) and other == 0 else as_method(other) + self

    def __mul__(self, factor: Any) -> "Scaled":
        """Every term times a number. Raises `MethodError` for what is none."""
        return Scaled(self, as_factor(factor, type(self).__name__))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        """Of a class that is no dataclass, too, by what its instance holds."""
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __post_init__(self) -> None:
        """Of a dataclass: a list of texts is kept as a tuple, which can be compared."""
        for name, value in vars(self).items():
            object.__setattr__(self, name, tuple_of_texts(value))

    def __new__(cls, /, *given: Any, **named: Any) -> Any:
        """Raises `ArgumentError` for what the class does not take."""
        check_given(cls, given, named)
        return super().__new__(cls)

    def __init_subclass__(cls, **named: Any) -> None:
        """Registers every subclass as a PyTree."""
        super().__init_subclass__(**named)
        jax.tree_util.register_pytree_with_keys(cls, _flatten, lambda static, leaves: _unflatten(cls, static, leaves))


def _is_static(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_static(item) for item in value)
    if isinstance(value, Method):
        return False
    return value is None or isinstance(value, str | bytes | bool | type) or (callable(value) and not _is_array(value))


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _flatten(method: Any) -> tuple[list[tuple[Any, Any]], tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]]:
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    # What a class that is no dataclass has of its own, it has from its `__init__`.
    names = [field.name for field in fields] if dataclasses.is_dataclass(method) else list(vars(method))
    marked = {field.name for field in fields if field.metadata.get("static")}
    static = tuple(
        (name, getattr(method, name)) for name in names if name in marked or _is_static(getattr(method, name))
    )
    known = dict(static)
    leaves = [(jax.tree_util.GetAttrKey(name), getattr(method, name)) for name in names if name not in known]
    return leaves, (tuple(name for name in names if name not in known), static)


def _unflatten(cls: type, static: Any, leaves: Any) -> Any:
    method: Any = object.__new__(cls)
    for name, value in (*zip(static[0], leaves, strict=True), *static[1]):
        object.__setattr__(method, name, value)
    return method


def _summands(method: Method) -> tuple[Method, ...]:
    return method.methods if isinstance(method, Sum) else (method,)


@dataclass(frozen=True)
class Sum(Method):
    """Several methods at once. A name of a term that two of them have gets a number, `soft_2`."""

    methods: tuple[Method, ...]

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Whether one of them needs a teacher."""
        return any(method.needs_teacher for method in self.methods)

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Whether one of them needs labels."""
        return any(method.needs_labels for method in self.methods)

    @property
    def compares_logits(self) -> bool:  # type: ignore[override]
        """Whether one of them does."""
        return any(method.compares_logits for method in self.methods)

    @property
    def student_features(self) -> tuple[str, ...]:
        """Of all of them, each once."""
        return tuple(dict.fromkeys(path for method in self.methods for path in method.student_features))

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """Of all of them, each once."""
        return tuple(dict.fromkeys(path for method in self.methods for path in method.teacher_features))

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """The parts of each, as two tuples."""
        parts = [
            as_parts(method.init(jax.random.fold_in(key, place), student, teacher), method)
            for place, method in enumerate(self.methods)
        ]
        return Parts(tuple(part.learned for part in parts), tuple(part.carried for part in parts))

    def loss(
        self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Terms, PyTree]:
        """The terms of all."""
        together: dict[str, Values] = {}
        carried = []
        total = {"loss": None}
        for method, learned, own in zip(self.methods, parts.learned, parts.carried, strict=True):
            terms, new = terms_of(method, Parts(learned, own), student, teacher, batch, step)
            carried.append(new)
            for name, values in terms.items():
                together[_free(name, {**total, **together})] = values
        return together, tuple(carried)


class Wrapped(Method):
    """The base of methods that change another one, and need what it needs."""

    method: Method

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """As the method."""
        return self.method.needs_teacher

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """As the method."""
        return bool(self.method.needs_labels)

    @property
    def compares_logits(self) -> bool:  # type: ignore[override]
        """As the method."""
        return bool(self.method.compares_logits)

    @property
    def student_features(self) -> tuple[str, ...]:
        """As the method."""
        return self.method.student_features

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """As the method."""
        return self.method.teacher_features

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """As the method."""
        return as_parts(self.method.init(key, student, teacher), self.method)


@dataclass(frozen=True)
class Scaled(Wrapped):
    """A method whose every term counts `factor` times."""

    method: Method
    factor: Scalar

    def loss(
        self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Terms, PyTree]:
        """The method's terms times `factor`."""
        if isinstance(self.factor, jax.core.Tracer) or np.any(np.asarray(self.factor) == 0):
            # Else a derivative that is not finite would be NaN, times 0.
            learned, student = jax.tree.map(
                lambda leaf: jnp.where(self.factor == 0, jax.lax.stop_gradient(leaf), leaf), (parts.learned, student)
            )
            parts = parts._replace(learned=learned)
        terms, carried = terms_of(self.method, parts, student, teacher, batch, step)
        return {name: weighted(self.factor, values) for name, values in terms.items()}, carried


@dataclass(frozen=True)
class LossFunction(Method):
    """A method from a function `(student_logits, teacher_logits, labels) -> values`, or of the first two alone."""

    function: Callable[..., Any]
    # Where there is none the function is given None.
    needs_teacher: ClassVar[bool] = False

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Whether the function takes them."""
        return count_arguments(self.function) > 2

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Any:
        """What the function gives, as one term."""
        given = (student.logits, None if teacher is None else teacher.logits, batch.labels)
        values = self.function(*given[: count_arguments(self.function)])
        return values if isinstance(values, Mapping) else {"loss": values}


def weighted(weight: Scalar, values: Values) -> Values:
    """`weight` times `values`, in their type; what has the weight 0 is not computed, so that 0 times NaN is 0."""
    factor = jnp.asarray(weight, values.dtype)
    return jnp.where(factor == 0, jnp.zeros_like(values), factor * values)


def as_method(method: Any) -> Method:
    """`method` itself, an instance of a class of methods, or one of a function `(student, teacher, labels)`.

    Raises `MethodError` for anything else.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        try:
            return method()
        except ArgumentError:
            raise
        except TypeError:
            raise MethodError(f"{method.__name__} is a class that needs arguments: give {method.__name__}(…)") from None
    if callable(method) and count_arguments(method) in (2, 3):
        return LossFunction(method)
    raise MethodError(
        f"method is {method!r}: give a kd.Method such as kd.KD(), or a function of the logits of the student, those of "
        "the teacher, and the labels"
    )


def as_parts(parts: Any, method: Method) -> Parts:
    """What `Method.init` gave, as `Parts`. Raises `MethodError` where it is no pair."""
    if isinstance(parts, tuple) and len(parts) == 2:
        return Parts(*parts)
    if parts is None or parts == ():
        return Parts()
    raise MethodError(
        f"{type(method).__name__}.init gave a {type(parts).__name__}: it must return kd.Parts(learned, carried)"
    )


def terms_of(
    method: Method, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]
) -> tuple[dict[str, Values], PyTree]:
    """The terms of a method's loss by name, and what is carried. Raises `MethodError` for another result."""
    result = method.loss(parts, student, teacher, batch, step)
    terms, carried = result if isinstance(result, tuple) else (result, parts.carried)
    if not isinstance(terms, Mapping):
        terms = {type(method).__name__.lower(): terms}
    if not terms:
        raise MethodError(f"the loss of {type(method).__name__} has no terms: return at least one")
    for name, values in terms.items():
        if not (_is_array(values) and jnp.issubdtype(values.dtype, jnp.floating)):
            kind = values.dtype if _is_array(values) else type(values).__name__
            raise MethodError(f"the term {name} of {type(method).__name__} is of type {kind}: it must be a float array")
    return dict(terms), carried


def _free(name: str, taken: Mapping[str, Any]) -> str:
    return next(free for free in chain([name], (f"{name}_{number}" for number in count(2))) if free not in taken)
