"""The door of plain functions: `apply(params, inputs) -> logits`, as a `Model`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kd_jax.errors import ConfigError
from kd_jax.models.calling import as_output, check_call, named_parameters, unknown_feature
from kd_jax.models.compiled import hashable
from kd_jax.models.network import Model, Network, Output, Params, PyTree, State, Variables


def from_function(
    apply: Callable[..., Any],
    params: Params = None,
    *,
    init: Callable[[Any], Params] | None = None,
    state: State = None,
) -> Model:
    """A `Model` of `apply(params, inputs) -> logits`, or an `Output`, with given parameters or `init(key) -> params`.

    Where the signature of `apply` has `train` or `key`, they are given by name; a `key` that has a default in training
    alone, so that None means evaluation. `Model.variables` is the PyTree of the parameters itself.

    state: what is carried from step to step, at the start. With it `apply(params, state, inputs)` returns `(logits,
        state)`, and `Model.variables` is a dict with `params` and `state`.

    Raises `ConfigError`.
    """
    if not callable(apply):
        raise ConfigError(f"apply is a {type(apply).__name__}: give a function apply(params, inputs) -> logits")
    if (params is None) == (init is None):
        raise ConfigError(
            "from_function needs either parameters or what makes them: give from_function(apply, params) or "
            "from_function(apply, init=init) with init(key) -> params"
        )
    if callable(params):
        raise ConfigError("params is a function: give from_function(apply, init=init) with init(key) -> params")
    network = FunctionNetwork(hashable(apply), hashable(init), None if state is None else _Held(state))
    return Model(network, None if params is None else network.merge(params, state))


class _Held:
    """A PyTree that is compared and hashed as the object that it is, for its arrays have no hash."""

    def __init__(self, tree: PyTree):
        self.tree = tree

    def __hash__(self) -> int:
        return id(self.tree)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.tree is other.tree


@dataclass(frozen=True)
class FunctionNetwork(Network):
    """A `Network` of a function. Its variables are the parameters, or `params` and `state` where there is a state."""

    function: Callable[..., Any]
    make: Callable[[Any], Params] | None = None
    first_state: _Held | None = None

    def init(self, key: Any) -> Variables:
        """What the function makes of the key. Raises `ConfigError` where there is none."""
        if self.make is None:
            raise ConfigError(
                "this network was made from parameters alone, and has no way to fresh ones: give "
                "kd.from_function(apply, init=init)"
            )
        return self.merge(self.make(key), None if self.first_state is None else self.first_state.tree)

    def apply(
        self,
        variables: Variables,
        inputs: PyTree,
        *,
        train: bool = False,
        key: Any = None,
        features: tuple[str, ...] = (),
    ) -> tuple[Output, State]:
        """As of every `Network`. Features are those that the function itself returns. Raises `ConfigError`."""
        params, state = self.split(variables)
        given = (params, inputs) if self.first_state is None else (params, state, inputs)
        known = named_parameters(self.function)
        named: dict[str, Any] = {"train": train} if "train" in known else {}
        if "key" in known and (train or known["key"].default is inspect.Parameter.empty):
            named["key"] = key
        what = getattr(self.function, "__name__", type(self.function).__name__)
        check_call(self.function, given, named, what)
        result = self.function(*given, **named)
        if self.first_state is not None:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise ConfigError(f"{what} has a state and returns a {type(result).__name__}: return (logits, state)")
            result, state = result[0], result[1] if train else state
        output = as_output(result, what)
        for path in features:
            if path not in output.features:
                raise unknown_feature(path, output.features)
        return output, state

    def split(self, variables: Variables) -> tuple[Params, State]:
        """The parameters, and the state or an empty dict."""
        if self.first_state is None:
            return variables, {}
        if not (isinstance(variables, Mapping) and set(variables) == {"params", "state"}):
            raise ConfigError("variables of a function with a state are a dict with params and state: give both")
        return variables["params"], variables["state"]

    def merge(self, params: Params, state: State) -> Variables:
        """The parameters, or a dict with `params` and `state`."""
        return params if self.first_state is None else {"params": params, "state": state}
