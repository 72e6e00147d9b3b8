"""Teachers: live on the same view as the student, cached, from a file, several at once, or known by their top k."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, Float, Int

from kd_jax.data.batch import as_batch, check_whole
from kd_jax.data.order import check_order
from kd_jax.errors import ConfigError, DataError
from kd_jax.files import floats, npy, tensors
from kd_jax.models import Model, Network, Output, as_model, as_output
from kd_jax.models.doors import is_result
from kd_jax.models.predict import highest_precision, outputs_in_batches
from kd_jax.models.trying import PREPARE, told

PyTree = Any

MEANS = ("probabilities", "logits", "losses")
RESTS = ("uniform", "renormalised")


class Teacher:
    """What teaches: a PyTree of arrays, always in evaluation mode, and without a gradient.

    per_example: whether it has arrays whose first axis is that of the training examples, to be looked up by `take`.
    """

    @property
    def per_example(self) -> bool:
        """Whether it knows the training examples by their rows."""
        return False

    @property
    def examples(self) -> int | None:
        """How many training examples it knows; None where it answers any input."""
        return None

    def take(self, rows: Int[Array, "..."]) -> "Teacher":
        """The teacher of the examples `rows` alone."""
        return self

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """What it says of the inputs: one `Output`, or several where the mean of their losses is taken."""
        raise ConfigError(f"{type(self).__name__} says nothing: define outputs(inputs, *, features=())")


@partial(jax.tree_util.register_dataclass, data_fields=["variables"], meta_fields=["network"])
@dataclass(frozen=True)
class LiveTeacher(Teacher):
    """A network that answers inside the step, on the view that the student sees."""

    network: Network
    variables: PyTree
    # The module that it was made of, to be known until it is flattened.
    origin: ClassVar[Any] = None

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """In evaluation mode."""
        key = jax.random.key(0)
        return (self.network.apply(self.variables, inputs, train=False, key=key, features=features)[0],)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["function"])
@dataclass(frozen=True)
class FunctionTeacher(Teacher):
    """A function `inputs -> logits`, called inside the step."""

    # What else it reads (a global array, say) is fixed when it is first compiled.
    function: Callable[[PyTree], Any]

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """What the function gives."""
        output = as_output(self.function(inputs))
        missing = [path for path in features if path not in output.features]
        if missing:
            raise ConfigError(
                f"the teacher is a function, which has no feature {missing[0]!r}: give a module, or return "
                "kd.Output(logits, features)"
            )
        return (output,)


@partial(jax.tree_util.register_dataclass, data_fields=["output"], meta_fields=[])
@dataclass(frozen=True)
class CachedTeacher(Teacher):
    """Outputs of every training example, in the examples' order, looked up by the same rows as the inputs."""

    output: Output

    @property
    def per_example(self) -> bool:
        """It does."""
        return True

    @property
    def examples(self) -> int | None:
        """As many as there are logits."""
        return int(self.output.logits.shape[0])

    def take(self, rows: Int[Array, "..."]) -> "CachedTeacher":
        """The outputs of these rows."""
        return CachedTeacher(jax.tree.map(lambda leaf: leaf[rows], self.output))

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """What is cached."""
        missing = [path for path in features if path not in self.output.features]
        if missing:
            raise ConfigError(
                f"the cached teacher has no feature {missing[0]!r}: cache it with kd.cached(…, features={features!r})"
            )
        return (self.output,)


@partial(jax.tree_util.register_dataclass, data_fields=["classes_of", "probabilities"], meta_fields=["classes", "rest"])
@dataclass(frozen=True)
class TopKTeacher(Teacher):
    """The k largest probabilities of every training example, and their classes, both `[examples, ..., k]`.

    rest: what becomes of the mass that is left: `uniform` over the other classes, or `renormalised`, none.
    """

    # Arrays, or their shapes.
    classes_of: Any
    probabilities: Any
    classes: int
    rest: str

    @property
    def per_example(self) -> bool:
        """It does."""
        return True

    @property
    def examples(self) -> int | None:
        """As many as there are rows."""
        return int(self.probabilities.shape[0])

    def take(self, rows: Int[Array, "..."]) -> "TopKTeacher":
        """Those of these rows."""
        return dataclasses.replace(self, classes_of=self.classes_of[rows], probabilities=self.probabilities[rows])

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """Log-probabilities of all classes."""
        known = jnp.asarray(self.probabilities, jnp.float32)
        k = known.shape[-1]
        mass = jnp.sum(known, axis=-1, keepdims=True)
        left = jnp.clip(1 - mass, 0, 1) / max(1, self.classes - k)
        if self.rest == "renormalised" or k == self.classes:
            known, left = known / mass, jnp.zeros_like(left)
        everywhere = jnp.broadcast_to(left, (*known.shape[:-1], self.classes))
        spread = jnp.put_along_axis(everywhere, jnp.asarray(self.classes_of), known, axis=-1, inplace=False)
        return (Output(jnp.log(spread)),)


