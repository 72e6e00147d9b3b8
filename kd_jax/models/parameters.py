"""The parameters that an experiment leaves (`parameters/*.safetensors`), read back."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from kd_jax.errors import DataError
from kd_jax.files import check_shape, listed, shown, tensors
from kd_jax.models.network import Network, Params, State

_LONGEST_NAME = 200

Arrays = dict[str, Shaped[np.ndarray, "..."]]


def load(path: str | Path, network: Network | None = None) -> tuple[Params, State]:
    """Parameters and state of the network in the safetensors file `path`, as `Network.init` makes them.

    network: the one that they are for. Without it every array is taken for a parameter, and the nesting from the
        names (`hidden.0.kernel`): enough for an `MLP` and whatever else has no state, no lists but of NNX, and no
        dots in its names.

    Raises `DataError`, also where the file and the network do not fit each other.
    """
    arrays = tensors.read(path)
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            raise DataError(f"{shown(name)} of {path} has NaN or infinite values: every value must be finite")
    if network is not None:
        return _fill(arrays, network, path)
    return _nest(arrays, path), {}


def tensor_name(path: tuple[Any, ...]) -> str:
    """`hidden.0.kernel` for a leaf of the parameters or of the state."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _fill(arrays: Arrays, network: Network, path: str | Path) -> tuple[Params, State]:
    """The arrays in the places that they have in the network."""
    leaves, structure = jax.tree.flatten_with_path(jax.eval_shape(network.init, jax.random.key(0)))
    names = [tensor_name(place[1:]) for place, _ in leaves]
    if set(names) != set(arrays):
        raise DataError(
            f"{path} has {listed(arrays) or 'nothing'}, and the network has {listed(names)}: "
            "give the network that was trained"
        )
    found = [_fitted(arrays[name], leaf, f"{name} of {path}") for name, (_, leaf) in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, found)


def _fitted(array: Shaped[np.ndarray, "..."], leaf: jax.ShapeDtypeStruct, what: str) -> Shaped[jax.Array, "..."]:
    # Scalars are written with an axis.
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
