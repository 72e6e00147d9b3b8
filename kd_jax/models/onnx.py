"""The door of ONNX: a file there as a teacher here, through onnxruntime, on the CPU and without a gradient."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped

from kd_jax.errors import ConfigError, DataError
from kd_jax.files import listed, open_regular, reason
from kd_jax.models.host import Host, HostNetwork
from kd_jax.models.network import Model, PyTree

_SMALLEST = float(np.finfo(np.float32).tiny)


def from_onnx(
    path: str | Path, *, output: str | None = None, probabilities: bool = False, threads: int | None = None
) -> Model:
    """A `Model` that asks an ONNX file for its logits through onnxruntime, as a teacher: on the CPU, no gradient.

    It is called back from compiled programs, one batch after another, with an array for a file of one input, a tuple in
    the order of its inputs, or a dict by their names. Where each example is seen more than once as it is, ask once:
    `kd.cached(kd.from_onnx(path), train)`.

    output: the name of the output that has the logits, where there are several. probabilities: whether it has
        probabilities; their logarithms are the logits then. threads: of onnxruntime; None leaves them to it.

    Raises `DataError` for a file that onnxruntime cannot read, and `ConfigError`, also where onnxruntime is missing.
    """
    return Model(HostNetwork(open_session(path, output=output, probabilities=probabilities, threads=threads)), {})


class Session(Host):
    """An ONNX file that onnxruntime has opened. inputs: their types by name. output: the name of the logits."""

    kind = "an ONNX file"

    digest = ""

    def __init__(self, session: Any, name: str, output: str, probabilities: bool, digest: str) -> None:
        """digest: of the file."""
        super().__init__()
        self.digest = hashlib.sha256(f"{digest} {output} {probabilities}".encode()).hexdigest()
        self.session, self.name, self.output, self.probabilities = session, name, output, probabilities
        self.inputs = {one.name: one.type for one in session.get_inputs()}

    def asked(self, inputs: PyTree) -> Float[np.ndarray, "..."]:
        """The file's logits."""
        given = self._named(inputs)
        try:
            (result,) = self.session.run([self.output], given)
        except Exception as error:
            shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in given.items())
            wants = ", ".join(f"{one.name} {one.type}{one.shape}" for one in self.session.get_inputs())
            raise ConfigError(
                f"{self.name} cannot be run with {shapes} ({reason(error)}): give its inputs as it wants them, {wants}"
            ) from None
        if not (isinstance(result, np.ndarray) and result.dtype.kind == "f"):
            kind = f"of type {result.dtype}" if isinstance(result, np.ndarray) else f"a {type(result).__name__}"
            raise ConfigError(
                f"the output {self.output} of {self.name} is {kind}: name one of floating-point numbers, output=…, of "
                f"{listed(one.name for one in self.session.get_outputs())}"
            )
        result = result.astype(np.float32)
        return np.log(np.maximum(result, _SMALLEST)) if self.probabilities else result

    def _named(self, inputs: PyTree) -> dict[str, Shaped[np.ndarray, "..."]]:
        """The arrays by the names of the file's inputs, in the types that it takes."""
        if isinstance(inputs, Mapping):
            named = {str(name): inputs[name] for name in inputs}
            if set(named) != set(self.inputs):
                raise ConfigError(
                    f"{self.name} has the inputs {listed(self.inputs)}, and {listed(named)} are given: give those"
                )
        else:
            arrays = jax.tree.leaves(inputs)
            if len(arrays) != len(self.inputs):
                raise ConfigError(
                    f"{self.name} has {len(self.inputs)} inputs ({listed(self.inputs)}), and {len(arrays)} are given: "
                    "give a tuple in that order, or a dict by these names"
                )
            named = dict(zip(self.inputs, arrays, strict=True))
        return {name: _as_type(np.asarray(leaf), self.inputs[name]) for name, leaf in named.items()}


def open_session(
    source: str | Path | bytes, *, output: str | None = None, probabilities: bool = False, threads: int | None = None
) -> Session:
    """The `Session` of a file, or of the bytes of one. Raises as `from_onnx`."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"ONNX files need onnxruntime, which cannot be imported ({reason(error)}): pip install onnxruntime"
        ) from None
    name = "the ONNX file" if isinstance(source, bytes) else str(source)
    digest = _digest(source)
    options = onnxruntime.SessionOptions()
    # What it finds worth a warning goes to the terminal of whoever distils.
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1 if threads else 0
    try:
        given = source if isinstance(source, bytes) else str(Path(source).expanduser())
        session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        kind = ConfigError if isinstance(source, bytes) else DataError
        raise kind(
            f"onnxruntime cannot open {name} ({reason(error)}): give an ONNX file with operators that it has"
        ) from None
    every = [one.name for one in session.get_outputs()]
    if output is None and len(every) > 1 and "logits" not in every:
        raise ConfigError(f"{name} has the outputs {listed(every)}: say which has the logits, output={every[0]!r}")
    chosen = output or ("logits" if "logits" in every else every[0])
    if chosen not in every:
        raise ConfigError(f"{name} has no output {chosen!r}: name one of {listed(every)}")
    return Session(session, name, chosen, probabilities, digest)


def _digest(source: str | Path | bytes) -> str:
    """SHA-256 of a file, or of its bytes, and of the files that its arrays lie in. Raises `DataError`."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open_regular(source) as file:
        content = file.read()
    sha = hashlib.sha256(content)
    for name in sorted(set(_elsewhere(content))):
        path = Path(source).expanduser().parent / name
        if path.is_file():
            with path.open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


def _elsewhere(content: bytes) -> Iterator[str]:
    """Names of files that a model says its arrays are in: the entries `location` of its `external_data`."""
    for found in re.finditer(rb"\n\x08location\x12([\x01-\x7f]|[\x80-\xff][\x01-\x7f])", content):
        low, *high = found[1]
        length = low & 0x7F | (high[0] << 7 if high else 0)
        yield content[found.end() : found.end() + length].decode(errors="ignore").replace("\0", "")


_TYPES = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16, "tensor(bool)": np.bool_,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16, "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64, "tensor(uint32)": np.uint32, "tensor(uint16)": np.uint16, "tensor(uint8)": np.uint8,
}  # fmt: skip


def _as_type(array: Shaped[np.ndarray, "..."], wanted: str) -> Shaped[np.ndarray, "..."]:
    """The same numbers in the type that a file takes, where that loses none: JAX has no int64 by default, say."""
    kind = _TYPES.get(wanted)
    return array.astype(kind) if kind is not None and np.can_cast(array.dtype, kind, "same_kind") else array
