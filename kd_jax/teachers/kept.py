"""Teachers whose answers to the training examples are kept in memory: all logits, the largest, draws, hidden states."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kd_jax.errors import ConfigError, DataError, FeatureError, MismatchError
from kd_jax.files.digests import digest
from kd_jax.methods.sparse import CLASSES, LOG_PROBABILITIES, LOG_REST, WEIGHTS, Sparse
from kd_jax.models import Output
from kd_jax.models.heads import BIAS, HIDDEN, KERNEL
from kd_jax.teachers.base import PyTree, Teacher
from kd_jax.teachers.keep import Arrays, Keep, check_places

Places = Int[Array | np.ndarray, "rows positions"]

RESTS = ("uniform", "renormalised", "tail")


class KeptTeacher(Teacher):
    """Arrays of all training examples, in their order, looked up by the same rows as the inputs."""

    # The form and the digest of the inputs that it answered, to be known until it is flattened or looked up.
    asked: ClassVar[tuple[list[list[Any]], str] | None] = None

    @property
    def per_example(self) -> bool:
        """It does."""
        return True

    @property
    def examples(self) -> int | None:
        """As many as its arrays have."""
        return int(jax.tree.leaves(self.by_example())[0].shape[0])

    @property
    def places(self) -> tuple[int, ...] | None:
        """As its first array has them."""
        return tuple(jax.tree.leaves(self.by_example())[0].shape[1:-1])

    def take(self, rows: Int[Array | np.ndarray, "..."]) -> "KeptTeacher":
        """The answers to these rows. Raises `DataError` for one that there is not."""
        _check_within(rows, self.examples, "an example")
        return dataclasses.replace(self, **jax.tree.map(lambda leaf: leaf[rows], self.by_example()))  # type: ignore[type-var]

    def at(self, examples: Places, positions: Places) -> "KeptTeacher":
        """The answers at single positions of examples, as packed sequences need them."""
        _check_within(examples, self.examples, "an example")
        _check_within(positions, (self.places or (None,))[0], "a position")
        leaves = jax.tree.leaves_with_path(self.by_example())
        shapes = {str(getattr(path[-1], "key", getattr(path[-1], "name", ""))): leaf.shape for path, leaf in leaves}
        check_places(shapes, self.places or ())
        found = jax.tree.map(lambda leaf: leaf[examples, positions], self.by_example())
        return dataclasses.replace(self, **found)  # type: ignore[type-var]

    def check_inputs(self, inputs: PyTree) -> None:
        """Raises `MismatchError` for inputs of the same types and shapes, and other values or another order."""
        if self.asked is None or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
            return
        form, known = self.asked
        if form_of(inputs) == form and digest(inputs, as_jax=True) != known:
            raise MismatchError(
                "the cached teacher is of other inputs, or of these in another order: give the inputs that it was made "
                "of, or teacher.in_memory(), which does not look at them"
            )

    def in_memory(self) -> "KeptTeacher":
        """The same, which does not know what it was asked."""
        return self if self.asked is None else dataclasses.replace(self)  # type: ignore[type-var]

    def by_example(self) -> dict[str, Any]:
        """Its fields whose first axis counts examples."""
        raise NotImplementedError


@partial(jax.tree_util.register_dataclass, data_fields=["output"], meta_fields=[])
@dataclass(frozen=True)
class CachedTeacher(KeptTeacher):
    """Logits, and features if some were asked for."""

    output: Output

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """What is cached."""
        missing = [path for path in features if path not in self.output.features]
        _check_head(missing)
        if missing:
            raise ConfigError(
                f"the cached teacher has no feature {missing[0]!r}: cache it with kd.cached(…, features={features!r})"
            )
        return (Output(_wide(self.output.logits), self.output.features),)

    def by_example(self) -> dict[str, Any]:
        """All but what is of all examples."""
        return {"output": self.output}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["classes_of", "log_probabilities", "log_rest"],
    meta_fields=["classes", "rest"],
)
@dataclass(frozen=True)
class TopKTeacher(KeptTeacher):
    """The k most probable classes of every training example, with their log-probabilities, both `[examples, ..., k]`.

    log_rest: the logarithm of what all others sum to, `[examples, ...]`. rest: what becomes of it: `uniform` over the
    others; `renormalised`, none of it; `tail`, one class more, which `kd.TopKKL` alone reads.
    """

    # Arrays, or their shapes.
    classes_of: Any
    log_probabilities: Any
    log_rest: Any
    classes: int
    rest: str

    @property
    def sparse(self) -> Sparse | None:
        """With a tail nothing is known of the other classes."""
        return Sparse("top-k", int(self.classes_of.shape[-1])) if self.rest == "tail" else None

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """Log-probabilities of all classes."""
        _check_features(features, "the most probable classes")
        classes_of = jnp.asarray(self.classes_of)
        known, left = (_wide(jnp.asarray(x)) for x in (self.log_probabilities, self.log_rest))
        others = self.classes - known.shape[-1]
        said = {CLASSES: classes_of, LOG_PROBABILITIES: known, LOG_REST: left} if self.rest == "tail" else {}
        if self.rest == "renormalised" or others == 0:
            known, left = jax.nn.log_softmax(known, axis=-1), jnp.full_like(left, -jnp.inf)
        each = (left - float(np.log(max(1, others))))[..., None]
        everywhere = jnp.broadcast_to(each, (*left.shape, self.classes))
        return (Output(jnp.put_along_axis(everywhere, classes_of, known, axis=-1, inplace=False), said),)

    def by_example(self) -> dict[str, Any]:
        """All but what is of all examples."""
        return {name: getattr(self, name) for name in ("classes_of", "log_probabilities", "log_rest")}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["classes_of", "counts", "ratios"],
    meta_fields=["classes", "draws", "power"],
)
@dataclass(frozen=True)
class SampledTeacher(KeptTeacher):
    """Classes drawn from the teacher, and how often each was, `[examples, ..., distinct]`; 0 times in empty places.

    ratios: p / r of probabilities and those drawn by, p ** power but for a factor; None where the power is 1.
    """

    classes_of: Any
    counts: Any
    ratios: Any
    classes: int
    draws: int
    power: float

    @property
    def sparse(self) -> Sparse | None:
        """The draws."""
        return Sparse("samples", self.draws, self.power)

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """The logarithm of weights whose mean over draws is the teacher's p: of the classes, and as features."""
        _check_features(features, "draws")
        classes_of = jnp.asarray(self.classes_of)
        weights = jnp.asarray(self.counts).astype(jnp.float32) / self.draws
        if self.ratios is not None:
            weights = weights * _wide(jnp.asarray(self.ratios))
        flat = weights.reshape(-1, weights.shape[-1])
        rows = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 0)
        spread = jnp.zeros((flat.shape[0], self.classes), jnp.float32)
        spread = spread.at[rows, classes_of.reshape(flat.shape)].add(flat)
        logits = jnp.log(spread).reshape(*weights.shape[:-1], self.classes)
        return (Output(logits, {CLASSES: classes_of, WEIGHTS: weights}),)

    def by_example(self) -> dict[str, Any]:
        """All but what is of all examples."""
        return {name: getattr(self, name) for name in ("classes_of", "counts", "ratios")}


