"""`Network`: a model as pure functions. `Model`: a network and its variables. `Output`: what a network says."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Num

from kd_jax.errors import ConfigError
from kd_jax.files import as_numpy
from kd_jax.models.compiled import call
from kd_jax.models.fresh import fresh
from kd_jax.models.trying import told

PyTree = Any
Params = PyTree
State = PyTree
Variables = PyTree


class Output(NamedTuple):
    """What a network says of a batch.

    logits: unnormalised log-probabilities `[batch, *positions, classes]`, or of a regression `[..., outputs]`.
    features: activations by path, those that were asked for and those that the model itself returned.
    """

    logits: Num[Array, "..."]
    features: Mapping[str, Any] = {}


class Network(abc.ABC):
    """A model as pure functions, which can be jitted, differentiated, scanned and vmapped.

    Networks are frozen, hashable and equal by value, so that a program with a network as a static argument is compiled
    once for all equal ones. `variables` are the parameters, which are trained, and the state, which is carried (batch
    statistics, say).
    """

    @property
    def compiles_init(self) -> bool:
        """Whether `init` as one program is made sooner than operation by operation."""
        return False

    @abc.abstractmethod
    def init(self, key: Any) -> Variables:
        """Fresh variables from a key of `jax.random`."""

    @abc.abstractmethod
    def apply(
        self,
        variables: Variables,
        inputs: PyTree,
        *,
        train: bool = False,
        key: Any = None,
        features: tuple[str, ...] = (),
    ) -> tuple[Output, State]:
        """The output for a batch, and the state after it, which only training changes.

        inputs: what the model is called with: an array, or a tuple or dict of its arguments.
        key: of the random numbers of training (dropout, say).
        features: paths of submodules whose outputs `Output.features` shall hold.
        """

    @abc.abstractmethod
    def split(self, variables: Variables) -> tuple[Params, State]:
        """The parameters and the state."""

    @abc.abstractmethod
    def merge(self, params: Params, state: State) -> Variables:
        """The variables of parameters and state."""

    def bound(self, variables: Variables) -> Any:
        """The module with these variables, in evaluation mode, of a network that is one of NNX; else None."""
        return None

    def feature_shapes(self, variables: Variables, inputs: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
        """Every feature that `apply` can give, by path. Arrays may be `jax.ShapeDtypeStruct`s: nothing is computed."""
        output = jax.eval_shape(lambda values, given: self.apply(values, given)[0], variables, inputs)
        return dict(output.features)


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A network with its variables; without them (None) a training makes them from its key.

    Called, it gives the logits of a batch, in evaluation mode unless `train` is asked for, compiled.
    origin: a weak reference to the module that the variables were copied from.
    """

    network: Network
    variables: Variables = None
    origin: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the weak reference."""
        return vars(self) | {"origin": None}

    def init(self, key: Any) -> "Model":
        """This model with fresh variables, from a whole number or a key of `jax.random`."""
        key = jax.random.key(int(key)) if isinstance(key, int | np.integer) else key
        return Model(self.network, fresh(self.network, key))

    def __call__(
        self, inputs: PyTree, *, train: bool = False, key: Any = None, features: str | Sequence[str] = ()
    ) -> Any:
        """Logits of a batch, or an `Output` where features are asked for by their paths. Raises `ConfigError`.

        inputs: an array, list or tensor, or a tuple or dict of what the model is called with. What training changes in
            the state (the batch statistics, say) is not kept.
        """
        if self.variables is None:
            raise ConfigError("this model has no variables yet: make them with model.init(key), or train it")
        inputs = jax.tree.map(_array, inputs, is_leaf=lambda value: isinstance(value, list))
        paths = (features,) if isinstance(features, str) else tuple(features)
        with told("the model", inputs):
            output = call(_output, self.variables, inputs, key, network=self.network, train=train, features=paths)
        return output if paths else output.logits

    def __repr__(self) -> str:
        """The kind of network and its size."""
        count = "no variables yet" if self.variables is None else f"{count_parameters(self)} parameters"
        return f"Model({type(self.network).__name__}, {count})"


def count_parameters(params: Params | Model) -> int:
    """Number of trained numbers in `params`, or in a model. Raises `ConfigError` where it has no variables."""
    if isinstance(params, Model):
        if params.variables is None:
            raise ConfigError("this model has no variables to count: make them with model.init(key)")
        params = params.network.split(params.variables)[0]
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(params))


def _array(value: Any) -> Any:
    return value if isinstance(value, jax.Array | np.ndarray) else as_numpy(value, "an input")


def _output(
    variables: Variables, inputs: PyTree, key: Any, *, network: Network, train: bool, features: tuple[str, ...]
) -> Output:
    return network.apply(variables, inputs, train=train, key=key, features=features)[0]
