"""A model as a LiteRT file, by LiteRT's converter of StableHLO, compared with the model itself in its interpreter."""

import contextlib
import functools
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from jaxtyping import Float

from kd_jax.errors import ConfigError, DataError
from kd_jax.export.compared import OUTPUT, TOLERANCE, check_logits, check_names, wanted
from kd_jax.export.convertible import CONVERTIBLE_LITERT
from kd_jax.export.program import Program, traced
from kd_jax.files import inputs_of, listed, reason
from kd_jax.files.written import write_whole

PyTree = Any

_INSTALL = "pip install 'kd-jax[litert]'"
_INSTEAD = "export it as ONNX or as StableHLO"
_SIGNATURE = "serving_default"
# What jax.export serialises becomes StableHLO of this version, in one function.
_TO_STABLEHLO = "builtin.module(vhlo-legalize-stablehlo, reconcile-unrealized-casts, inline, strip-debuginfo)"
# The converter has them, but writes no file with them.
_LOOPS = ("tfl.while", "tfl.if")


def to_litert(
    model: Any, path: str | Path, inputs: PyTree, *, prepare: Any = None, batch: int | None = None,
    tolerance: float = TOLERANCE,
) -> Path:  # fmt: skip
    """Writes a model as the LiteRT file `path`, a `.tflite`, and gives its path back: logits of any number of examples.

    The file is run in LiteRT's interpreter on `inputs`, the first 64, and is only kept where its logits are the
    model's. Its one signature takes the inputs by name: `Interpreter(path).get_signature_runner()(inputs=…)["logits"]`.

    model: an `nnx.Module`, or a `Model` with its variables. inputs: of some examples, or `jax.ShapeDtypeStruct`s, for
        which numbers are made. Their names in the file are `inputs` for an array, `inputs_0`, … for a tuple, and their
        own in a dict; the output's is `logits`. prepare: as of the training; the file does it, too. batch: a fixed
        number of examples, for a model that cannot have any, and for accelerators that want to know every shape.
    tolerance: of the largest logit below 1e4, or of 1 where that is larger; what is 1e4 or more, as a mask makes it,
        may differ by so much of itself.

    Needs litert-converter and ai-edge-litert, `pip install 'kd-jax[litert]'`. Raises `ConfigError`, where the converter
    or the interpreter lacks what the model computes, or the logits differ, and `DataError` where the file cannot be
    written.
    """
    path, inputs = Path(path).expanduser(), inputs_of(inputs)
    if path.suffix != ".tflite":
        raise DataError(f"a model cannot be written to {path}: name a file that ends in .tflite")
    check_names(inputs, "a LiteRT file")
    check_packages()
    program = traced(model, inputs, prepare=prepare, batch=batch)
    own = wanted(model, inputs, prepare=prepare, batch=batch)
    instead = _INSTEAD if batch is not None else f"give it a number of examples, batch=1, or {_INSTEAD}"

    def made(fused: bool) -> bytes:
        content = _converted(program, instead, fused=fused)
        run = functools.partial(_logits, content, program.names, instead)
        check_logits(run, program, own, tolerance, "the LiteRT file", instead)
        return content

    content = None
    if batch is None:
        with contextlib.suppress(ConfigError):
            content = made(fused=True)
    return write_whole(path, content or made(fused=False))


def check_packages() -> None:
    """Raises `ConfigError` where a package is missing that LiteRT needs."""
    _converter()
    _imported("ai_edge_litert.interpreter")


def _imported(name: str) -> Any:
    try:
        with _quiet():
            return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise ConfigError(
            f"{package} is needed for LiteRT, and cannot be imported ({reason(error)}): {_INSTALL}"
        ) from None


def _converter() -> tuple[Any, Any, Any]:
    """The modules of the converter: MLIR's programs, its passes, and what makes a file of them."""
    folder = "litert_converter.mlir"
    ir, passes = _imported(f"{folder}.ir"), _imported(f"{folder}.passmanager")
    return ir, passes, _imported(f"{folder}._mlir_libs.converter_api_ext")


def _converted(program: Program, instead: str, *, fused: bool) -> bytes:
    """The file's content. Raises `ConfigError`, with what to do instead.

    fused: whether a bias is added as it is, and not first written out for each of any number of examples, by which a
        call takes up to thirty times as long. It is wrong where neither shape is that of the sum.
    """
    ir, passes, api = _converter()
    program = program._replace(instead=CONVERTIBLE_LITERT)
    try:
        # The file has every input, also one that no logit needs.
        function = jax.jit(lambda *arrays: program(*arrays), keep_unused=True)
        exported = jax_export.export(function, platforms=("cpu",))(*jax.tree.leaves(program.inputs))
    except Exception as error:
        raise ConfigError(
            f"jax.export cannot export the model ({reason(error)}): give a model of JAX's own operations alone"
        ) from None
    config = api.ConvertToTFLConfig()
    config.model_origin_framework = "JAX"
    config.canonicalizing_inf_as_min_max_float = False
    config.unsafe_fuse_dynamic_shaped_broadcast = fused
    context, module = ir.Context(), None
    api.prepare_mlir_context(context)
    with context:
        try:
            module = ir.Module.parse(exported.mlir_module_serialized)
            passes.PassManager.parse(_TO_STABLEHLO).run(module.operation)
            api.set_signature(module.operation, _SIGNATURE, list(program.names), [OUTPUT])
            api.run_convert_to_tfl_passes(module, passes.PassManager(), config)
            content: bytes = api.export_flatbuffer_to_bytes(module.operation)
        except Exception as error:
            left = set() if module is None else set(_left(module.operation))
            what = f"it has nothing for {listed(sorted(left))}" if left else reason(error)
            raise ConfigError(
                f"litert-converter cannot convert the model ({what}): {instead}, or leave out what is named here"
            ) from None
    return content


def _left(operation: Any) -> Iterator[str]:
    """The names of the operations that no LiteRT file has, in what the converter made."""
    for inner in (one for region in operation.regions for block in region.blocks for one in block.operations):
        # A file that cannot be written has the names that StableHLO's operations are kept under.
        name = re.sub(r"^vhlo\.(.*)_v\d+$", r"stablehlo.\1", inner.operation.name)
        if name.partition(".")[0] not in {"tfl", "arith", "func", "builtin"} or name in _LOOPS:
            yield name
        yield from _left(inner.operation)


def _logits(content: bytes, names: tuple[str, ...], instead: str, arrays: list[Any]) -> Float[np.ndarray, "..."]:
    """The interpreter's, of a file's content. Raises `ConfigError`."""
    interpreter = _imported("ai_edge_litert.interpreter").Interpreter
    try:
        runner = interpreter(model_content=content).get_signature_runner()
        return np.asarray(runner(**dict(zip(names, arrays, strict=True)))[OUTPUT], np.float32)
    except Exception as error:
        raise ConfigError(
            f"LiteRT cannot run what litert-converter made of the model ({reason(error)}): {instead}"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the TensorFlow in the converter says of its kernels, which are not asked for anything here."""
    name = "TF_ENABLE_ONEDNN_OPTS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]
