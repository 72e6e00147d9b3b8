"""The door of Flax Linen: a module with example inputs or variables, as a `Model`."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import errors, linen
from flax.core import unfreeze

from kd_jax.errors import ConfigError
from kd_jax.files import inputs_of
from kd_jax.files.names import path_name
from kd_jax.models.calling import (
    Call,
    arguments,
    as_output,
    check_call,
    check_own_call,
    mode,
    named_arrays,
    named_parameters,
    unknown_feature,
)
from kd_jax.models.network import Model, Network, Output, Params, PyTree, State, Variables

_SOWN = "intermediates"


def from_linen(
    module: linen.Module,
    inputs: PyTree = None,
    *,
    variables: Variables = None,
    call: Call | None = None,
    mutable: Sequence[str] | None = None,
    rngs: Sequence[str] = ("dropout",),
) -> Model:
    """A `Model` of a Linen module, with given variables, or with those that example inputs and a key make.

    `params` are trained, all other collections are carried, but `intermediates` and what else is sown.

    inputs: arrays, `jax.ShapeDtypeStruct`s, or a `Batch` of them, as the module is called with: `module(x)`, of a tuple
        `module(*inputs)`, of a dict `module(**inputs)`. Their shapes alone matter.
    call: `call(module, inputs, train)` where the module is called in another way. Without it `train`, `training`,
        `deterministic` and `use_running_average` are given where the signature, or a field of the module, has them.
    mutable: collections that training may change; None for all but `params`.
    rngs: random streams that have a key of their own in training; others draw from `params`, as Flax has it. In
        evaluation there are none (`has_rng` is False), unless the module draws from one all the same.

    Raises `ConfigError`.
    """
    if not isinstance(module, linen.Module):
        raise ConfigError(
            f"a {type(module).__name__} is no Linen module: give flax.linen.Module(…), or use kd.from_nnx or "
            "kd.from_function"
        )
    check_own_call(call)
    if inputs is None and variables is None:
        raise ConfigError(
            "a Linen module has no parameters before it has seen inputs: give from_linen(module, inputs), an array or "
            "jax.ShapeDtypeStruct as it is called with, or variables="
        )
    example = None if inputs is None else jax.tree.map(_shape, inputs_of(inputs), is_leaf=lambda leaf: leaf is None)
    network = LinenNetwork(
        module,
        None if example is None else _frozen(example),
        call,
        None if mutable is None else tuple(mutable),
        tuple(rngs),
    )
    if variables is None:
        jax.eval_shape(network.init, jax.random.key(0))
        return Model(network)
    variables = _plain(variables)
    if not variables or any(not isinstance(value, Mapping) for value in variables.values()):
        raise ConfigError(
            f"the variables of {type(module).__name__} have no collections: give what module.init returns, "
            "{'params': …, 'batch_stats': …}"
        )
    if "params" not in variables:
        raise ConfigError(
            f"the variables of {type(module).__name__} have {', '.join(variables)} and no params: give what "
            "module.init returns, or variables={'params': …}"
        )
    if example is not None:
        _check_params(network, variables)
    return Model(network, variables)


@dataclass(frozen=True, eq=False, repr=False)
class LinenNetwork(Network):
    """A `Network` of a Linen module. Its variables are Linen's dict of collections.

    example: structure and shapes of example inputs, or None where there are none to make variables with.
    """

    linen_module: linen.Module
    example: tuple[Any, ...] | None
    call: Call | None = None
    mutable: tuple[str, ...] | None = None
    rngs: tuple[str, ...] = ("dropout",)

    @property
    def compiles_init(self) -> bool:
        """It is one program in any case."""
        return True

    def init(self, key: Any) -> Variables:
        """What the module makes of zeros as inputs. Raises `ConfigError` where their shapes are not known."""
        if self.example is None:
            raise ConfigError(
                "this network was made from variables alone, and fresh ones need example inputs: give "
                "kd.from_linen(module, inputs)"
            )
        return _initial(self, key)

    def apply(
        self,
        variables: Variables,
        inputs: PyTree,
        *,
        train: bool = False,
        key: Any = None,
        features: tuple[str, ...] = (),
    ) -> tuple[Output, State]:
        """As of every `Network`. Raises `ConfigError` where training draws random numbers and has no key."""
        state = self.split(variables)[1]
        result, changed = self._run(variables, inputs, train, key, set(features) if features else None)
        output = as_output(result, type(self.linen_module).__name__)
        if features:
            found = {**output.features, **_recorded(changed)}
            for path in features:
                if path not in found:
                    raise unknown_feature(path, [*found, *self.feature_shapes(variables, inputs)])
            output = output._replace(features={**output.features, **{path: found[path] for path in features}})
        return output, _carried(changed, state) if train else state

    def split(self, variables: Variables) -> tuple[Params, State]:
        """The collection `params`, and all others."""
        if not isinstance(variables, Mapping):
            raise ConfigError("variables of a Linen model are a dict of collections: give what module.init returns")
        return variables.get("params", {}), {name: value for name, value in variables.items() if name != "params"}

    def merge(self, params: Params, state: State) -> Variables:
        """A dict of collections."""
        return {"params": params, **state}

    def feature_shapes(self, variables: Variables, inputs: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
        """Outputs of all submodules that are called, and whatever the module itself returns by name."""

        def all_features(values: Variables, given: PyTree) -> Mapping[str, Any]:
            result, changed = self._run(values, given, False, None, "all")
            return {**as_output(result, type(self.linen_module).__name__).features, **_recorded(changed)}

        shapes = jax.tree.map(_shape, (variables, inputs))
        return dict(jax.eval_shape(all_features, *shapes))

    def _run(
        self, variables: Variables, inputs: PyTree, train: bool, key: Any, wanted: set[str] | str | None
    ) -> tuple[Any, Mapping[str, Any]]:
        """What the module returns, and the collections that it changed. wanted: features, or `all`."""
        state = self.split(variables)[1]
        # In evaluation, too, a module may count its calls; it is not kept there.
        changing = list(state if self.mutable is None or not train else self.mutable)
        capture = False if wanted is None else lambda part, method: _is_wanted(part, method, wanted)
        module, method, args, kwargs = self._call(inputs, train=train)
        keys = {} if key is None else {"params": jax.random.fold_in(key, 0)}
        for place, name in enumerate(self.rngs if key is not None else ()):
            keys[name] = key if place == 0 else jax.random.fold_in(key, place)
        called = partial(
            module.apply, variables, *args, method=method, mutable=changing if wanted is None else [*changing, _SOWN],
            capture_intermediates=capture, **kwargs,
        )  # fmt: skip
        if keys and not train:
            # In evaluation there is a stream only where the module draws from one, whether it asks for it or not.
            with contextlib.suppress(errors.InvalidRngError):
                return called(rngs={})
        try:
            return called(rngs=keys)
        except errors.InvalidRngError as error:
            if key is None:
                raise ConfigError(
                    f"{type(module).__name__} draws random numbers: give apply(…, key=jax.random.key(…))"
                ) from None
            raise ConfigError(
                f"{type(module).__name__} asks for an unknown random stream ({_first_line(error)}): name it in "
                "kd.from_linen(…, rngs=('dropout', 'its name'))"
            ) from None

    def _call(self, inputs: PyTree, *, train: bool) -> tuple[linen.Module, Any, tuple[Any, ...], dict[str, Any]]:
        """The module, and how it is called: method, arguments by place and by name."""
        module = self.linen_module
        if self.call is not None:
            return module, self.call, (inputs, train), {}
        function = type(module).__call__
        known = mode(named_parameters(function), train=train)
        if not known:
            module = module.clone(**cast("dict[str, Any]", mode((field.name for field in fields(module)), train=train)))
        args, kwargs = arguments(inputs)
        kwargs |= known
        check_call(function, (module, *args), kwargs, type(module).__name__)
        return module, None, args, kwargs

    @cached_property
    def _hash(self) -> int:
        rest = (self.example, self.call, self.mutable, self.rngs)
        try:
            return hash((self.linen_module, rest))
        except TypeError:
            # A field that has no hash, a dictionary.
            return hash((type(self.linen_module), rest))

    def __hash__(self) -> int:
        """As of all that is compared."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether module and all else are equal by value."""
        if self is other:
            return True
        if not isinstance(other, LinenNetwork) or hash(self) != hash(other):
            return False
        mine, its = ((n.example, n.call, n.mutable, n.rngs) for n in (self, other))
        try:
            return mine == its and bool(self.linen_module == other.linen_module)
        except ValueError:
            # A field that is an array: its comparison is no truth value.
            return False


