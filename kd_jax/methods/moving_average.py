"""A teacher that is the moving average of its own student."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kd_jax.data.batch import Batch
from kd_jax.errors import ConfigError
from kd_jax.methods.base import Method, Parts, PyTree, Terms, Wrapped, as_method, terms_of
from kd_jax.models import Model, Network, Output, as_model
from kd_jax.models.network import Params, State, Variables

AVERAGE = "average"
"""The path of the average's logits."""


@dataclass(frozen=True)
class SelfTaught(Wrapped):
    """A method whose teacher is the average of its student; `self_taught` makes it."""

    method: Method
    needs_teacher: ClassVar[bool] = False
    compares_logits: ClassVar[bool] = False

    @property
    def student_features(self) -> tuple[str, ...]:
        """Those of the method, and the average's logits."""
        return (*self.method.student_features, AVERAGE)

    def init(self, key: Any, student: Output, teacher: Output | None) -> Parts:
        """As the method, taught by the average."""
        return super().init(key, student, Output(student.features[AVERAGE]))

    def loss(
        self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Terms, PyTree]:
        """The method's terms with the average as its teacher."""
        return terms_of(self.method, parts, student, Output(student.features[AVERAGE]), batch, step)


def self_taught(method: Method) -> SelfTaught:
    """The method with the moving average of the student as its teacher: Tarvainen and Valpola (2017),
    https://arxiv.org/abs/1703.01780.

    The student is one of `with_average`, and the training has no other teacher: `kd.distill(kd.with_average(net), None,
    data, method=kd.self_taught(kd.KD()))`. Raises `ConfigError` for a method that compares features.
    """
    method = as_method(method)
    if method.teacher_features:
        raise ConfigError(f"{type(method).__name__} compares features, and the average gives logits: use such a method")
    return SelfTaught(method)


def with_average(student: Any, *, decay: float = 0.999) -> Model:
    """A student that carries the moving average of its parameters, which teaches it (`self_taught`).

    decay: the share of the old average in a step; at first 1 − 1 / steps, so that the initial parameters do not stay in
    it. The average answers in evaluation mode, with the student's own state (batch statistics). Its logits are the
    feature `average`, and `kd.averaged(result.model)` is the model. Of parameters in bfloat16 or float16 the average is
    kept in float32, and answers in their type. With `dtype=jnp.bfloat16` it is the average of the rounded parameters.
    Raises `ConfigError` for a decay outside [0, 1).
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float | np.number) or not 0 <= decay < 1:
        raise ConfigError(f"decay is {decay!r}: it must be at least 0 and below 1")
    model = as_model(student)
    variables = model.variables
    if variables is None:
        variables = jax.eval_shape(model.network.init, jax.random.key(0))
    types = tuple(jnp.result_type(leaf) for leaf in jax.tree.leaves(model.network.split(variables)[0]))
    network = _Averaged(model.network, float(decay), types)
    return Model(network, None if model.variables is None else network.around(model.variables))


def averaged(model: Model) -> Model:
    """The average that a model of `with_average` carries, as a model of its own. Raises `ConfigError` for another."""
    model = as_model(model)
    if not isinstance(model.network, _Averaged) or model.variables is None:
        raise ConfigError(f"{model!r} carries no average: give the model of a training of kd.with_average")
    state = model.variables["state"]
    inner = model.network.student
    return Model(inner, inner.merge(model.network.narrowed(state["average"]), state["student"]))


@dataclass(frozen=True)
class _Averaged(Network):
    """A network beside the average of its parameters, which is state. types: of the parameters, one by one."""

    student: Network
    decay: float
    types: tuple[Any, ...]

    def init(self, key: Any) -> Variables:
        """A new student, who is its own average."""
        return self.around(self.student.init(key))

    def around(self, variables: Variables) -> Variables:
        """A student's variables, and the average of nothing yet."""
        params, state = self.student.split(variables)
        average = jax.tree.map(_wide, params)
        return {
            "params": params, "state": {"student": state, "average": average, "steps": jnp.zeros((), jnp.int32)}
        }  # fmt: skip

    def apply(
        self, variables: Variables, inputs: PyTree, *, train: bool = False, key: Any = None,
        features: tuple[str, ...] = (),
    ) -> tuple[Output, State]:  # fmt: skip
        """The student's output and the average's logits; training moves the average to the parameters before it."""
        params, state = variables["params"], variables["state"]
        asked = tuple(path for path in features if path != AVERAGE)
        own = self.student.merge(params, state["student"])
        output, inner = self.student.apply(own, inputs, train=train, key=key, features=asked)
        average, steps = state["average"], state["steps"]
        if train:
            steps = steps + 1
            share = jnp.minimum(jnp.float32(self.decay), 1 - 1 / steps.astype(jnp.float32))
            average = jax.tree.map(lambda old, new: _moved(old, new, share), average, params)
        there = self.student.merge(self.narrowed(average), state["student"])
        said = jax.lax.stop_gradient(self.student.apply(there, inputs, train=False, key=key)[0].logits)
        after = {"student": inner, "average": average, "steps": steps} if train else state
        return Output(output.logits, {**output.features, AVERAGE: said}), after

    def narrowed(self, average: Params) -> Params:
        """The average in the types of the parameters."""
        leaves, structure = jax.tree.flatten(average)
        return jax.tree.unflatten(structure, [leaf.astype(kind) for leaf, kind in zip(leaves, self.types, strict=True)])

    def split(self, variables: Variables) -> tuple[Params, State]:
        """The student's parameters; the average belongs to the state."""
        return variables["params"], variables["state"]

    def merge(self, params: Params, state: State) -> Variables:
        """Both."""
        return {"params": params, "state": state}


def _wide(leaf: Any) -> Array:
    """A copy; in half precision a step's share of the average would be rounded away."""
    array = jnp.array(leaf, copy=True)
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(jnp.float32) if narrow else array


def _moved(old: Array, new: Array, share: Array) -> Array:
    new = jax.lax.stop_gradient(new).astype(old.dtype)
    return share.astype(old.dtype) * old + (1 - share).astype(old.dtype) * new