@partial(jax.tree_util.register_dataclass, data_fields=["teachers"], meta_fields=["mean"])
@dataclass(frozen=True)
class SeveralTeachers(Teacher):
    """Several teachers; `mean` of their `probabilities` (at temperature 1), `logits`, or of the `losses` by each."""

    teachers: tuple[Teacher, ...]
    mean: str

    @property
    def per_example(self) -> bool:
        """Whether one of them does."""
        return any(teacher.per_example for teacher in self.teachers)

    @property
    def examples(self) -> int | None:
        """Of the first that knows."""
        return next((teacher.examples for teacher in self.teachers if teacher.examples is not None), None)

    def take(self, rows: Int[Array, "..."]) -> "SeveralTeachers":
        """Each of these rows."""
        return SeveralTeachers(tuple(teacher.take(rows) for teacher in self.teachers), self.mean)

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """One output, the mean; or those of all."""
        each = [
            output for place, teacher in enumerate(self.teachers)
            for output in teacher.outputs(inputs, features=features if place == 0 or self.mean == "losses" else ())
        ]  # fmt: skip
        if self.mean == "losses":
            return tuple(each)
        shapes = {output.logits.shape for output in each}
        if len(shapes) > 1:
            raise ConfigError(
                f"the teachers' logits have the shapes {' and '.join(map(str, sorted(shapes)))}: the mean of their "
                f"{self.mean} needs the same shape"
            )
        logits = jnp.stack([output.logits.astype(jnp.float32) for output in each])
        if self.mean == "probabilities":
            logs = jax.nn.log_softmax(logits, axis=-1)
            return (Output(jax.nn.logsumexp(logs, axis=0) - float(np.log(len(each))), each[0].features),)
        return (Output(jnp.mean(logits, axis=0), each[0].features),)


def several(teachers: Sequence[Any], *, mean: str = "probabilities") -> SeveralTeachers:
    """Several teachers as one: the mean of their `probabilities`, of their `logits`, or of the `losses` by each.

    Features are those of the first. Raises `ConfigError` for another mean, or no teacher.
    """
    if mean not in MEANS:
        raise ConfigError(f"mean is {mean!r}: use {', '.join(MEANS[:-1])} or {MEANS[-1]}")
    known = [as_teacher(teacher) for teacher in teachers]
    if not known or any(teacher is None for teacher in known):
        raise ConfigError("there is no teacher in the list: give at least one, and None for no teacher at all")
    counts = sorted({teacher.examples for teacher in known if teacher is not None and teacher.examples is not None})
    if len(counts) > 1:
        raise ConfigError(
            f"the teachers know {' and '.join(map(str, counts))} examples: give each the outputs of the same examples"
        )
    return SeveralTeachers(tuple(teacher for teacher in known if teacher is not None), mean)


def cached(
    teacher: Any,
    inputs: PyTree = None,
    *,
    features: tuple[str, ...] = (),
    batch_size: int = 1000,
    prepare: Any = None,
) -> CachedTeacher:
    """A teacher whose outputs of all training inputs are computed once, now, and kept in memory.

    teacher: a model, or the array of logits `[examples, ..., classes]` that it gave, in the inputs' order.
    inputs: those of the training data (a `Batch` will do). prepare: as of the training, called with `train=False`.
    """
    check_order("kd.cached(teacher, inputs)", models={"teacher": teacher}, data={"inputs": inputs})
    if inputs is None:
        if isinstance(teacher, np.ndarray | jax.Array | list):
            return CachedTeacher(Output(jnp.asarray(floats(np.asarray(teacher), "the teacher's logits"))))
        raise ConfigError("kd.cached needs what the teacher is asked about: kd.cached(teacher, inputs)")
    live, batch_size = as_teacher(teacher), check_whole(batch_size, "batch_size")
    inputs = as_batch((getattr(inputs, "inputs", inputs), None)).inputs
    if isinstance(live, LiveTeacher):
        outputs = outputs_in_batches(
            live.network, live.variables, inputs, batch_size=batch_size, features=features, prepare=prepare
        )
        return CachedTeacher(outputs)
    if live is None or live.per_example:
        raise ConfigError(f"the teacher is {type(teacher).__name__}: only one that answers inputs can be cached")
    parts = []
    count = jax.tree.leaves(inputs)[0].shape[0]
    for start in range(0, count, batch_size):
        part = jax.tree.map(lambda leaf, start=start: jnp.asarray(leaf[start : start + batch_size]), inputs)
        said = _ask(live, part, features=features, prepare=prepare)
        if len(said) > 1:
            raise ConfigError('the mean of losses cannot be cached: cache each teacher, or use mean="probabilities"')
        parts.append(said[0])
    return CachedTeacher(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts))


