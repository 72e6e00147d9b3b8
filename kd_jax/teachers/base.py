"""`Teacher`, and those that answer inputs: a network, a function, several at once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kd_jax.errors import ConfigError
from kd_jax.files.digests import text_digest
from kd_jax.methods.sparse import Sparse
from kd_jax.models import Network, Output, as_output
from kd_jax.models.compiled import Own, Owner, Token
from kd_jax.models.heads import HIDDEN, no_head
from kd_jax.models.host import HostNetwork

PyTree = Any
Places = Int[Array | np.ndarray, "rows positions"]


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

    @property
    def places(self) -> tuple[int, ...] | None:
        """The axes between those of examples and classes of what it knows; None where that is not known."""
        return None

    @property
    def sparse(self) -> Sparse | None:
        """How much of the classes it knows; None where methods may read all of its logits."""
        return None

    @property
    def parts(self) -> int:
        """In how many parts of the examples it had best be asked: what is on disk need not fit into memory."""
        return 1

    @property
    def owner(self) -> Owner | None:
        """What is compiled into programs without being an array, and is not kept alive by them; None for nothing."""
        return None

    @property
    def host(self) -> str | None:
        """The digest of models of other libraries that it asks, of which a program says nothing; None without any."""
        return None

    def take(self, rows: Int[Array | np.ndarray, "..."]) -> "Teacher":
        """The teacher of the examples `rows` alone."""
        return self

    def at(self, examples: Places, positions: Places) -> "Teacher":
        """The teacher of single positions of examples, of packed sequences."""
        if self.per_example:
            raise ConfigError(f"{type(self).__name__} is looked up by whole examples: define at(examples, positions)")
        return self

    def part(self, rows: Int[Array | np.ndarray, "..."]) -> "Teacher":
        """A teacher that compiled programs may ask for these rows, which are distinct."""
        return self

    def shapes(self, count: int) -> "Teacher":
        """The shapes of `take` of so many rows."""
        return jax.eval_shape(lambda known, rows: known.take(rows), self, jax.ShapeDtypeStruct((count,), jnp.int32))

    def check_inputs(self, inputs: PyTree) -> None:
        """Raises `MismatchError` for other inputs than those that the answers are to."""

    def in_memory(self) -> "Teacher":
        """The same, with all that it knows in memory."""
        return self

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """What it says of the inputs: one `Output`, or several where the mean of their losses is taken."""
        raise ConfigError(f"{type(self).__name__} says nothing: define outputs(inputs, *, features=())")


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class LiveTeacher(Teacher):
    """A network that answers inside the step, on the view that the student sees."""

    network: Network
    variables: PyTree
    # The module that it was made of, to be known until it is flattened.
    origin: ClassVar[Any] = None

    @property
    def owner(self) -> Owner | None:
        """Of its network, where that is a model of another library."""
        return self.network.owner if isinstance(self.network, HostNetwork) else None

    @property
    def host(self) -> str | None:
        """Of its network, where that is one."""
        return self.network.host.digest if isinstance(self.network, HostNetwork) else None

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """In evaluation mode."""
        key = jax.random.key(0)
        return (self.network.apply(self.variables, inputs, train=False, key=key, features=features)[0],)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """The variables; the network, or what stands for one whose model JAX shall not keep."""
        known = self.network if self.owner is None else self.owner.token
        return ((jax.tree_util.GetAttrKey("variables"), self.variables),), known

    @classmethod
    def tree_unflatten(cls, known: Any, parts: Any) -> "LiveTeacher":
        """As it was flattened."""
        return cls(known.find() if isinstance(known, Token) else known, *parts)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class FunctionTeacher(Teacher):
    """A function `inputs -> logits`, called inside the step.

    Each is another one, though the function be the same: what it reads may have changed, and is compiled into programs.
    """

    function: Own

    @property
    def owner(self) -> Owner | None:
        """The function."""
        return self.function

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """What the function gives."""
        output = as_output(self.function(inputs))
        missing = [path for path in features if path not in output.features]
        if HIDDEN in missing:
            raise no_head()
        if missing:
            raise ConfigError(
                f"the teacher is a function, which has no feature {missing[0]!r}: give a module, or return "
                "kd.Output(logits, features)"
            )
        return (output,)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """No arrays."""
        return (), self.function.token

    @classmethod
    def tree_unflatten(cls, token: Token, parts: Any) -> "FunctionTeacher":
        """As it was flattened."""
        return cls(token.find())


@partial(jax.tree_util.register_dataclass, data_fields=["teachers"], meta_fields=["mean"])
@dataclass(frozen=True)
class SeveralTeachers(Teacher):
    """Several teachers; `mean` of their `probabilities` (softmaxes at temperature 1), `logits`, or of the `losses` by
    each.
    """

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

    @property
    def owner(self) -> Owner | None:
        """The first that there is."""
        return next((teacher.owner for teacher in self.teachers if teacher.owner is not None), None)

    @property
    def host(self) -> str | None:
        """Of all that there are."""
        known = [teacher.host for teacher in self.teachers]
        return text_digest(*map(str, known)) if any(known) else None

    @property
    def parts(self) -> int:
        """The most of any."""
        return max(teacher.parts for teacher in self.teachers)

    def take(self, rows: Int[Array | np.ndarray, "..."]) -> "SeveralTeachers":
        """Each of these rows."""
        return self._each(lambda teacher: teacher.take(rows))

    def at(self, examples: Places, positions: Places) -> "SeveralTeachers":
        """Each of these positions."""
        return self._each(lambda teacher: teacher.at(examples, positions))

    def part(self, rows: Int[Array | np.ndarray, "..."]) -> "SeveralTeachers":
        """Each of these rows."""
        return self._each(lambda teacher: teacher.part(rows))

    def shapes(self, count: int) -> "SeveralTeachers":
        """Of each."""
        return self._each(lambda teacher: teacher.shapes(count))

    def check_inputs(self, inputs: PyTree) -> None:
        """Of each."""
        for teacher in self.teachers:
            teacher.check_inputs(inputs)

    def in_memory(self) -> "SeveralTeachers":
        """Each in memory."""
        return self._each(lambda teacher: teacher.in_memory())

    def _each(self, function: Callable[[Teacher], Teacher]) -> "SeveralTeachers":
        return SeveralTeachers(tuple(map(function, self.teachers)), self.mean)

    def outputs(self, inputs: PyTree, *, features: tuple[str, ...] = ()) -> tuple[Output, ...]:
        """One output, the mean; or those of all."""
        if HIDDEN in features and self.mean != "losses" and len(self.teachers) > 1:
            raise ConfigError(
                f"the mean of the teachers' {self.mean} is no hidden states times a head, and kd.fused_linear takes "
                'such: give kd.several(teachers, mean="losses")'
            )
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
        given = [jnp.asarray(output.logits) for output in each]
        kind = max((np.dtype(np.float32), *(logits.dtype for logits in given)), key=lambda kind: kind.itemsize)
        logits = jnp.stack([logits.astype(kind) for logits in given])
        if self.mean == "probabilities":
            # Of the logits' own size: equal teachers say what one of them does.
            sizes = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            mean = jax.nn.logsumexp(logits - sizes, axis=0) - float(np.log(len(each)))
            return (Output(mean + jnp.mean(sizes, axis=0), each[0].features),)
        return (Output(jnp.mean(logits, axis=0), each[0].features),)