@partial(jax.jit, static_argnums=0)
def _initial(network: LinenNetwork, key: Any) -> Variables:
    """Compiled, so that the outputs for the zeros are not computed."""
    structure, shapes = network.example or (None, ())
    # A float64 array of NumPy stands for what JAX makes of it.
    zeros = [jnp.zeros(shape, jax.dtypes.canonicalize_dtype(dtype)) for shape, dtype in shapes]
    inputs = jax.tree.unflatten(structure, zeros)
    streams = ("params", *network.rngs)
    keys = dict(zip(streams, jax.random.split(key, len(streams)), strict=True))
    module, method, args, kwargs = network._call(inputs, train=False)
    return _plain(module.init(keys, *args, method=method, **kwargs))


def _check_params(network: LinenNetwork, variables: Variables) -> None:
    """Raises `ConfigError` where parameters are not those that the module makes of the example inputs."""
    made = jax.eval_shape(network.init, jax.random.key(0))
    wanted, given = (
        {
            path_name(path): tuple(leaf.shape)
            for path, leaf in jax.tree.leaves_with_path(linen.meta.unbox(each["params"]))
        }
        for each in ({"params": {}, **made}, variables)
    )
    for name in dict.fromkeys((*wanted, *given)):
        if wanted.get(name) != given.get(name):
            raise ConfigError(
                f"the parameter {name} of {type(network.linen_module).__name__} is {given.get(name, 'absent')} in the "
                f"variables, and {wanted.get(name, 'absent')} for these inputs: give variables and inputs of one module"
            )


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise ConfigError(
            f"example inputs have a {type(leaf).__name__}: give arrays, or jax.ShapeDtypeStruct(shape, dtype), as the "
            "module is called with, the axis of examples included"
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _frozen(example: PyTree) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(example)
    return structure, tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)


