"""A model as a StableHLO program that `jax.export` serialises: it runs where kd_jax and the model's code are not."""

from pathlib import Path
from typing import Any

import jax
from jax import export as jax_export

from kd_jax.errors import ConfigError, DataError
from kd_jax.export.program import traced
from kd_jax.files import inputs_of, open_regular, reason, refusing
from kd_jax.files.written import write_whole
from kd_jax.models import Model, from_function

PyTree = Any

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def to_stablehlo(
    model: Any, path: str | Path, inputs: PyTree, *, prepare: Any = None, batch: int | None = None,
    platforms: tuple[str, ...] = PLATFORMS,
) -> Path:  # fmt: skip
    """Writes a model as the StableHLO program `path`, and gives its path back: logits of any number of examples.

    `jax.export.deserialize(content).call(inputs)` computes them, without kd_jax and without the model's code; JAX
    promises to read the file for at least 6 months. It has the variables in it, and no gradient.

    model: an `nnx.Module`, or a `Model` with its variables. inputs: of some examples, or `jax.ShapeDtypeStruct`s: their
        shapes and types count. prepare: as of the training; the program does it, too. batch: a fixed number of
        examples, for a model that cannot have any. platforms: where the program runs.

    Raises `ConfigError`, also for a model that is called back, and `DataError` where the file cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix != ".stablehlo":
        raise DataError(f"a model cannot be written to {path}: name a file that ends in .stablehlo")
    program = traced(model, inputs_of(inputs), prepare=prepare, batch=batch)

    def logits(inputs: PyTree) -> Any:
        return program(*jax.tree.leaves(inputs))

    try:
        content = jax_export.export(jax.jit(logits), platforms=platforms)(program.inputs).serialize()
    except Exception as error:
        raise ConfigError(
            f"jax.export cannot export the model ({reason(error)}): give a model of JAX's own operations alone, and "
            "inputs in arrays, tuples, lists and dicts"
        ) from None
    return write_whole(path, bytes(content))


def from_stablehlo(path: str | Path) -> Model:
    """The `Model` of a file that `to_stablehlo` wrote: it can teach and be measured, not learn. Raises `DataError`."""
    path = Path(path).expanduser()
    with open_regular(path) as file:
        content = file.read()
    with refusing(f"{path} is no StableHLO program that this JAX reads", "write it again with kd.export.to_stablehlo"):
        exported = jax_export.deserialize(bytearray(content))

    def stored(params: PyTree, inputs: PyTree, train: bool) -> Any:
        if train:
            raise ConfigError(f"{path.name} is an exported program and cannot be trained here: give it as the teacher")
        return exported.call(inputs)

    return from_function(stored, {})
