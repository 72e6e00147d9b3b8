"""Parameters and state of any model in a safetensors file, by their paths; and back."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Shaped

from kd_jax.errors import ConfigError, DataError
from kd_jax.files import check_shape, listed, shown, tensors
from kd_jax.files.names import path_name
from kd_jax.files.written import write_whole
from kd_jax.models.doors import as_model, is_result
from kd_jax.models.network import Model, Network, Params, PyTree, State, Variables
from kd_jax.models.nnx import NNXNetwork, to_module

_LONGEST_NAME = 200

Arrays = dict[str, Shaped[np.ndarray, "..."]]


def save(model: Any, path: str | Path) -> None:
    """Writes the parameters and the state of a model as the file `path`, which must end in `.safetensors`.

    Arrays have their paths as names (`hidden.0.kernel`), and keep their type and shape. Raises `DataError`, also where
    the file cannot be written, and `ConfigError` where the model has no variables.
    """
    model, path = _with_variables(model), Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise DataError(f"a model cannot be written to {path}: name a file that ends in .safetensors")
    arrays = {name: _on_host(leaf, name) for name, leaf in named_leaves(model.network.split(model.variables))}
    try:
        content = safetensors.numpy.save(arrays)
    except safetensors.SafetensorError as error:
        raise DataError(f"the model has an array that no safetensors file holds ({error}): convert it") from None
    write_whole(path, content)


def restore(model: Any, path: str | Path) -> Any:
    """The model with the values of a file that `save` wrote.

    A new `nnx.Module` for an NNX module or a constructor, and a `Model` for a `Model` or `Network`. What is given says
    what must be there; its own values are not looked at. Raises `DataError` where
    the file and the model do not fit each other.
    """
    given = as_model(model)
    variables = filled(tensors.read(path), given.network, variable_shapes(given.network, given.variables), path)
    restored = Model(given.network, variables)
    is_module = isinstance(given.network, NNXNetwork) and not isinstance(model, Model | Network)
    return to_module(restored) if is_module else restored


def load(path: str | Path, network: Network | Model | None = None) -> tuple[Params, State]:
    """Parameters and state of the network in the safetensors file `path`, as `Network.split` gives them.

    network: the one that they are for. Without it every array is taken for a parameter, and the nesting from the
        names (`hidden.0.kernel`): enough for an `MLP` and whatever else has no state, no lists but of NNX, and no
        dots in its names.

    Raises `DataError`, also for values that are not finite, and where the file and the network do not fit each other.
    """
    arrays = tensors.read(path)
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
            raise DataError(f"{shown(name)} of {path} has NaN or infinite values: every value must be finite")
    if network is None:
        return _nest(arrays, path), {}
    model = as_model(network)
    variables = filled(arrays, model.network, variable_shapes(model.network, model.variables), path)
    return model.network.split(variables)


def _with_variables(model: Any) -> Model:
    if isinstance(model, Network) or not (isinstance(model, Model | nnx.Module) or is_result(model)):
        raise ConfigError(
            f"a {type(model).__name__} has no values to save: give an nnx.Module, or a kd.Model with its variables"
        )
    model = as_model(model)
    if model.variables is None:
        raise ConfigError("this model has no variables to save: make them with model.init(key), or train it")
    return model


def named_leaves(parts: tuple[Params, State]) -> list[tuple[str, Any]]:
    """Every array with its name. Raises `DataError` where two have one name."""
    leaves = jax.tree.leaves_with_path(parts)
    named = [(path_name(path[1:]) or "params", leaf) for path, leaf in leaves]
    if len({name for name, _ in named}) < len(named):
        twice = next(name for name, _ in named if [other for other, _ in named].count(name) > 1)
        raise DataError(f"two arrays of the model have the name {twice}: rename one of its parts, without a dot")
    return named


def _on_host(leaf: Any, name: str) -> Shaped[np.ndarray, "..."]:
    if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
        raise DataError(f"{name} is a random key, which no safetensors file holds: keep it as nnx.RngKey")
    array = np.array(jax.device_get(leaf), order="C")
    if array.dtype not in tensors.TYPES.values():
        raise DataError(
            f"{name} is of type {array.dtype}, which no safetensors file holds that is read back: convert it, such as "
            "to float32"
        )
    return array


def variable_shapes(network: Network, variables: Variables) -> Variables:
    """Shapes and types of a network's variables, of given ones or of those that it would make."""
    if variables is None:
        return jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.asarray(leaf).dtype), variables)


def filled(arrays: Arrays, network: Network, shapes: Variables, path: str | Path) -> Variables:
    """The arrays in the places that they have in the network."""
    parts = network.split(shapes)
    named = dict(named_leaves(parts))
    if set(named) != set(arrays):
        missing, more = sorted(named.keys() - arrays.keys()), sorted(arrays.keys() - named.keys())
        lacks = [f"lacks {listed(missing)}"] if missing else []
        raise DataError(
            f"{path} {' and '.join([*lacks, *([f'has {listed(more)} too many'] if more else [])])}: "
            "give the network that was trained"
        )
    found = [_fitted(arrays[name], leaf, f"{name} of {path}") for name, leaf in named.items()]
    return network.merge(*jax.tree.unflatten(_structure(parts), found))


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree)


def _fitted(array: Shaped[np.ndarray, "..."], leaf: jax.ShapeDtypeStruct, what: str) -> Shaped[jax.Array, "..."]:
    # Earlier files have scalars with an axis.
    array = array.reshape(()) if leaf.shape == () and array.shape == (1,) else array
    check_shape(array.shape, leaf.shape, what)
    if array.dtype != leaf.dtype:
        raise DataError(f"{what} is of type {array.dtype}: this network's is {leaf.dtype}")
    return jnp.asarray(array)


def _nest(arrays: Arrays, path: str | Path) -> Params:
    """The arrays in dictionaries within dictionaries, by the parts of their names."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *outer, last = name.split(".")
        place: Any = tree
        for part in outer:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if len(name) > _LONGEST_NAME or not isinstance(place, dict) or last in place or "" in (*outer, last):
            raise DataError(f"{path} has the array {shown(name)}, which is no name of a parameter: give the network")
        place[last] = jnp.asarray(array)
    if not tree:
        raise DataError(f"{path} is empty: at least one array is needed")
    return _numbered(tree)


def _numbered(tree: Any) -> Any:
    """Numbers for keys where a level has nothing else, as an `nnx.List` has."""
    if not isinstance(tree, dict):
        return tree
    numbers = all(key.isascii() and key.isdigit() and str(int(key)) == key for key in tree)
    return {int(key) if numbers else key: _numbered(value) for key, value in tree.items()}