@partial(jax.tree_util.register_dataclass, data_fields=["hidden", "head", "bias"], meta_fields=["path"])
@dataclass(frozen=True)
class HiddenTeacher(KeptTeacher):
    """Hidden states `[examples, ..., width]` and the head that makes logits of them, `[width, classes]`, with its bias.

    path: the feature that the hidden states are. Methods get logits of a batch; `kd.losses.linear_divergence` needs
    none.
    """

    hidden: Any
    head: Any
    bias: Any
    path: str

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """Logits, and the hidden states as the feature that they are."""
        others = [path for path in features if path not in (self.path, HIDDEN, KERNEL)]
        _check_features(others, f"the feature {self.path!r}")
        hidden = jnp.asarray(self.hidden)
        said = {self.path: hidden}
        if HIDDEN in features:
            said |= {HIDDEN: hidden, KERNEL: jnp.asarray(self.head)}
            said |= {} if self.bias is None else {BIAS: jnp.asarray(self.bias)}
        return (Output(logits_of(hidden, self.head, self.bias), said),)

    def by_example(self) -> dict[str, Any]:
        """All but what is of all examples."""
        return {"hidden": self.hidden}


def logits_of(hidden: Float[Array, "..."], head: Any, bias: Any) -> Float[Array, "..."]:
    """`hidden @ head + bias` in float32."""
    logits = _wide(hidden) @ _wide(jnp.asarray(head))
    if bias is None:
        return logits
    return logits + _wide(jnp.asarray(bias)).reshape((1,) * (logits.ndim - 1) + (-1,))


