"""Whatever a user calls a model, as a `Model`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from kd_jax.errors import ConfigError
from kd_jax.files import as_numpy, inputs_of
from kd_jax.models import network
from kd_jax.models.network import Model, Network, PyTree
from kd_jax.models.nnx import from_nnx
from kd_jax.models.trying import told


def as_model(model: Any) -> Model:
    """`model` as a `Model`: one itself, a `Network`, an NNX module, or a class or function `rngs -> nnx.Module`.

    What `distill` gave back counts as its student.

    Raises `ConfigError` for anything else, which needs one of the other doors.
    """
    if isinstance(model, Model):
        return model
    if is_result(model):
        return model.model
    if isinstance(model, Network):
        return Model(model)
    if isinstance(model, nnx.Module) or (isinstance(model, type) and issubclass(model, nnx.Module)):
        return from_nnx(model)
    if isinstance(model, linen.Module) or (isinstance(model, type) and issubclass(model, linen.Module)):
        name = type(model).__name__ if isinstance(model, linen.Module) else f"{model.__name__}(…)"
        raise ConfigError(
            f"{name} is a Linen module, which has no parameters of its own: give kd.from_linen(module, inputs) with "
            "inputs as it is called with, or kd.from_linen(module, variables=variables)"
        )
    if hasattr(model, "state_dict") and hasattr(model, "forward"):
        raise ConfigError(
            f"{type(model).__name__} is a PyTorch module: give kd.from_torch(module), which can teach, but not learn"
        )
    if callable(model):
        return from_nnx(model)
    if isinstance(model, str | Path):
        raise ConfigError(
            f"{str(model)!r} is no model, but a name: kd.restore(model, path) reads a network that was kept, and of a "
            "teacher kd.from_file(path) the logits and kd.open_cache(path) the answers"
        )
    raise ConfigError(
        f"a {type(model).__name__} is no model: give an nnx.Module, kd.from_linen(module, inputs) or "
        "kd.from_function(apply, params)"
    )


def as_list(models: Any, what: str) -> list[Any]:
    """Several models as a list. Raises `ConfigError` for one alone, or what holds none; `what` they are, in words."""
    alone = isinstance(models, str | Mapping | Model | Network | nnx.Module | linen.Module) or is_result(models)
    if alone or not isinstance(models, Iterable):
        raise ConfigError(f"{what} are a {type(models).__name__}: give a list of models")
    return list(models)


def is_result(model: Any) -> bool:
    """Whether it is what `distill` gave back, which holds a model."""
    return isinstance(getattr(model, "model", None), Model) and isinstance(model, tuple)


def count_parameters(model: Any) -> int:
    """Number of trained numbers of a model that has its variables: whatever `as_model` takes, or parameters themselves.

    Of the variables of a Linen module, a dict of collections, those of `params` count. Without a seed axis. Raises
    `ConfigError` where a model has no variables.
    """
    if isinstance(model, nnx.Module | Network | type) or is_result(model):
        model = as_model(model)
    collections = isinstance(model, Mapping) and all(isinstance(value, Mapping) for value in model.values())
    return network.count_parameters(model["params"] if collections and "params" in model else model)


def feature_names(model: Any, inputs: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """Paths of all features of a model, with their shapes for these inputs; nothing is computed.

    model: whatever `as_model` takes. inputs: arrays, `jax.ShapeDtypeStruct`s, or a `Batch` of them.

    An output of several arrays has a path for each, `rnn.0`. A submodule that is called several times has its last
    output; one that is not called has none. Raises `ConfigError`.
    """
    model = as_model(model)
    inputs = as_shapes(inputs)
    variables = model.variables
    if variables is None:
        variables = jax.eval_shape(model.network.init, jax.random.key(0))
    with told("the model", inputs):
        return model.network.feature_shapes(variables, inputs)


def as_shapes(inputs: Any) -> PyTree:
    """The inputs of a model, of which only the shapes count: lists are arrays, and a `Batch` has them. `DataError`."""
    return jax.tree.map(_array, inputs_of(inputs), is_leaf=lambda value: isinstance(value, list))


def _array(value: Any) -> Any:
    known = value if hasattr(value, "shape") and hasattr(value, "dtype") else as_numpy(value, "an input")
    if isinstance(known, np.ndarray):
        # A float64 array of NumPy stands for what JAX makes of it.
        return jax.ShapeDtypeStruct(known.shape, jax.dtypes.canonicalize_dtype(known.dtype))
    return known
