"""Every reader of files, with small files that it accepts, for `test_fuzz` and `tools/fuzz_readers`.

What is fuzzed may be a whole file, or the bytes within one that checksums or compression would otherwise keep from the
code that reads them.
"""

import gzip
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from kd_jax import DataError, Dataset, load, load_logits
from kd_jax.models import parameters, torch_weights

_RNG = np.random.default_rng(0)
_IMAGES, _LABELS = _RNG.integers(0, 256, (6, 3, 4)).astype(np.uint8), np.array([0, 1, 2, 0, 1, 2])
_LOGITS = _RNG.normal(size=(6, 3)).astype(np.float32)
_LONGEST_SENTENCE = 1500


class Reader(NamedTuple):
    """examples: bytes that it accepts. name: of the file that holds them. wrap: from the bytes to that file's.

    read: what becomes of the file, or `DataError`.
    """

    name: str
    examples: tuple[bytes, ...]
    read: Callable[[Path], Any]
    wrap: Callable[[bytes], bytes] = bytes


def refused(reader: Reader, content: bytes, folder: Path) -> str | None:
    """The sentence that `reader` refuses the bytes with, or None where it reads them; both are checked."""
    path = folder / reader.name
    path.write_bytes(reader.wrap(content))
    try:
        result = reader.read(path)
    except DataError as error:
        sentence = str(error)
        # No file here holds, or may claim, what does not fit.
        assert "fit into memory" not in sentence
        assert sentence.isprintable()
        assert 20 < len(sentence) < _LONGEST_SENTENCE, len(sentence)
        return sentence
    _check(result)
    return None


def _check(result: Any) -> None:
    """That what was read is what its type promises."""
    if isinstance(result, Dataset):
        images, labels = (result.train_images, result.test_images), (result.train_labels, result.test_labels)
        assert all(one.dtype == np.uint8 and one.shape[1:] == result.image_shape and one.size for one in images)
        assert all(one.dtype == np.int32 and 0 <= one.min() <= one.max() < result.classes for one in labels)
        assert [len(one) for one in images] == [len(one) for one in labels]
    else:
        leaves = jax.tree.leaves(result)
        assert leaves
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)


def idx_bytes(array: np.ndarray) -> bytes:
    """An idx file of `array`."""
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def npy_bytes(array: np.ndarray) -> bytes:
    """A `.npy` file of `array`."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def zip_bytes(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of `members`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return stream.getvalue()


def tensors_bytes(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


_STATE_DICT = {"fc1.weight": _LOGITS, "fc1.bias": _LOGITS[:, 0].copy(), "fc2.weight": _LOGITS.T[:2].copy()}
_NPZ = {"x_train": _IMAGES, "y_train": _LABELS, "x_test": _IMAGES[:2], "y_test": _LABELS[:2]}
_MEMBERS = {f"{name}.npy": npy_bytes(array) for name, array in _NPZ.items()}
_TENSORS = safetensors.numpy.save(_STATE_DICT, metadata={"program": "kd_jax"})


_PicklerInPython: Any = pickle._Pickler


class _Pickler(_PicklerInPython):
    """Writes what `torch.save` writes: the tests that need PyTorch compare the two."""

    def persistent_id(self, thing: Any) -> Any:
        return thing.value if isinstance(thing, _Persistent) else None

    def save(self, thing: Any, save_persistent_id: bool = True) -> None:
        if isinstance(thing, _Torch) and self.proto >= 4:
            for text in thing.name.split(" "):
                self.save(text)
            self.write(pickle.STACK_GLOBAL)
        elif isinstance(thing, _Torch):
            self.write(b"c" + thing.name.replace(" ", "\n").encode() + b"\n")
        elif isinstance(thing, _Called):
            self.save(thing.function)
            self.save(thing.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(thing, save_persistent_id)


class _Torch(NamedTuple):
    name: str


class _Persistent:
    def __init__(self, value: Any):
        self.value = value


class _Called:
    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments


def torch_pickle(state_dict: dict[str, np.ndarray], *numbers: Any, protocol: int = 2) -> bytes:
    """The pickle of a `state_dict` in a PyTorch file; `numbers` for the offset, shape and strides of its tensors."""
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol=protocol)
    described = OrderedDict()
    for place, (name, array) in enumerate(state_dict.items()):
        storage = _Persistent(("storage", _Torch("torch FloatStorage"), str(place), "cpu", array.size))
        whole = (0, array.shape, tuple(stride // array.itemsize for stride in array.strides))
        rebuild = _Torch("torch._utils _rebuild_tensor_v2")
        described[name] = _Called(rebuild, storage, *(numbers or whole), False, OrderedDict())
    pickler.dump(described)
    return stream.getvalue()


def torch_bytes(pickled: bytes, state_dict: dict[str, np.ndarray] = _STATE_DICT) -> bytes:
    """A PyTorch file of a pickle and the numbers of a `state_dict`."""
    members = {"w/data.pkl": pickled, "w/byteorder": b"little", "w/version": b"3\n"}
    return zip_bytes(members | {f"w/data/{place}": array.tobytes() for place, array in enumerate(state_dict.values())})


def _idx(path: Path) -> Dataset:
    """With the file as the training images of a folder whose other files are good."""
    folder = path.parent / "idx"
    if not folder.exists():
        folder.mkdir()
        (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(_LABELS))
        (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(_IMAGES[:2]))
        (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(_LABELS[:2]))
    shutil.copyfile(path, folder / "train-images-idx3-ubyte")
    return load(f"idx:{folder}")


def _npz(path: Path) -> Dataset:
    return load(f"npz:{path}")


def _logits(path: Path) -> np.ndarray:
    return load_logits(path, examples=6, classes=3)


def _member(content: bytes) -> bytes:
    return zip_bytes(_MEMBERS | {"x_train.npy": content})


_FLOATS = npy_bytes(_IMAGES.astype("f4")), npy_bytes(_IMAGES[..., None].astype(">i4", order="F"))
_PICKLE = torch_pickle(_STATE_DICT)
_PICKLES = (_PICKLE, torch_pickle(_STATE_DICT, protocol=4))

READERS = {
    "idx": Reader("images", (idx_bytes(_IMAGES),), _idx),
    "idx-gzip": Reader("images", (gzip.compress(idx_bytes(_IMAGES), mtime=0),), _idx),
    "idx-inflated": Reader("images", (idx_bytes(_IMAGES),), _idx, lambda content: gzip.compress(content, mtime=0)),
    "npz": Reader("d.npz", (zip_bytes(_MEMBERS), zip_bytes(_MEMBERS, zipfile.ZIP_DEFLATED)), _npz),
    "npz-member": Reader("d.npz", (_MEMBERS["x_train.npy"], *_FLOATS), _npz, _member),
    "logits-npy": Reader("l.npy", (npy_bytes(_LOGITS), npy_bytes(_LOGITS.astype("f8", order="F"))), _logits),
    "logits-npz": Reader("l.npz", (zip_bytes({"logits.npy": npy_bytes(_LOGITS)}, zipfile.ZIP_DEFLATED),), _logits),
    "logits-safetensors": Reader("l.safetensors", (safetensors.numpy.save({"logits": _LOGITS}),), _logits),
    "weights-safetensors": Reader("w.safetensors", (_TENSORS,), torch_weights.from_state_dict),
    "weights-pt": Reader("w.pt", (torch_bytes(_PICKLE),), torch_weights.from_state_dict),
    "weights-pickle": Reader("w.pth", _PICKLES, torch_weights.from_state_dict, torch_bytes),
    "parameters": Reader("p.safetensors", (_TENSORS,), parameters.load),
}
