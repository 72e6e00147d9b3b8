"""The door of Flax NNX: a module that lives, or what constructs one, as a `Model`; and back."""

import hashlib
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array

from kd_jax.errors import ConfigError
from kd_jax.files.digests import calls_back
from kd_jax.models import heads, recording
from kd_jax.models.calling import (
    REMEDY,
    Call,
    arguments,
    as_output,
    check_call,
    check_own_call,
    mode,
    named_parameters,
    unknown_feature,
)
from kd_jax.models.network import Model, Network, Output, Params, PyTree, State, Variables
from kd_jax.models.nnx_modules import constructed, modules, set_mode

# What the key of a step is folded with for streams that are given at the call; those of the module count from 0.
_AT_CALL = 0x7FFFFFFF
_PROBE = "__made_here__"
# Of shapes; a program of fewer is not made sooner than its operations, which JAX keeps.
_MANY = 5


def from_nnx(module: nnx.Module | Callable[..., Any], *, call: Call | None = None) -> Model:
    """A `Model` of an NNX module, or of a class or function `rngs -> module`.

    A module that lives gives its own values, and is never changed. A constructor is called with `nnx.Rngs` of the
    training's key. Of a module's variables `nnx.Param`s are trained, random streams are seeded from `apply`'s key at
    every call, and all others are carried, but what is sown (`nnx.Intermediate`).

    call: `call(module, inputs, train)` where the module is not called as `module(inputs)`, with `train=`,
        `training=`, `deterministic=`, `use_running_average=` and `rngs=` by name where its signature has them. The
        whole module is in training mode then; `module.part.eval()` in a call keeps a part of it as it is.

    Raises `ConfigError`.
    """
    check_own_call(call)
    if isinstance(module, nnx.Module):
        graph, values, streams = _split(_copy(module))
        network = NNXNetwork(graph, _shapes(values), _shapes(streams), call)
        # What trains them may donate the model's arrays.
        copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), values)
        return Model(network, copied, weakref.ref(module))
    if not callable(module):
        raise ConfigError(
            f"a {type(module).__name__} is no NNX module: give an nnx.Module, or a function rngs -> nnx.Module"
        )
    if not isinstance(module, partial) and not jax.tree_util.all_leaves([module]):
        raise ConfigError(
            f"{type(module).__name__} is a PyTree that is called, as Equinox has its modules, and no NNX module: give "
            "kd.from_function(apply, params) with its arrays as the parameters"
        )
    # A graph is no array that a traced function could return.
    graphs: list[Any] = []

    def parts() -> tuple[Variables, PyTree]:
        try:
            made = constructed(module, nnx.Rngs(0))
            # What was made elsewhere cannot be changed while this is traced.
            setattr(made, _PROBE, True)
            delattr(made, _PROBE)
            graph, values, streams = _split(made)
        except TraceContextError:
            raise ConfigError(
                "the function gives a module, or a part of one, that was made outside of it, so that every start is "
                "the same: make it inside, from rngs, or give the module itself (a part: nnx.clone(part))"
            ) from None
        graphs.append(graph)
        return values, streams

    shapes, streams = jax.eval_shape(parts)
    return Model(NNXNetwork(graphs[0], shapes, streams, call, module))


def to_module(model: Model) -> nnx.Module:
    """A new NNX module with a model's variables, in evaluation mode. Raises `ConfigError` for another model."""
    network = model.network
    if not isinstance(network, NNXNetwork):
        raise ConfigError(
            f"a {type(network).__name__} is no NNX module: only a model of kd.from_nnx goes back to one, "
            "and others have model.variables"
        )
    if model.variables is None:
        raise ConfigError("this model has no variables yet: make them with model.init(key), or train it")
    module = network.module(model.variables, jax.random.key(0))
    set_mode(module, train=False)
    return module


