"""PyTorch weights of fully connected networks, read and written: a teacher trained there can teach here, and back."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float, Shaped

from kd_jax.errors import DataError
from kd_jax.files import as_numpy, floats, listed, pt, shown, tensors
from kd_jax.files.written import write_whole
from kd_jax.models.network import Params

_LONGEST_NAME = 200

Arrays = dict[str, Float[np.ndarray, "..."]]


def from_state_dict(source: Any, names: Sequence[str] | None = None) -> Params:
    """Parameters of an `MLP` from a PyTorch `state_dict` of linear layers, each kernel being a transposed `weight`.

    source: the mapping itself, or a `.safetensors`, `.pt` or `.pth` file of it. Nothing is ever unpickled, and no
        file needs PyTorch.
    names: the layers from input to output (`["fc1", "fc2", "fc3"]`). Without it they are taken in the order of the
        mapping; a `.safetensors` file keeps none, so there their numbers tell it. A layer without a bias gets zeros.

    Images of several channels are flattened by PyTorch with the channels first, by kd_jax with the channels last: their
    first weights must be reordered. Raises `DataError`.
    """
    given, where = read_state_dict(source)
    arrays = {name: floats(array, f"{shown(name)} of {where}") for name, array in given.items()}
    if names is None:
        names = _layer_names(arrays)
        if not isinstance(source, Mapping) and Path(source).suffix == ".safetensors":
            names = _in_order(names, where)
    _check_names(arrays, names, where)
    layers = [_layer(arrays, name, where) for name in names]
    _check_chain(names, layers, where)
    hidden = {"hidden": dict(enumerate(layers[:-1]))} if len(layers) > 1 else {}
    return {**hidden, "output": layers[-1]}


def read_state_dict(source: Any) -> tuple[dict[str, Shaped[np.ndarray, "..."]], str]:
    """The arrays of a `state_dict`, or of a file of one, as they are, and what to call it. Raises `DataError`.

    Of a checkpoint it is what `pt.weights` finds in it.
    """
    if not isinstance(source, str | Path | Mapping):
        remedy = "module.state_dict()" if hasattr(source, "state_dict") else "the mapping, or the name of a file of it"
        raise DataError(f"a {type(source).__name__} is no state_dict: give {remedy}")
    where, mapping = "the state_dict", pt.weights(source)
    if not isinstance(source, Mapping):
        where, suffix = str(source), Path(source).suffix
        readers = {".safetensors": tensors.read, ".pt": pt.read, ".pth": pt.read}
        if suffix not in readers:
            raise DataError(f"weights cannot be read from {where}: name a file that ends in {', '.join(readers)}")
        mapping = readers[suffix](source)
    for name in mapping:
        if not isinstance(name, str) or len(name) > _LONGEST_NAME:
            raise DataError(
                f"{where} has the name {shown(str(name))}: a layer's is a text of at most {_LONGEST_NAME} characters"
            )
    # Copied, for the tensors of a model that trains on change in place.
    return {name: as_numpy(value, f"{shown(name)} of {where}").copy() for name, value in mapping.items()}, where


def to_state_dict(params: Params, names: Sequence[str] | None = None) -> Arrays:
    """A PyTorch `state_dict`, as NumPy arrays, of an `MLP`'s parameters: `weight` and `bias` of each layer.

    names: the layers from input to output, as the PyTorch model calls them; `fc1`, `fc2`, … without it.
    Raises `DataError`.
    """
    layers = [*dict(sorted(params.get("hidden", {}).items())).values(), params["output"]]
    for layer in layers:
        if np.ndim(layer["kernel"]) != 2:
            raise DataError(
                f"a kernel has {np.ndim(layer['kernel'])} axes and must have 2: give the parameters of one seed, "
                "jax.tree.map(lambda leaf: leaf[0], params) for the first"
            )
    if names is None:
        names = [f"fc{number}" for number in range(1, len(layers) + 1)]
    if len(set(names)) != len(layers):
        raise DataError(
            f"{len(set(names))} different names cannot be given to {len(layers)} layers: give one name for each layer"
        )
    state_dict = {}
    for name, layer in zip(names, layers, strict=True):
        state_dict[f"{name}.weight"] = np.ascontiguousarray(np.asarray(layer["kernel"]).T)
        state_dict[f"{name}.bias"] = np.asarray(layer["bias"])
    return state_dict


def save(params: Params, path: str | Path, names: Sequence[str] | None = None) -> None:
    """Writes `to_state_dict` as a `.safetensors` file, for `safetensors.torch.load_file`. Raises `DataError`."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise DataError(f"weights cannot be written to {path}: name a file that ends in .safetensors")
    write_whole(path, safetensors.numpy.save(to_state_dict(params, names)))


