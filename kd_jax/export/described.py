"""A model as a safetensors file with a JSON file beside it, which says how it was made; and the model of both."""

import hashlib
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from kd_jax.errors import ConfigError, DataError
from kd_jax.export.program import input_names, with_variables
from kd_jax.files import as_numpy, open_regular, refusing, shown
from kd_jax.files.written import write_whole
from kd_jax.models import count_parameters, restore, save
from kd_jax.models.parameters import named_leaves
from kd_jax.version import __version__

PyTree = Any

# Only these are called on a file's word.
_TRUSTED = "kd_jax.models"


def to_safetensors(
    model: Any, path: str | Path, *, made: str | None = None, arguments: Mapping[str, Any] | None = None,
    inputs: PyTree = None,
) -> Path:  # fmt: skip
    """Writes a model as the file `path`, `student.safetensors`, with `student.json` beside it, and gives its path back.

    The JSON file has the name, shape and type of each array, the number of parameters, the SHA-256 digest of the
    safetensors file, and how the model is made: what `from_safetensors` needs.

    made: the function that makes the model, such as "kd_jax.models:resnet8" or "my_package.networks:Small", which is
        called with `arguments`, and with `rngs` where it makes an `nnx.Module`. inputs: of some examples, whose shapes
        and types are written down, too.

    Raises `DataError` and `ConfigError` as `kd.save`.
    """
    path = Path(path).expanduser()
    known = with_variables(model)
    if arguments is not None and made is None:
        raise ConfigError("arguments are given without what is made with them: give made='package.module:function'")
    if made is not None:
        _checked(made)
    save(known, path)
    leaves = named_leaves(known.network.split(known.variables))
    description = {
        "kd_jax": __version__,
        "made": None if made is None else {"by": made, "arguments": dict(arguments or {})},
        "parameters": count_parameters(known),
        "arrays": {name: _kind(leaf) for name, leaf in leaves},
        "inputs": None if inputs is None else _kinds(inputs),
        "sha256": digest(path),
    }
    try:
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        path.unlink()
        raise ConfigError(f"the arguments cannot be written as JSON ({error}): give numbers, texts and lists") from None
    write_whole(path.with_suffix(".json"), text.encode())
    return path


def from_safetensors(path: str | Path, model: Any = None) -> Any:
    """The model of a file that `to_safetensors` wrote: a new `nnx.Module` for an NNX module, else a `Model`.

    model: what the values are for, as of `kd.restore`. Without it the JSON file says how it is made, which is believed
        where it names a function of `kd_jax.models`; of others it only tells the name, and calls nothing.

    Raises `DataError` where a file is damaged, or the two do not belong together.
    """
    path = Path(path).expanduser()
    known = _read(path.with_suffix(".json"))
    if known.get("sha256") != digest(path):
        raise DataError(
            f"{path} is not the file that {path.with_suffix('.json').name} describes: fetch both again, or read it "
            "alone with kd.restore(model, path)"
        )
    return restore(_model(known, path) if model is None else model, path)


def example_shapes(path: str | Path) -> PyTree:
    """The inputs that `to_safetensors` was given for a file, as `jax.ShapeDtypeStruct`s of 1. Raises `ConfigError`."""
    path = Path(path).expanduser()
    known = _read(path.with_suffix(".json")).get("inputs")
    if not isinstance(known, dict) or not known:
        raise ConfigError(
            f"{path.with_suffix('.json').name} does not say what the inputs are: write it again with "
            "kd.export.to_safetensors(model, path, inputs=…)"
        )
    with refusing(f"{path.with_suffix('.json')} has inputs that are none", "write it again"):
        shapes = {name: jax.ShapeDtypeStruct((1, *one["shape"][1:]), one["dtype"]) for name, one in known.items()}
    if list(shapes) == ["inputs"]:
        return shapes["inputs"]
    return tuple(shapes.values()) if "inputs_0" in shapes else shapes


def how_made(path: str | Path) -> dict[str, Any]:
    """`made` and `arguments` that `to_safetensors` was given for a file; nothing where it was not."""
    made = _read(Path(path).expanduser().with_suffix(".json")).get("made")
    return {"made": made.get("by"), "arguments": made.get("arguments")} if isinstance(made, dict) else {}


def digest(path: str | Path) -> str:
    """The SHA-256 digest of a file."""
    with open_regular(path) as file:
        return hashlib.sha256(file.read()).hexdigest()


def _checked(made: str) -> Any:
    """What a name `package.module:function` names. Raises `ConfigError`."""
    module, _, name = made.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ConfigError(
            f"made is {made!r}, and there is no such function: name one as package.module:function"
        ) from None


def _model(known: Mapping[str, Any], path: Path) -> Any:
    made = known.get("made")
    if not isinstance(made, dict):
        raise ConfigError(
            f"{path.with_suffix('.json').name} does not say how the model is made: give it, "
            "from_safetensors(path, model)"
        )
    by, arguments = str(made.get("by")), made.get("arguments")
    module, _, name = by.partition(":")
    if module != _TRUSTED or not isinstance(arguments, dict):
        raise ConfigError(
            f"{path.with_suffix('.json').name} says that the model is made by {shown(by)}, which is no function of "
            f"{_TRUSTED} and is not called for it: give the model, from_safetensors(path, model)"
        )
    function: Any = getattr(importlib.import_module(_TRUSTED), name, None)
    of_zoo = inspect.isfunction(function) and function.__module__.startswith(f"{_TRUSTED}.zoo.")
    if not (of_zoo or name in ("mlp", "MLP")):
        raise DataError(f"{path.with_suffix('.json')} names {shown(by)}, which makes no model: it is damaged")
    with refusing(f"{path.with_suffix('.json')} has arguments that {by} does not take", "give the model itself"):
        if name == "mlp":
            return function(**arguments)
        nnx.eval_shape(lambda: function(**arguments, rngs=nnx.Rngs(0)))
        return lambda rngs: function(**arguments, rngs=rngs)


def _read(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        content = file.read()
    with refusing(f"{path} is no description of a model", "write the model again with kd.export.to_safetensors"):
        known = json.loads(content)
        if not isinstance(known, dict):
            raise TypeError("it is no JSON object")
        return known


def _kind(leaf: Any) -> dict[str, Any]:
    return {"shape": list(np.shape(leaf)), "dtype": str(jax.numpy.asarray(leaf).dtype)}


def _kinds(inputs: PyTree) -> dict[str, Any]:
    """Of one example of each input."""
    leaves = jax.tree.leaves(inputs, is_leaf=lambda leaf: isinstance(leaf, list))
    arrays = [one if hasattr(one, "shape") else as_numpy(one, "an input") for one in leaves]
    shapes = [{"shape": ["batch", *one.shape[1:]], "dtype": str(one.dtype)} for one in arrays]
    return dict(zip(input_names(inputs), shapes, strict=True))
