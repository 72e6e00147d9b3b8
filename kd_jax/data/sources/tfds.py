"""Any image classification data set of TensorFlow Datasets: `mnist`, `cifar10:3.0.2`, `emnist/letters`.

TensorFlow prepares a data set once; reading what is prepared needs none. Preparing shuffles, always in the same way, so
the examples come in TFDS's order and not in the order of publication.
"""

import contextlib
import difflib
import errno
import hashlib
import importlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Shaped

from kd_jax.data.dataset import Dataset, make_dataset
from kd_jax.data.mapped import ARRAYS, opened
from kd_jax.errors import DataError
from kd_jax.files import cache

INSTALL = "pip install 'kd-jax[tfds]'"
CATALOG = "https://www.tensorflow.org/datasets/catalog"
_FORMAT = "array_record"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Arrays = dict[str, Shaped[np.ndarray, "..."]]


def load(place: str, *, stream: bool = False) -> Dataset:
    """The `Dataset` that TFDS calls `place`, prepared into TFDS's own folder if it is not there, and decoded only once.

    stream: decoded into files, one image after the other, which the training images are read from as they are needed.
    Raises `DataError`, also where TensorFlow or the network is needed and missing.
    """
    name = f"tfds:{place}"
    with _quiet():
        # Not the package itself, which logs what it fails to import, and then lacks its functions.
        tfds = _import("tensorflow_datasets.public_api", name)
        builder = _builder(tfds, place)
        image, label = _keys(tfds, builder.info, name)
        if not builder.is_prepared():
            _prepare(tfds, builder, name)
        if _FORMAT not in (formats := {each.value for each in builder.info.available_file_formats()}):
            raise DataError(
                f"{name} is prepared in {builder.data_dir} as {', '.join(sorted(formats))}, and only {_FORMAT} can be "
                "read: set TFDS_DATA_DIR to another folder, and it is prepared anew there"
            )
        if not {"train", "test"} <= set(builder.info.splits):
            raise DataError(
                f"{name} has the splits {', '.join(builder.info.splits) or 'none'}, and train and test are both "
                "needed: choose another data set, or choose a test set of your own and use npz:FILE"
            )
        kept, classes = _kept_path(builder), builder.info.features[label].num_classes
        if stream:

            def write(folder: Path) -> None:
                _decode(builder, image, label, name, folder)

            return opened(name, kept.with_suffix(""), write, classes=classes)
        if (arrays := _read_kept(kept)) is None:
            arrays = _decode(builder, image, label, name)
            _keep(arrays, kept)
    return make_dataset(name, *(arrays[key] for key in ARRAYS), classes=classes)


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{name} needs {package}, which cannot be imported ({_line(error)}): {INSTALL}") from None


def _builder(tfds: ModuleType, place: str) -> Any:
    try:
        return tfds.builder(place, data_dir=os.environ.get("TFDS_DATA_DIR") or None)
    except tfds.core.DatasetNotFoundError:
        wanted = place.partition(":")[0].partition("/")[0]
        close = difflib.get_close_matches(wanted.lower(), tfds.list_builders(with_community_datasets=False))
        hint = f"did you mean {' or '.join(close)}?" if close else f"{CATALOG} lists them all"
        raise DataError(f"TFDS has no data set {wanted!r}: {hint}") from None
    except ImportError as error:
        raise DataError(f"tfds:{place} needs a package that is missing ({_line(error)}): {_remedy(error)}") from None
    except Exception as error:  # AssertionError, TypeError and others, for a wrong version, configuration or option
        raise DataError(f"TFDS cannot load tfds:{place} ({_line(error)}): see {CATALOG} for what there is") from None


def _keys(tfds: ModuleType, info: Any, name: str) -> tuple[str, str]:
    """Names of the image and the label among the features, looked at before anything is downloaded."""
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    for keys in (info.supervised_keys, ("image", "label")):
        if isinstance(keys, tuple) and len(keys) == 2 and all(isinstance(key, str) and key in features for key in keys):
            image, label = (features[key] for key in keys)
            if isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel):
                if image.np_dtype != np.uint8:
                    raise DataError(f"{name} has pixels of type {np.dtype(image.np_dtype)}: they must be uint8")
                return keys
    raise DataError(
        f"{name} is no image classification data set (its features are {', '.join(features) or 'no dictionary'}): "
        "one image and one class label for each example are needed"
    )