@partial(jax.jit, static_argnames=("features", "prepare"))
def _ask(teacher: Teacher, inputs: PyTree, *, features: tuple[str, ...], prepare: Any) -> tuple[Output, ...]:
    if prepare is not None:
        with told("prepare", inputs, PREPARE):
            inputs = prepare(jax.random.key(0), inputs, False)
    with told("the teacher", inputs), highest_precision():
        return teacher.outputs(inputs, features=features)


def from_file(path: str | Path, *, classes: int | None = None) -> CachedTeacher:
    """A teacher known by the logits that it gave for the training examples, in their order.

    path: a `.npy`, `.npz` or `.safetensors` file; the last two hold them by the name `logits`. Raises `DataError`.
    """
    logits = _read_logits(path, None)
    if logits.ndim < 2 or (classes is not None and logits.shape[-1] != classes):
        wanted = "[examples, classes]" if classes is None else f"[examples, {classes}]"
        raise DataError(f"{path} has logits of the shape {logits.shape}: it must be {wanted}")
    return CachedTeacher(Output(jnp.asarray(floats(logits, f"the array logits of {path}"))))


def from_top_k(classes_of: Any, probabilities: Any, *, classes: int, rest: str = "uniform") -> TopKTeacher:
    """A teacher known by its k largest probabilities for each training example, both `[examples, ..., k]`.

    classes_of: which classes they are of. classes: how many there are. rest: where the mass that is left goes,
    `uniform` over the other classes, or `renormalised`, which makes the teacher surer than it was. Raises `DataError`.
    """
    if rest not in RESTS:
        raise ConfigError(f"rest is {rest!r}: use {' or '.join(RESTS)}")
    which, known = np.asarray(classes_of), np.asarray(probabilities, np.float32)
    if which.shape != known.shape or which.dtype.kind not in "iu" or which.ndim < 2:
        raise DataError(
            f"the classes have the shape {which.shape} and the probabilities {known.shape}: both must be "
            "[examples, k], whole numbers and floats"
        )
    if which.size and not (which.min() >= 0 and which.max() < classes):
        raise DataError(f"a class is {which.max() if which.min() >= 0 else which.min()}: it must be 0 to {classes - 1}")
    ordered = np.sort(which, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise DataError("an example has the same class twice: give each class once, with its probability")
    mass = known.sum(-1)
    if not np.isfinite(known).all() or (known < 0).any() or (mass > 1 + 1e-3).any() or (mass <= 0).any():
        raise DataError("the probabilities of an example are negative or do not sum to at most 1: give probabilities")
    return TopKTeacher(jnp.asarray(which.astype(np.int32)), jnp.asarray(known), classes, rest)


def as_teacher(teacher: Any) -> Teacher | None:
    """`teacher` as a `Teacher`: a model or module, a list of several, a function of inputs, or None.

    Raises `ConfigError` for what is none, and for a model without variables.
    """
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, list | tuple) and not is_result(teacher):
        return several(teacher)
    if isinstance(teacher, np.ndarray | jax.Array):
        return cached(teacher)
    if not isinstance(teacher, Model | Network | nnx.Module | nn.Module | type) and callable(teacher):
        return FunctionTeacher(teacher)
    model = as_model(teacher)
    if model.variables is None:
        raise ConfigError("the teacher has no variables: give a trained module, or a model with its variables")
    taught = LiveTeacher(model.network, model.variables)
    object.__setattr__(taught, "origin", model.origin)
    return taught


def load_logits(path: str | Path, *, examples: int, classes: int) -> Float[np.ndarray, "examples classes"]:
    """Logits that a teacher gave for `examples` images, in their order, of a `.npy`, `.npz` or `.safetensors` file.

    path: `.npz` and `.safetensors` files hold them by the name `logits`.

    The result is in float32, or in float64 where the file is that and JAX is set to compute in it. Raises `DataError`
    for another shape than `[examples, classes]` before the logits are read, and for other numbers than finite floats.
    """
    return floats(_read_logits(path, (examples, classes)), f"the array logits of {path}")


def _read_logits(path: str | Path, shape: tuple[int, ...] | None) -> Any:
    suffix = Path(path).suffix
    if suffix == ".npy":
        return npy.read_npy(path, shape)
    if suffix == ".npz":
        return npy.read_npz(path, ["logits"], shape)[0]
    if suffix == ".safetensors":
        return tensors.read(path, ["logits"], shape)["logits"]
    raise DataError(f"logits cannot be read from {path}: name a file that ends in .npy, .npz or .safetensors")
