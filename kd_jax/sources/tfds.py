"""Any image classification data set of TensorFlow Datasets, by its name there: `mnist`, `cifar10:3.0.2`, `emnist/letters`.

TensorFlow prepares a data set once; reading what is prepared needs none. Preparing shuffles, always in the same way, so
the examples come in TFDS's order and not in the order of publication.
"""

import contextlib
import difflib
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from kd_jax.data import DataError, Dataset, make_dataset

INSTALL = "pip install 'kd-jax[tfds]'"
CATALOG = "https://www.tensorflow.org/datasets/catalog"
_FORMAT = "array_record"
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
# TFDS's own 10 need 205 s to find out that there is no network; 5 need 6 s.
_DOWNLOAD_ATTEMPTS = 5

Arrays = dict[str, np.ndarray]


def load(place: str) -> Dataset:
    """The `Dataset` that TFDS calls `place`, prepared into TFDS's own folder if it is not there, and decoded only once.

    Raises `DataError`, also where TensorFlow or the network is needed and missing.
    """
    name = f"tfds:{place}"
    with _quiet():
        tfds = _tensorflow_datasets()
        builder = _builder(tfds, place)
        image, label = _keys(tfds, builder.info, name)
        if not builder.is_prepared():
            _prepare(tfds, builder, name)
        if _FORMAT not in (formats := {each.value for each in builder.info.available_file_formats()}):
            raise DataError(
                f"{name} is prepared in {builder.data_dir} as {', '.join(sorted(formats))}, and only {_FORMAT} is read: "
                "set TFDS_DATA_DIR to another folder, and it is prepared anew there"
            )
        if not {"train", "test"} <= set(builder.info.splits):
            raise DataError(
                f"{name} has the splits {', '.join(builder.info.splits) or 'none'}: train and test are both needed, "
                "so choose another data set, or make an npz file with a test set of your own and use npz:FILE"
            )
        kept = _kept_path(builder)
        if (arrays := _read_kept(kept)) is None:
            arrays = _decode(builder, image, label, name)
            _keep(arrays, kept)
        classes = builder.info.features[label].num_classes
    return make_dataset(name, *(arrays[part] for part in _ARRAYS), classes=classes)