def layer_sizes(params: Params) -> tuple[int, ...]:
    """What `mlp` wants to know for these parameters: inputs, hidden units, classes."""
    layers = [*dict(sorted(params.get("hidden", {}).items())).values(), params["output"]]
    return (layers[0]["kernel"].shape[0], *(layer["kernel"].shape[1] for layer in layers))


def _layer_names(arrays: Arrays) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in arrays))


def _in_order(names: list[str], where: str) -> list[str]:
    """The layers by their numbers, where nothing but numbers tells their names apart."""
    if len({re.sub(r"\d+", "0", name) for name in names}) > 1:
        raise DataError(
            f"{where} does not keep the order of its layers, and their names ({listed(names)}) are not numbered "
            "alike: give them from input to output as names=[...]"
        )
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _layer(arrays: Arrays, name: str, where: str) -> dict[str, Any]:
    prefix = f"{name}." if name else ""
    weight = arrays.get(f"{prefix}weight")
    if weight is None:
        raise DataError(
            f"{where} lacks {prefix}weight (it has {listed(arrays) or 'nothing'}): every layer needs a weight"
        )
    if weight.ndim != 2 or weight.size == 0:
        raise DataError(
            f"{prefix}weight of {where} has the shape {weight.shape}: a linear layer's is (outputs, inputs), "
            "and only stacks of linear layers fit"
        )
    bias = arrays.get(f"{prefix}bias", np.zeros(len(weight), weight.dtype))
    if bias.shape != (len(weight),):
        raise DataError(
            f"{prefix}bias of {where} has the shape {bias.shape}: "
            f"beside a weight {weight.shape} it must be ({len(weight)},)"
        )
    return {"bias": jnp.asarray(bias), "kernel": jnp.asarray(weight.T)}


def _check_names(arrays: Arrays, names: Sequence[str], where: str) -> None:
    """That the arrays are the weights and biases of just these layers."""
    if not names:
        raise DataError(f"{where} is empty: at least one linear layer is needed")
    if len(set(names)) != len(names):
        raise DataError(f"the layers {listed(names)} of {where} repeat a name: give each layer once")
    known = set(names)
    for array in arrays:
        layer, _, kind = array.rpartition(".")
        if kind not in ("weight", "bias"):
            raise DataError(
                f"{where} has {array}, which is no weight or bias of a linear layer: only stacks of such layers fit"
            )
        if layer not in known:
            raise DataError(f"{where} also has {array}, of none of the layers {listed(names)}: name every layer")


def _check_chain(names: Sequence[str], layers: list[dict[str, Any]], where: str) -> None:
    """That each layer takes as many numbers as the one before it gives."""
    for (before, first), (after, second) in itertools.pairwise(zip(names, layers, strict=True)):
        outputs, inputs = first["kernel"].shape[1], second["kernel"].shape[0]
        if outputs != inputs:
            raise DataError(
                f"{where} has {outputs} outputs of {before} and {inputs} inputs of {after}, which follows it: "
                "they must be equal, so give the layers from input to output as names=[...]"
            )