def kept_teacher(
    keep: Keep, arrays: Arrays, *, classes: int, rest: str, head: tuple[Any, Any] = (None, None), lead: tuple[int, ...]
) -> KeptTeacher:
    """The teacher of what `looked_up` found. lead: the axes in the place of the first."""
    found = {name: jnp.asarray(array.reshape(*lead, *array.shape[1:])) for name, array in arrays.items()}
    if keep.kind == "logits":
        return CachedTeacher(Output(found["logits"], {path: found[f"features.{path}"] for path in keep.features}))
    if keep.kind == "top-k":
        return TopKTeacher(found["classes"], found["log_probabilities"], found["log_rest"], classes, rest)
    if keep.kind == "samples":
        return SampledTeacher(found["classes"], found["counts"], found.get("ratios"), classes, keep.draws, keep.power)
    return HiddenTeacher(found["hidden"], *head, keep.hidden)


def of_inputs(teacher: KeptTeacher, inputs: PyTree) -> KeptTeacher:
    """The teacher, who knows to which inputs its answers are; nothing that is traced."""
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((teacher, inputs))):
        object.__setattr__(teacher, "asked", (form_of(inputs), digest(inputs, as_jax=True)))
    return teacher


def form_of(inputs: PyTree) -> list[list[Any]]:
    """Paths, types as JAX has them and shapes of inputs, as JSON holds them."""
    return [
        [jax.tree_util.keystr(path), str(jax.dtypes.canonicalize_dtype(leaf.dtype)), list(leaf.shape)]
        for path, leaf in jax.tree.leaves_with_path(inputs)
    ]


def _check_within(numbers: Any, count: int | None, what: str) -> None:
    """Raises `DataError` for a number out of [0, count); nothing that is traced, or lies elsewhere."""
    if count is None or isinstance(numbers, jax.core.Tracer) or not getattr(numbers, "is_fully_addressable", True):
        return
    known = np.asarray(numbers)
    if known.dtype.kind in "iu" and known.size and not 0 <= known.min() <= known.max() < count:
        wrong = known.max() if known.min() >= 0 else known.min()
        raise DataError(f"{what} is {wrong}, and the cached teacher has 0 to {count - 1}")


def _check_head(features: Any) -> None:
    """Raises `FeatureError` for what is asked of hidden states and heads, where others were kept."""
    if HIDDEN in features:
        raise FeatureError(HIDDEN, "was not kept")


def _check_features(features: Any, kept: str) -> None:
    _check_head(features)
    if features:
        raise ConfigError(
            f"{kept} of the teacher were kept, without the feature {next(iter(features))!r}: keep logits and features, "
            f"kd.cached(…, features={tuple(features)!r})"
        )


def _wide(values: Array) -> Array:
    """In float32 where they are narrower."""
    return values.astype(jnp.float32) if values.dtype.itemsize < 4 else values
