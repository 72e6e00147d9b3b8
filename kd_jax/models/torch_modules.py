"""A PyTorch `state_dict` read into an NNX module of the same structure: linear, convolution, norm and more."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from kd_jax.errors import DataError
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

Rename = Mapping[str, str] | Callable[[str], str]


def load_state_dict(module: Any, source: Any, *, rename: Rename | None = None) -> Any:
    """A new module, or `Model`, with the weights of a PyTorch `state_dict`, whose layers have the same paths.

    A linear `weight` is transposed, one of a convolution gets its channels last, `running_mean` and `running_var` are
    the statistics of an `nnx.BatchNorm`, and `num_batches_tracked` is left out.

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
    for torch_name, array in arrays.items():
        layer, _, kind = torch_name.rpartition(".")
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