def _plain(variables: Any) -> Variables:
    """Dictionaries of collections, without what was sown."""
    found = unfreeze(variables)
    return {name: value for name, value in found.items() if name != _SOWN} if isinstance(found, Mapping) else {}


def _is_wanted(part: linen.Module, method: str, wanted: set[str] | str) -> bool:
    """Whether the output of a call is kept: of a submodule at a wanted path, or at the path before one of its parts."""
    path = ".".join(part.path)
    if method != "__call__" or not path:
        return False
    return wanted == "all" or any(name == path or name.startswith(f"{path}.") for name in wanted)


def _recorded(changed: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """The last output of each submodule by path, of the collection where Linen captures them."""
    found: dict[str, Any] = {}
    level = changed.get(_SOWN, {}) if not path else changed
    for name, value in level.items():
        if name == "__call__" and isinstance(value, tuple):
            found |= named_arrays(".".join(path), value[-1])
        elif isinstance(value, Mapping):
            found |= _recorded(value, (*path, name))
    return found


def _carried(changed: Mapping[str, Any], state: State, name: str = "the state") -> State:
    """The state after a step: what changed in place of what was, in the same structure.

    What is sown makes a tuple longer at each call: it stays as it was.
    """
    carried = dict(state)
    # At the top are collections, among them that of the features.
    added = {} if name == "the state" else {key: value for key, value in changed.items() if key not in state}
    kept = all(map(_is_sown, added.values()))
    for key, old in state.items():
        new = changed.get(key, old)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            carried[key] = _carried(new, old, key)
        elif _structure(old) == _structure(new):
            carried[key] = new
        else:
            kept = kept and isinstance(old, tuple) and isinstance(new, tuple)
    if not kept:
        raise ConfigError(
            f"the module changes the structure of {name} as it is called, and what is carried must keep it: leave its "
            "collection out of mutable=(…)"
        )
    return carried


def _is_sown(value: Any) -> bool:
    return all(map(_is_sown, value.values())) if isinstance(value, Mapping) else isinstance(value, tuple)


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(". ")