def cache_folder() -> Path:
    """Where kd_jax keeps what it can make again: `$KD_JAX_CACHE`, else `kd_jax` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("KD_JAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kd_jax"


def _tensorflow_datasets() -> ModuleType:
    try:
        # Not the package itself, which logs what it fails to import and then lacks its functions.
        import tensorflow_datasets.public_api as tfds
    except ImportError as error:
        raise DataError(f"tfds: needs tensorflow-datasets, and it cannot be imported ({error}): {INSTALL}") from None
    return tfds


def _builder(tfds: ModuleType, place: str) -> Any:
    try:
        return tfds.builder(place, data_dir=os.environ.get("TFDS_DATA_DIR") or None)
    except tfds.core.DatasetNotFoundError:
        wanted = place.partition(":")[0].partition("/")[0]
        close = difflib.get_close_matches(wanted.lower(), tfds.list_builders(with_community_datasets=False))
        hint = f"did you mean {' or '.join(close)}?" if close else f"{CATALOG} lists them all"
        raise DataError(f"TFDS has no data set {wanted!r}: {hint}") from None
    except ImportError as error:
        raise DataError(f"tfds:{place} needs the package {error.name or error}, which is missing: {INSTALL}") from None
    except (
        Exception
    ) as error:  # TFDS raises AssertionError, TypeError and others for a wrong version, config or option.
        raise DataError(
            f"TFDS has no such version or configuration as tfds:{place} ({_line(error)}): write tfds:NAME, "
            f"tfds:NAME/CONFIG or tfds:NAME:VERSION as {CATALOG} lists them"
        ) from None


def _keys(tfds: ModuleType, info: Any, name: str) -> tuple[str, str]:
    """The names of the image and of the label among the features, looked at before anything is downloaded."""
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    for keys in (info.supervised_keys, ("image", "label")):
        if not isinstance(keys, tuple) or len(keys) != 2 or not all(isinstance(k, str) and k in features for k in keys):
            continue
        image, label = features[keys[0]], features[keys[1]]
        if isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel):
            if image.np_dtype != np.uint8:
                raise DataError(
                    f"{name} has pixels of type {np.dtype(image.np_dtype)}: only images of uint8 can be used"
                )
            return keys
    raise DataError(
        f"{name} is no image classification data set (its features are {', '.join(features) or 'no dictionary'}): "
        "one image and one class label for each example are needed"
    )


def _prepare(tfds: ModuleType, builder: Any, name: str) -> None:
    try:
        # Before the download, which TFDS would do first, only to fail after it.
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # TensorFlow is in use, and its devices can no longer be chosen.
            tf.config.set_visible_devices([], "GPU")  # or it would take the memory that JAX needs
    except ImportError:
        raise DataError(
            f"{name} is not prepared in {builder.data_dir}, and TensorFlow, which prepares it, is missing: {INSTALL}"
        ) from None
    import requests
    from tensorflow_datasets.core.download import downloader

    attempts, downloader.MAX_RETRIES = downloader.MAX_RETRIES, _DOWNLOAD_ATTEMPTS
    try:
        builder.download_and_prepare(
            file_format=_FORMAT, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except tfds.download.NonMatchingChecksumError as error:
        raise DataError(
            f"{name} cannot be prepared, because a download does not have the checksum that TFDS knows ({_line(error)}): "
            "try again, and if it stays so, the publisher has changed the file, so update tensorflow-datasets"
        ) from None
    except (requests.RequestException, tfds.download.DownloadError) as error:
        raise DataError(
            f"{name} is not prepared in {builder.data_dir} and cannot be downloaded ({_line(error)}): check the network, "
            "or use a data set that needs none, such as mnist"
        ) from None
    except Exception as error:  # Anything that the code of one of TFDS's thousand data sets may raise.
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            raise DataError(
                f"{name} must be downloaded by hand: put its files into {builder.data_dir_root / 'downloads' / 'manual'} "
                f"as {CATALOG}/{builder.name} says ({_line(error)})"
            ) from None
        raise DataError(
            f"TFDS cannot prepare {name} ({type(error).__name__}: {_line(error)}): install what is missing, or see all "
            f"that it says with `tfds build {name.removeprefix('tfds:')} --file_format={_FORMAT}`"
        ) from None
    finally:
        downloader.MAX_RETRIES = attempts


def _decode(builder: Any, image: str, label: str, name: str) -> Arrays:
    arrays: Arrays = {}
    try:
        for part in ("train", "test"):
            examples = builder.as_data_source(part, file_format=_FORMAT)
            arrays[f"{part}_images"], arrays[f"{part}_labels"] = _stack(
                examples, image, label, f"the {part} part of {name}"
            )
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{name} cannot be decoded ({_line(error)}): {INSTALL}") from None
    except Exception as error:  # TFDS, its protocol buffers, array_record and Pillow each raise their own.
        raise DataError(
            f"{name} is damaged in {builder.data_dir} ({_line(error)}): delete that folder, and it is prepared anew"
        ) from None
    return arrays


def _stack(
    examples: Sequence[Any], image: str, label: str, where: str
) -> tuple[UInt8[np.ndarray, "examples height width channels"], Int32[np.ndarray, " examples"]]:
    first = examples[0][image].shape if len(examples) else (0, 0, 0)
    images, labels = np.empty((len(examples), *first), np.uint8), np.empty(len(examples), np.int32)
    for index, example in enumerate(examples):
        if example[image].shape != first:
            raise DataError(
                f"{where} has images of shape {first} and {example[image].shape}: all must have one shape, so resize them "
                "and use npz:FILE"
            )
        images[index], labels[index] = example[image], example[label]
    return images, labels


def _kept_path(builder: Any) -> Path:
    """The cache file of what is prepared; data prepared elsewhere or anew get another."""
    sha = hashlib.sha256(os.path.abspath(builder.data_dir).encode())
    for file in sorted(builder.data_path.iterdir()):
        facts = file.stat()
        sha.update(f"\n{file.name} {facts.length} {facts.mtime}".encode())
    sha.update((builder.data_path / "dataset_info.json").read_bytes())
    return cache_folder() / "tfds" / f"{builder.info.full_name.replace('/', '-')}-{sha.hexdigest()[:16]}.npz"


def _read_kept(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in _ARRAYS}
    except Exception:  # However it is damaged, it can be made again.
        return None


def _keep(arrays: Arrays, path: Path) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError:  # No room or no permission: it is decoded again the next time.
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS's progress only on a terminal, and always on stderr; warnings of its and TensorFlow's logs not at all."""
    from absl import logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _line(error: BaseException) -> str:
    """The first line of what the error says, not longer than is read."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
    return first if len(first) <= 200 else f"{first[:200]}…"
