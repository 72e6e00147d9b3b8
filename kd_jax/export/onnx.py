"""A model as an ONNX file, by jax2onnx, compared with the model itself in onnxruntime; and with int8 weights."""

import contextlib
import functools
import importlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from kd_jax.errors import ConfigError, DataError
from kd_jax.export.compared import OUTPUT, TOLERANCE, check_logits, check_names, wanted
from kd_jax.export.convertible import CONVERTIBLE
from kd_jax.export.program import Program, traced
from kd_jax.files import inputs_of, reason
from kd_jax.files.written import write_whole
from kd_jax.models.onnx import open_session
from kd_jax.version import __version__

PyTree = Any

_INSTALL = "pip install 'kd-jax[export]'"
_INSTEAD = "export it as StableHLO"


def to_onnx(
    model: Any, path: str | Path, inputs: PyTree, *, prepare: Any = None, batch: int | None = None,
    tolerance: float = TOLERANCE,
) -> Path:  # fmt: skip
    """Writes a model as the ONNX file `path`, and gives its path back: logits of any number of examples.

    The file is run in onnxruntime on `inputs`, the first 64, and is only kept where its logits are the model's.

    model: an `nnx.Module`, or a `Model` with its variables. inputs: of some examples, or `jax.ShapeDtypeStruct`s, for
        which numbers are made. Their names in the file are `inputs` for an array, `inputs_0`, … for a tuple, and their
        own in a dict; the output's is `logits`. prepare: as of the training; the file does it, too. batch: a fixed
        number of examples, for a model that cannot have any.
    tolerance: of the largest logit below 1e4, or of 1 where that is larger; what is 1e4 or more, as a mask makes it,
        may differ by so much of itself.

    Needs jax2onnx and onnxruntime, `pip install 'kd-jax[export]'`. Raises `ConfigError`, where the converter or
    onnxruntime lacks what the model computes, or the logits differ, and `DataError` where the file cannot be written.
    """
    path, inputs = _named(path), inputs_of(inputs)
    check_names(inputs, "an ONNX file")
    program = traced(model, inputs, prepare=prepare, batch=batch)
    content = _converted(program)
    own = wanted(model, inputs, prepare=prepare, batch=batch)
    check_logits(functools.partial(_logits, content), program, own, tolerance, "the ONNX file", _INSTEAD)
    return write_whole(path, content)


def to_int8(onnx_path: str | Path, path: str | Path) -> Path:
    """Writes the ONNX file `path`, which has what the file `onnx_path` has with weights of 8 bits.

    By onnxruntime's dynamic quantisation: matrices, embeddings and convolutions get weights of 8 bits, and what they
    are multiplied with is quantised as it comes, with one scale for all examples of a call, so that an answer depends a
    little on the others. Weights have no sign, so that no processor's sums overflow. What that
    costs is in no formula: measure it, `kd.export.report`. Raises `ConfigError`, and `DataError` for a damaged file.
    """
    path = _named(path)
    open_session(onnx_path)
    quantization = _imported("onnxruntime.quantization")
    onnx, models = _imported("onnx"), _imported("onnxruntime.quantization.onnx_model")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, small = Path(folder) / "plain.onnx", Path(folder) / "small.onnx"
        try:
            _fold(Path(onnx_path).expanduser(), plain)
            model = models.ONNXModel(onnx.load(str(plain)))
            # A product and a sum in one are not quantised, and only taken apart where the sum counts.
            for node in model.model.graph.node:
                beta = next((one for one in node.attribute if one.name == "beta"), None)
                if node.op_type == "Gemm" and beta is not None and beta.f == 0:
                    del node.input[2:]
                    node.attribute.remove(beta)
            model.replace_gemm_with_matmul()
            used = {node.domain for node in model.model.graph.node}
            for one in [one for one in model.model.opset_import if one.domain not in {"", *used}]:
                model.model.opset_import.remove(one)
            quantization.quantize_dynamic(model.model, small, weight_type=quantization.QuantType.QUInt8)
        except Exception as error:
            raise ConfigError(
                f"onnxruntime cannot quantise {onnx_path} ({reason(error)}): use the file as it is"
            ) from None
        return write_whole(path, small.read_bytes())


def _fold(path: Path, folded: Path) -> None:
    """The same file with the constants computed, among which the weights are found."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _named(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".onnx":
        raise DataError(f"a model cannot be written to {path}: name a file that ends in .onnx")
    return path


def check_packages() -> None:
    """Raises `ConfigError` where a package is missing that ONNX needs."""
    for name in ("jax2onnx", "onnx", "onnxruntime"):
        _imported(name)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name.partition('.')[0]} is needed for ONNX, and cannot be imported ({reason(error)}): {_INSTALL}"
        ) from None


def _converted(program: Program) -> bytes:
    """The file's content."""
    jax2onnx = _imported("jax2onnx")
    shapes = jax.tree.leaves(program.inputs)
    with _quiet(), _lax_alone():
        try:
            made = jax2onnx.to_onnx(
                program._replace(instead=CONVERTIBLE), inputs=shapes, input_names=program.names, output_names=[OUTPUT]
            )
        except Exception as error:
            raise ConfigError(
                f"jax2onnx cannot convert the model ({reason(error)}): export it as StableHLO, or leave out what is "
                "named here"
            ) from None
    _imported("kd_jax.export.pooling").move_axes(made)
    made.producer_name, made.producer_version = "kd_jax", __version__
    content: bytes = made.SerializeToString()
    return content


def _logits(content: bytes, arrays: list[Any]) -> Float[np.ndarray, "..."]:
    """onnxruntime's, of a file's content. Raises `ConfigError`."""
    try:
        return open_session(content).logits(arrays)
    except ConfigError as error:
        raise ConfigError(f"onnxruntime cannot run what jax2onnx made of the model ({error}): {_INSTEAD}") from None


@contextlib.contextmanager
def _lax_alone() -> Iterator[None]:
    """Lets jax2onnx load its converters of `jax.lax` alone: a `Program` needs no others, which take half a minute.

    Afterwards it loads them when they are asked for.
    """
    plugins = _imported("jax2onnx.plugins.plugin_system")
    if getattr(plugins, "_already_imported_plugins", None) is not False:
        yield
        return
    package = _imported("jax2onnx.plugins.jax.lax")
    for file in sorted(Path(package.__path__[0]).glob("*.py")):
        # Another version of JAX may lack what one of them wants.
        with contextlib.suppress(Exception):
            importlib.import_module(f"{package.__name__}.{file.stem}")
    plugins._already_imported_plugins = True
    try:
        yield
    finally:
        plugins._already_imported_plugins = False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries log of their own doings."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir", "root")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