def _prepare(tfds: ModuleType, builder: Any, name: str) -> None:
    with _no_stderr(), contextlib.suppress(RuntimeError):  # RuntimeError: TensorFlow is already in use.
        # Asked for here, because TFDS would first download everything, and then miss it. Without a GPU, because
        # TensorFlow would take the memory that JAX needs.
        _import("tensorflow", name).config.set_visible_devices([], "GPU")
    downloader: Any = importlib.import_module("tensorflow_datasets.core.download.downloader")
    # TFDS's own 10 need 205 s to tell that there is no network, and 5 need 6 s.
    retries, downloader.MAX_RETRIES = downloader.MAX_RETRIES, 5
    try:
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(file_format=_FORMAT, download_config=config)
    except Exception as error:  # whatever the code of any of TFDS's data sets raises
        why = f"{name} cannot be prepared ({type(error).__name__}: {_line(error)})"
        if type(error).__name__ == "NonMatchingChecksumError":
            remedy = "try again, and if it stays so, update tensorflow-datasets, which knows the checksums"
        elif type(error).__name__ == "DownloadError" or type(error).__module__.startswith(("requests.", "urllib")):
            remedy = "check the network, or use mnist, which needs none"
        elif isinstance(error, ImportError):
            remedy = _remedy(error)
        elif builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            manual = builder.data_dir_root / "downloads" / "manual"
            remedy = f"it must be downloaded by hand into {manual}, as {CATALOG}/{builder.name} says"
        else:
            remedy = f"see what `tfds build {name.removeprefix('tfds:')} --file_format={_FORMAT}` says"
        raise DataError(f"{why}: {remedy}") from None
    finally:
        downloader.MAX_RETRIES = retries


def _decode(builder: Any, image: str, label: str, name: str, folder: Path | None = None) -> Arrays:
    """The arrays of both parts; with a folder as its files."""

    def empty(key: str, shape: tuple[int, ...], dtype: Any) -> Any:
        if folder is None:
            return np.empty(shape, dtype)
        array = np.lib.format.open_memmap(folder / f"{key}.npy", "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            # A disk that is full would end the process when a page is written.
            with (folder / f"{key}.npy").open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return array

    arrays: Arrays = {}
    try:
        for part in ("train", "test"):
            examples = builder.as_data_source(part, file_format=_FORMAT)
            first = examples[0][image].shape if len(examples) else (0, 0, 0)
            images = empty(f"{part}_images", (len(examples), *first), np.uint8)
            labels = empty(f"{part}_labels", (len(examples),), np.int32)
            for index, example in enumerate(examples):
                if example[image].shape != first:
                    raise DataError(
                        f"the {part} part of {name} has images of shape {first} and {example[image].shape}: "
                        "they must all have one shape, so resize them and use npz:FILE"
                    )
                images[index], labels[index] = example[image], example[label]
            arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{name} cannot be decoded ({_line(error)}): {_remedy(error)}") from None
    except Exception as error:
        if folder is not None and isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise
        # TFDS, array_record, the protocol buffers and the image decoder each raise their own.
        raise DataError(
            f"{name} is damaged in {builder.data_dir} ({_line(error)}): delete that folder, and it is prepared anew"
        ) from None
    return arrays


def _kept_path(builder: Any) -> Path:
    """The cache file of what is prepared: another one for data that are prepared elsewhere, or anew."""
    sha = hashlib.sha256(os.path.abspath(builder.data_dir).encode())
    for file in sorted(builder.data_path.iterdir()):
        sha.update(f"\n{file.name} {file.stat().length} {file.stat().mtime}".encode())
    sha.update((builder.data_path / "dataset_info.json").read_bytes())
    return cache.folder("tfds") / f"{builder.info.full_name.replace('/', '-')}-{sha.hexdigest()[:16]}.npz"


def _read_kept(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in ARRAYS}
    except Exception:  # Whatever is wrong with it, it can be made again.
        return None


def _keep(arrays: Arrays, path: Path) -> None:
    with contextlib.suppress(OSError):  # without room or permission, it is decoded again the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            np.savez(Path(folder) / path.name, **arrays)  # type: ignore[arg-type]
            os.replace(Path(folder) / path.name, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS's progress on stderr, if that is a terminal; what it, and TensorFlow, warn of not at all."""
    from absl import logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Nothing on the stderr of the process, where TensorFlow's libraries write however its log is set."""
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)


def _remedy(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    return (
        INSTALL
        if package in ("", "tensorflow", "array_record", "importlib_resources", "PIL")
        else f"pip install {package}"
    )


def _line(error: BaseException) -> str:
    """The first line of what the error says, no longer than is read, without the arguments that TFDS puts before it."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rpartition('}": ')[2].rstrip(".: ")
    return first if len(first) <= 160 else f"{first[:160]}…"