@dataclass(frozen=True, eq=False, repr=False)
class NNXNetwork(Network):
    """A `Network` of an NNX module, split once into its graph and its arrays. Its variables: `params` and `state`.

    shapes, streams: the shapes of the variables and of the random streams.
    constructor: None where the module lives.
    """

    graph: Any
    shapes: PyTree
    streams: PyTree
    call: Call | None = None
    constructor: Callable[..., nnx.Module] | None = None

    @property
    def compiles_init(self) -> bool:
        """Where its matrices and kernels have many shapes."""
        return len({leaf.shape for leaf in jax.tree.leaves(self.shapes["params"]) if len(leaf.shape) > 1}) >= _MANY

    def init(self, key: Any) -> Variables:
        """What the constructor gives. Raises `ConfigError` where there is none."""
        if self.constructor is None:
            raise ConfigError(
                "this network was made from a module that lives, which has values of its own and no way to fresh ones: "
                "give a function, kd.from_nnx(lambda rngs: …)"
            )
        return _split(constructed(self.constructor, nnx.Rngs(key)))[1]

    def apply(
        self,
        variables: Variables,
        inputs: PyTree,
        *,
        train: bool = False,
        key: Any = None,
        features: tuple[str, ...] = (),
    ) -> tuple[Output, State]:
        """As of every `Network`. Raises `ConfigError` where training has random streams and no key."""
        module = self.module(variables, key, train=train)
        of_head = heads.HIDDEN in features
        features = tuple(path for path in features if path not in (heads.HIDDEN, heads.KERNEL))
        with heads.watched(module, wanted=of_head) as calls:
            recorded = recording.start(module, features)
            result = self._asked(module, variables, inputs, train, key, features)
        output = as_output(result, type(module).__name__)
        output = recording.finish(module, recorded, heads.with_head(output, calls) if of_head else output)
        if not train:
            return output, variables["state"]
        return output, _same_structure(_split(module)[1]["state"], variables["state"])

    def _asked(
        self, module: nnx.Module, variables: Variables, inputs: PyTree, train: bool, key: Any, features: tuple[str, ...]
    ) -> Any:
        """What the module returns; a feature that cannot be recorded is told as such."""
        try:
            return self._called(module, inputs, train, key)
        except (TypeError, ValueError) as error:
            if features and not isinstance(error, ConfigError):
                self._check_features(variables, inputs, features)
            raise

    def split(self, variables: Variables) -> tuple[Params, State]:
        """`params` and `state` of the variables."""
        if not (isinstance(variables, Mapping) and set(variables) == {"params", "state"}):
            raise ConfigError("variables of an NNX model are a dict with params and state: take those of kd.from_nnx")
        return variables["params"], variables["state"]

    def merge(self, params: Params, state: State) -> Variables:
        """A dict with `params` and `state`."""
        return {"params": params, "state": state}

    def bound(self, variables: Variables) -> nnx.Module | None:
        """The module in evaluation mode, unless it is called in a way of the user's own."""
        return None if self.call is not None else to_module(Model(self, variables))

    def feature_shapes(self, variables: Variables, inputs: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
        """Outputs of all submodules that are called, and whatever the module itself returns by name."""

        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (variables, inputs))
        names = tuple(recording.submodules(self.module(variables, None)))

        def recorded(paths: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
            def all_features(values: Variables, given: PyTree) -> Mapping[str, Any]:
                module = self.module(values, None)
                found = recording.record(module, paths)
                output = as_output(self._called(module, given, False, None), type(module).__name__)
                return {**output.features, **recording.outputs(found)}

            try:
                return dict(jax.eval_shape(all_features, *shapes))
            except (TypeError, ValueError):
                # Some, such as the cell of a recurrent layer, are called where nothing can be recorded.
                if not paths:
                    raise
                half = len(paths) // 2
                return {**recorded(paths[:half]), **recorded(paths[half:])} if half else {}

        return {**recorded(()), **recorded(names)}

    def _check_features(self, variables: Variables, inputs: PyTree, features: tuple[str, ...]) -> None:
        """Raises `ConfigError` for a feature that cannot be recorded, and whatever the model itself raises."""
        names = self.feature_shapes(variables, inputs)
        for path in features:
            if path not in names:
                raise unknown_feature(path, names)

    def module(self, variables: Variables, key: Any, *, train: bool = False) -> nnx.Module:
        """The module with these variables, its random streams seeded from `key`."""
        if key is None and train and jax.tree.leaves(self.streams):
            raise ConfigError("training draws random numbers: give apply(…, train=True, key=jax.random.key(…))")
        params, state = self.split(variables)
        streams = _seeded(self.streams, jax.random.key(0) if key is None else key)
        return nnx.merge(self.graph, params, streams, state)

    def _called(self, module: nnx.Module, inputs: PyTree, train: bool, key: Any) -> Any:
        for part in modules(module).values():
            # An empty one makes of `sow` and `perturb` what they are outside of `nnx.capture`: nothing.
            if not isinstance(part, nnx.bridge.ToNNX):
                setattr(part, "__captures__", ())  # noqa: B010
        set_mode(module, train=train)
        if self.call is not None:
            return self.call(module, inputs, train)
        if not recording.is_callable(module):
            raise ConfigError(f"{type(module).__name__} has no __call__: {REMEDY}")
        known = named_parameters(type(module).__call__)
        args, kwargs = arguments(inputs)
        kwargs |= mode(known, train=train)
        if "rngs" in known and "rngs" not in kwargs:
            needed = known["rngs"].default is inspect.Parameter.empty
            if train and key is None:
                raise ConfigError("training draws random numbers: give apply(…, train=True, key=jax.random.key(…))")
            if train or needed:
                key = jax.random.fold_in(jax.random.key(0) if key is None else key, _AT_CALL)
                kwargs["rngs"] = nnx.Rngs(jax.random.fold_in(key, 0), dropout=jax.random.fold_in(key, 1))
        check_call(type(module).__call__, (module, *args), kwargs, type(module).__name__)
        return module(*args, **kwargs)

    @cached_property
    def _value(self) -> tuple[Any, ...]:
        leaves, structure = jax.tree.flatten((self.shapes, self.streams))
        return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), self.call

    @cached_property
    def _hash(self) -> int:
        try:
            return hash((self.graph, self._value))
        except TypeError:
            # A static attribute that has no hash, a list.
            return hash(self._value)

    @cached_property
    def _start(self) -> bytes:
        """Tells constructors apart that make one graph with different values: the program that makes them."""
        program = jax.make_jaxpr(self.init)(jax.random.key(0))
        written = str(program.jaxpr)
        if calls_back(written):
            # Of a function of Python it says too little: these are compared while both are there.
            written += str(id(self.constructor))
        digest = hashlib.sha256(written.encode())
        for constant in program.consts:
            is_key = jnp.issubdtype(constant.dtype, jax.dtypes.prng_key)
            digest.update(jax.device_get(jax.random.key_data(constant) if is_key else constant).tobytes())
        return digest.digest()

    def __hash__(self) -> int:
        """As of all that is compared."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether graph, shapes, call and the program of the constructor are equal by value."""
        if self is other:
            return True
        if not isinstance(other, NNXNetwork) or hash(self) != hash(other):
            return False
        if self._value != other._value or not _equal_graphs(self.graph, other.graph):
            return False
        if self.constructor is None or other.constructor is None:
            return self.constructor is other.constructor
        return self.constructor is other.constructor or self._start == other._start


