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
_STRUCTURES = ("array", "tuple", "dict")


def to_safetensors(
    model: Any, path: str | Path, *, made: str | None = None, arguments: Mapping[str, Any] | None = None,
    inputs: PyTree = None, prepare: Any = None,
) -> Path:  # fmt: skip
    """Writes a model as the file `path`, `student.safetensors`, with `student.json` beside it, and gives its path back.

    The JSON file has the name, shape and type of each array, the number of parameters, the SHA-256 digest of the
    safetensors file, and how the model is made: what `from_safetensors` needs.

    made: the function that makes the model, such as "kd_jax.models:resnet8" or "my_package.networks:Small", which is
        called with `arguments`, and with `rngs` where it makes an `nnx.Module`. inputs: of some examples, whose shapes
        and types are written down, too. prepare: as of the training, where there was one: only its name is written
        down, for the values do not hold it, and whoever uses them must do the same.

    Raises `DataError` and `ConfigError` as `kd.save`, and where a JSON file of that name is no description of a model.
    """
    path = Path(path).expanduser()
    known = with_variables(model)
    if arguments is not None and made is None:
        raise ConfigError("arguments are given without what is made with them: give made='package.module:function'")
    if made is not None:
        _checked(made)
    check_beside(path)
    leaves = named_leaves(known.network.split(known.variables))
    description = {
        "kd_jax": __version__,
        "made": None if made is None else {"by": made, "arguments": dict(arguments or {})},
        "parameters": count_parameters(known),
        "arrays": {name: _kind(leaf) for name, leaf in leaves},
        "inputs": None if inputs is None else _kinds(inputs),
        "structure": None if inputs is None else _structure(inputs),
        "prepare": None if prepare is None else name_of(prepare),
    }
    try:
        json.dumps(description, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the arguments cannot be written as JSON ({error}): give numbers, texts and lists") from None
    save(known, path)
    text = json.dumps(description | {"sha256": digest(path)}, indent=2) + "\n"
    write_whole(path.with_suffix(".json"), text.encode())
    return path


def from_safetensors(path: str | Path, model: Any = None) -> Any:
    """The model of a file that `to_safetensors` wrote: a new `nnx.Module` for an NNX module, else a `Model`.

    model: what the values are for, as of `kd.restore`. Without it the JSON file says how it is made, which is believed
        where it names a function of `kd_jax.models`; of others it only tells the name, and calls nothing. What prepares
    the inputs is no part of the model that comes back.

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
    content = _read(path.with_suffix(".json"))
    known, structure = content.get("inputs"), content.get("structure")
    if not isinstance(known, dict) or not known:
        raise ConfigError(
            f"{path.with_suffix('.json').name} does not say what the inputs are: write it again with "
            "kd.export.to_safetensors(model, path, inputs=…)"
        )
    with refusing(f"{path.with_suffix('.json')} has inputs that are none", "write it again"):
        shapes = {name: jax.ShapeDtypeStruct((1, *one["shape"][1:]), one["dtype"]) for name, one in known.items()}
    if structure not in _STRUCTURES:
        raise ConfigError(
            f"{path.with_suffix('.json').name} does not hold the structure of its inputs, as of inputs within "
            "others: give the model itself to kd.export.to_folder, with inputs"
        )
    leaves = list(shapes.values())
    return leaves[0] if structure == "array" else {"dict": shapes, "tuple": tuple(leaves)}[structure]


def how_made(path: str | Path) -> dict[str, Any]:
    """`made` and `arguments` that `to_safetensors` was given for a file; nothing where it was not."""
    made = _read(Path(path).expanduser().with_suffix(".json")).get("made")
    return {"made": made.get("by"), "arguments": made.get("arguments")} if isinstance(made, dict) else {}


def prepared_by(path: str | Path) -> str | None:
    """The name of the `prepare` that `to_safetensors` was given for a file."""
    found = _read(Path(path).expanduser().with_suffix(".json")).get("prepare")
    return None if found is None else str(found)


def name_of(function: Any) -> str:
    """`package.module:function`, as well as it can be told."""
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"


def check_beside(path: Path) -> None:
    """Raises `DataError` where the JSON file beside `path` is no description of a model, and would be lost."""
    beside = path.with_suffix(".json")
    if not beside.exists():
        return
    try:
        known = _read(beside)
    except DataError:
        known = {}
    if not {"kd_jax", "arrays", "sha256"} <= set(known):
        raise DataError(
            f"{beside} is there and is no description of a model, and would be replaced: choose another name than "
            f"{path.name}"
        )


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
            "from_safetensors(path, model), or write the file with made='package.module:function'"
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


def _structure(inputs: PyTree) -> str | None:
    """Of inputs; None where they are within each other, or their names are not those in the file."""
    places = jax.tree.map(lambda leaf: 0, inputs, is_leaf=lambda leaf: isinstance(leaf, list))
    if isinstance(places, dict):
        return "dict" if all(one == 0 for one in places.values()) and set(places) == set(input_names(inputs)) else None
    return "array" if places == 0 else "tuple" if type(places) is tuple and not any(places) else None


def _kinds(inputs: PyTree) -> dict[str, Any]:
    """Of one example of each input."""
    leaves = jax.tree.leaves(inputs, is_leaf=lambda leaf: isinstance(leaf, list))
    arrays = [one if hasattr(one, "shape") else as_numpy(one, "an input") for one in leaves]
    shapes = [{"shape": ["batch", *one.shape[1:]], "dtype": str(one.dtype)} for one in arrays]
    return dict(zip(input_names(inputs), shapes, strict=True))
