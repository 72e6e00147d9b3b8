"""A PyTorch `state_dict` read into an NNX module of the same structure, and back: linear, convolution, norm, more."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from kd_jax.errors import ConfigError, DataError
from kd_jax.files import check_shape, floats, listed
from kd_jax.models.doors import as_model
from kd_jax.models.network import Model, Network
from kd_jax.models.nnx import to_module
from kd_jax.models.parameters import filled, named_leaves, variable_shapes
from kd_jax.models.torch_weights import read_state_dict

# What PyTorch calls the arrays of a layer, and what NNX may call them.
_KINDS = {
    "weight": ("kernel", "scale", "embedding"),
    "bias": ("bias",),
    "running_mean": ("mean",),
    "running_var": ("var",),
}
_COUNTER = "num_batches_tracked"
# What `torch.nn.DataParallel` puts before every name.
_PARALLEL = "module."

Rename = Mapping[str, str] | Callable[[str], str]


def load_state_dict(module: Any, source: Any, *, rename: Rename | None = None) -> Any:
    """A new module, or `Model`, with the weights of a PyTorch `state_dict`, whose layers have the same paths.

    A linear `weight` is transposed, one of a convolution gets its channels last, `running_mean` and `running_var` are
    the statistics of an `nnx.BatchNorm`, and `num_batches_tracked` is left out, as is a `module.` before every name.

    module: an NNX module, what constructs one, or a `Model` of them; it says what must be there.
    source: the mapping itself, or a `.safetensors`, `.pt` or `.pth` file of it. Nothing is ever unpickled.
    rename: from PyTorch's names of layers to the module's paths: a function, or a dict of beginnings of names,
        `{"features.0": "conv1"}`, of which the longest counts.

    A linear layer behind a flattened image has its inputs in another order here, with the channels last: those weights
    must be reordered. Transposed convolutions are not read. Raises `DataError`.
    """
    arrays, where = read_state_dict(source)
    model = as_model(module)
    shapes = variable_shapes(model.network, model.variables)
    leaves = dict(named_leaves(model.network.split(shapes)))
    found: dict[str, Any] = {}
    parallel = _PARALLEL if all(name.startswith(_PARALLEL) for name in arrays) else ""
    for torch_name, array in arrays.items():
        layer, _, kind = torch_name.removeprefix(parallel).rpartition(".")
        if kind == _COUNTER:
            continue
        path = _renamed(layer, rename)
        name = next((name for name in _names(path, kind) if name in leaves), None)
        if name is None:
            raise DataError(
                f"{where} has {torch_name}, for which the module has no {' or '.join(_names(path, kind))} (it has "
                f"{listed(leaves)}): give rename={{'{layer}': 'its path here'}}"
            )
        values = _laid_out(floats(array, f"{torch_name} of {where}"), name)
        check_shape(values.shape, leaves[name].shape, f"{torch_name} of {where}, as {name},")
        found[name] = values.astype(leaves[name].dtype)
    missing = [name for name in leaves if name not in found]
    if missing:
        raise DataError(
            f"{where} lacks {listed(missing)} of the module (it has {listed(arrays) or 'nothing'}): give rename=, or a "
            "module of the same structure"
        )
    restored = Model(model.network, filled(found, model.network, shapes, where))
    return restored if isinstance(module, Model | Network) else to_module(restored)


def to_state_dict(module: Any) -> dict[str, Shaped[np.ndarray, "..."]]:
    """A PyTorch `state_dict`, as NumPy arrays, of an NNX module or a `Model` of one: what `load_state_dict` reads.

    Beside the statistics of each `nnx.BatchNorm` is a `num_batches_tracked` of 0. With `torch.from_numpy` of each array
    it loads into the PyTorch module of the same structure, also with `strict=True`. Transposed convolutions come out
    wrong. Raises `ConfigError` where there are no values.
    """
    model = as_model(module)
    if model.variables is None:
        raise ConfigError("this model has no variables yet: make them with model.init(key), or train it")
    kinds = {name: kind for kind, names in _KINDS.items() for name in names}
    arrays = {}
    for name, leaf in named_leaves(model.network.split(model.variables)):
        layer, _, own = name.rpartition(".")
        prefix = f"{layer}." if layer else ""
        array = np.asarray(leaf)
        if own == "kernel" and array.ndim >= 2:
            array = np.moveaxis(array, (-1, -2), (0, 1))
        # A copy: PyTorch takes no arrays that may not be written.
        arrays[f"{prefix}{kinds.get(own, own)}"] = array.copy(order="C")
        if own == "var":
            arrays[f"{prefix}{_COUNTER}"] = np.zeros((), np.int64)
    return arrays


def _names(path: str, kind: str) -> list[str]:
    return [f"{path}.{name}" if path else name for name in _KINDS.get(kind, (kind,))]


def _renamed(layer: str, rename: Rename | None) -> str:
    """The path of a layer in the module."""
    if rename is None:
        return layer
    if not isinstance(rename, Mapping):
        return rename(layer)
    for before in sorted(rename, key=len, reverse=True):
        if layer == before or layer.startswith(f"{before}."):
            return (rename[before] + layer[len(before) :]).removeprefix(".")
    return layer


def _laid_out(array: Float[np.ndarray, "..."], name: str) -> Float[np.ndarray, "..."]:
    """A kernel with its outputs as the last axis and its inputs before them, `[*window, inputs, outputs]`."""
    if not name.endswith("kernel"):
        return array
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim >= 2 else array