def _copy(module: nnx.Module) -> nnx.Module:
    """A module of the same arrays that may be changed, without what was sown."""
    graph, state = nnx.split(module)
    copy: nnx.Module = nnx.merge(graph, state)
    nnx.pop(copy, nnx.Intermediate)
    return copy


def _split(module: nnx.Module) -> tuple[Any, Variables, PyTree]:
    """The graph in evaluation mode, the variables, and the random streams."""
    set_mode(module, train=False)
    graph, *parts = nnx.split(module, nnx.Param, nnx.RngState, nnx.Intermediate, ...)
    params, streams, _, state = parts
    values = {"params": nnx.to_pure_dict(params), "state": nnx.to_pure_dict(state)}
    return graph, jax.tree.map(_strong, values), nnx.to_pure_dict(streams)


def _strong(leaf: Any) -> Any:
    """An array of its type for good: one of a Python number would change its type in the first step."""
    array = jnp.asarray(leaf)
    # A key of `jax.random` has no such thing.
    return jnp.asarray(array, array.dtype) if getattr(array, "weak_type", False) else leaf


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.asarray(leaf).dtype), tree)


def _same_structure(found: State, wanted: State) -> State:
    """What of `found` has its place in `wanted`: a module that leaves an array behind at its call does not carry it."""
    if not isinstance(wanted, Mapping):
        return found
    return {name: _same_structure(found[name], value) for name, value in wanted.items() if name in found}


def _seeded(streams: PyTree, key: Any) -> PyTree:
    """Fresh random streams: each key leaf folded from `key` by its position, each counter at 0."""
    leaves, structure = jax.tree.flatten(streams)

    def fresh(position: int, leaf: jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.fold_in(key, position), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.unflatten(structure, [fresh(i, leaf) for i, leaf in enumerate(leaves)])


def _equal_graphs(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except ValueError:
        # An array as a static attribute: its comparison is no truth value.
        return False
