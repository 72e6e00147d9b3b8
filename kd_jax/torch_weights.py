"""PyTorch weights of fully connected networks, read and written: a teacher trained there can teach here, and back."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float

from kd_jax.data import DataError
from kd_jax.models import Params

Arrays = dict[str, Float[np.ndarray, "..."]]


def from_state_dict(source: str | Path | Mapping[str, Any], names: Sequence[str] | None = None) -> Params:
    """Parameters of an `MLP` from a PyTorch `state_dict` of linear layers, each kernel being a transposed `weight`.

    source: the mapping itself, or a `.safetensors`, `.pt` or `.pth` file of it. Only tensors are ever unpickled, and
        only `.pt` and `.pth` need PyTorch.
    names: the layers from input to output (`["fc1", "fc2", "fc3"]`). Without it they are taken in the order of the
        mapping; a `.safetensors` file keeps none, so there their numbers tell it. A layer without a bias gets zeros.

    Images of several channels are flattened by PyTorch with the channels first, by kd_jax with the channels last: their
    first weights must be reordered. Raises `DataError`.
    """
    where = "the state_dict" if isinstance(source, Mapping) else str(source)
    arrays = _arrays(source, where) if isinstance(source, Mapping) else _read(Path(source))
    if names is None:
        names = _layer_names(arrays)
        if not isinstance(source, Mapping) and Path(source).suffix == ".safetensors":
            names = _in_order(names, where)
    _check_names(arrays, names, where)
    layers = [_layer(arrays, name, where) for name in names]
    _check_chain(names, layers, where)
    hidden = {"hidden": dict(enumerate(layers[:-1]))} if len(layers) > 1 else {}
    return {**hidden, "output": layers[-1]}


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
    try:
        path.write_bytes(safetensors.numpy.save(to_state_dict(params, names)))
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}): name a file in a folder that exists"
        ) from None


def layer_sizes(params: Params) -> tuple[int, ...]:
    """What `mlp` wants to know for these parameters: inputs, hidden units, classes."""
    layers = [*dict(sorted(params.get("hidden", {}).items())).values(), params["output"]]
    return (layers[0]["kernel"].shape[0], *(layer["kernel"].shape[1] for layer in layers))


def _read(path: Path) -> Arrays:
    readers = {".safetensors": _read_safetensors, ".pt": _read_torch, ".pth": _read_torch}
    if path.suffix not in readers:
        raise DataError(f"weights cannot be read from {path}: name a file that ends in {', '.join(readers)}")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): name an existing file") from None
    return readers[path.suffix](path)


def _read_safetensors(path: Path) -> Arrays:
    try:
        mapping = safetensors.numpy.load(path.read_bytes())
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} is a damaged safetensors file, or of a type that NumPy lacks ({error}): save it again as float32"
        ) from None
    return _arrays(mapping, str(path))


def _read_torch(path: Path) -> Arrays:
    try:
        import torch
    except ImportError:
        raise DataError(
            f"{path} needs PyTorch to be read, which is not installed: "
            "save the weights as .safetensors, or pip install 'kd-jax[parity]'"
        ) from None
    try:
        mapping = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can fail anywhere in PyTorch's reader, each time with another type of error.
    except Exception as error:
        raise DataError(
            f"{path} is damaged or holds more than tensors ({_first_line(error)}): "
            "save it with torch.save(model.state_dict(), path)"
        ) from None
    if not isinstance(mapping, Mapping):
        raise DataError(
            f"{path} holds a {type(mapping).__name__}, no state_dict: save it with torch.save(model.state_dict(), path)"
        )
    return _arrays(mapping, str(path))


def _arrays(mapping: Mapping[str, Any], where: str) -> Arrays:
    return {str(name): _array(value, f"{name} of {where}") for name, value in mapping.items()}


def _array(value: Any, what: str) -> Float[np.ndarray, "..."]:
    """`value` in float32, or in float64 where it is that and JAX is set to compute in it."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy lacks bfloat16.
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} is no array ({_first_line(error)}): give the tensors of a state_dict") from None
    if array.dtype.kind != "f" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise DataError(f"{what} is of type {array.dtype}: weights must be floating-point numbers")
    wanted = jax.dtypes.canonicalize_dtype(np.float64) if array.dtype == np.float64 else np.float32
    with np.errstate(over="ignore"):
        array = array.astype(wanted)
    if not np.isfinite(array).all():
        raise DataError(f"{what} has NaN or infinite values: every weight must be finite, so train it again or mend it")
    return array


def _layer_names(arrays: Arrays) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in arrays))


def _in_order(names: list[str], where: str) -> list[str]:
    """The layers by their numbers, where nothing but numbers tells their names apart."""
    if len({re.sub(r"\d+", "0", name) for name in names}) > 1:
        raise DataError(
            f"{where} does not keep the order of its layers, and their names ({', '.join(names)}) are not numbered "
            "alike: give them from input to output as names=[...]"
        )
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _layer(arrays: Arrays, name: str, where: str) -> dict[str, Any]:
    prefix = f"{name}." if name else ""
    weight = arrays.get(f"{prefix}weight")
    if weight is None:
        raise DataError(
            f"{where} lacks {prefix}weight (it has {', '.join(arrays) or 'nothing'}): every layer needs a weight"
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
        raise DataError(f"the layers {', '.join(names)} of {where} repeat a name: give each layer once")
    for array in arrays:
        layer, _, kind = array.rpartition(".")
        if kind not in ("weight", "bias"):
            raise DataError(
                f"{where} has {array}, which is no weight or bias of a linear layer: only stacks of such layers fit"
            )
        if layer not in names:
            raise DataError(f"{where} also has {array}, of none of the layers {', '.join(names)}: name every layer")


def _check_chain(names: Sequence[str], layers: list[dict[str, Any]], where: str) -> None:
    """That each layer takes as many numbers as the one before it gives."""
    for (before, first), (after, second) in itertools.pairwise(zip(names, layers, strict=True)):
        outputs, inputs = first["kernel"].shape[1], second["kernel"].shape[0]
        if outputs != inputs:
            raise DataError(
                f"{where} has {outputs} outputs of {before} and {inputs} inputs of {after}, which follows it: "
                "they must be equal, so give the layers from input to output as names=[...]"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
