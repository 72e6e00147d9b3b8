"""A `Dataset`: uint8 images and integer labels in memory, checked."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Num, Shaped, UInt8

from kd_jax.errors import DataError
from kd_jax.files import as_numpy

Labels = Int32[np.ndarray, " examples"]
Images = UInt8[np.ndarray, "examples height width channels"]

# In float64 all of them at once could take 24 times the memory that they came in.
_EXAMPLES_AT_ONCE = 1024
# Digits of 4 or 5 bits are below it (scikit-learn's reach 16), photographs and scans above.
_DIM = 32


class Dataset(NamedTuple):
    """Examples in memory, as they were published: nothing scaled, shuffled or augmented.

    name: the source it came from, as `load` takes it.
    train_images, test_images: uint8, `[examples, height, width, channels]`.
    train_labels, test_labels: int32 in [0, classes), `[examples]`.
    classes: number of classes.
    """

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: int

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, `(height, width, channels)`."""
        return self.train_images.shape[1:]

    def digest(self) -> str:
        """SHA-256 of every array with its shape, in hexadecimal: equal for equal data, wherever it came from."""
        sha = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            sha.update(repr(array.shape).encode())
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()


def development(dataset: Dataset) -> Dataset:
    """The training set alone, its last part (10,000 examples, at most a sixth) in the place of the test set.

    Hyperparameters are chosen on it. Raises `DataError` where there are too few examples for two parts.
    """
    count = len(dataset.train_labels)
    held = min(10_000, count // 6)
    if held < 1:
        raise DataError(f"{dataset.name} has {count} training examples: choosing by a part of them needs at least 6")
    images, labels = dataset.train_images, dataset.train_labels
    return dataset._replace(
        train_images=images[:-held], train_labels=labels[:-held], test_images=images[-held:], test_labels=labels[-held:]
    )


def make_dataset(
    name: str,
    train_images: Any,
    train_labels: Any,
    test_images: Any,
    test_labels: Any,
    *,
    classes: int | None = None,
) -> Dataset:
    """A checked `Dataset` from arrays, or lists, tensors and whatever else is read as one.

    Images may be `[examples, features]`, `[examples, height, width]` or `[examples, height, width, channels]`, as
    any numbers that are bytes (0 to 255) or, where none is above 1, bytes divided by 255; the type does not matter,
    nothing is rounded away, and images that are all but black as bytes are refused. Labels may be
    `[examples]` or `[examples, 1]`. Without `classes` there are as many as the largest training label tells.
    Raises `DataError`.
    """
    images, labels = {}, {}
    given = {"train": (train_images, train_labels), "test": (test_images, test_labels)}
    raw = {
        part: (as_numpy(pixels, f"the images of the {part} part"), as_numpy(numbers, f"the labels of the {part} part"))
        for part, (pixels, numbers) in given.items()
    }
    unit = _is_unit([pixels for pixels, _ in raw.values()], name)
    for part, (raw_images, raw_labels) in raw.items():
        where = f"the {part} part of {name}"
        images[part], labels[part] = _as_bytes(raw_images, where, unit=unit), _as_labels(raw_labels, where)
        if len(images[part]) != len(labels[part]):
            raise DataError(
                f"{where} has {len(images[part])} images and {len(labels[part])} labels: "
                "there must be one label for each image"
            )
        if images[part].size == 0:
            raise DataError(f"{where} is empty: at least one image with at least one pixel is needed")
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise DataError(
            f"{name} has training images of shape {images['train'].shape[1:]} and test images of shape "
            f"{images['test'].shape[1:]}: they must be the same"
        )
    if classes is None:
        classes = max(2, int(labels["train"].max()) + 1)
        if classes > max(2, len(labels["train"])):
            raise DataError(
                f"{name} has a training label {classes - 1} among {len(labels['train'])} examples: "
                "labels must number the classes from 0 without large gaps"
            )
    for part in ("train", "test"):
        outside = (labels[part] < 0) | (labels[part] >= classes)
        if outside.any():
            raise DataError(
                f"the {part} part of {name} has the label {labels[part][outside][0]}, outside the {classes} classes: "
                f"labels must be 0 to {classes - 1}"
            )
    return Dataset(
        name,
        images["train"],
        labels["train"].astype(np.int32),
        images["test"],
        labels["test"].astype(np.int32),
        classes,
    )


def _is_unit(parts: list[Shaped[np.ndarray, "..."]], name: str) -> bool:
    """Whether pixels are from 0 to 1, for both parts together: a test part of black and white alone is as the other.

    Raises `DataError` where they are neither that nor bytes that fill their range.
    """
    if any(part.dtype.kind not in "fiub" for part in parts):
        return False
    brightest = max((part.max() for part in parts if part.size), default=0)
    if 1 < brightest < _DIM and all((part == np.floor(part)).all() for part in parts if part.dtype.kind == "f"):
        raise DataError(
            f"{name} has pixels of at most {brightest}, which is all but black where 255 is white: give bytes from 0 "
            f"to 255, numpy.round(images * (255 / {brightest})).astype(numpy.uint8) where {brightest} is white"
        )
    return bool(brightest <= 1)


def _as_bytes(images: Shaped[np.ndarray, "..."], where: str, *, unit: bool) -> Images:
    if images.ndim not in (2, 3, 4):
        raise DataError(
            f"{where} has images in an array of shape {images.shape}: it must be [examples, features], "
            "[examples, height, width] or [examples, height, width, channels]"
        )
    if images.ndim == 4 and images.shape[1] in (1, 3) and min(images.shape[2:]) > 4:
        raise DataError(
            f"{where} has images in an array of shape {images.shape}, which has its {images.shape[1]} channels first: "
            "they must be the last axis, numpy.moveaxis(images, 1, -1)"
        )
    if images.dtype != np.uint8 or unit:
        images = _exact_bytes(images, where, unit=unit)
    if images.ndim == 2:
        images = images[:, :, None]
    if images.ndim == 3:
        images = images[..., None]
    return np.ascontiguousarray(images)


def _exact_bytes(images: Shaped[np.ndarray, "..."], where: str, *, unit: bool) -> UInt8[np.ndarray, "..."]:
    """Numbers as bytes, where that loses nothing; `unit`: they are bytes divided by 255."""
    if images.dtype.kind not in "fiub":
        raise DataError(f"{where} has pixels of type {images.dtype}: they must be numbers, best uint8")
    if images.size == 0:
        return images.astype(np.uint8)
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise DataError(f"{where} has NaN or infinite pixels: every pixel must be finite, from 0 to 255 or from 0 to 1")
    lowest, highest = images.min(), images.max()
    if lowest < 0 or highest > 255:
        raise DataError(f"{where} has pixels from {lowest} to {highest}: they must be from 0 to 255, or from 0 to 1")
    factor = 255 if unit else 1
    # Bytes divided by 255 in float32 may have been stored as float64.
    roundoff = max(np.finfo(np.float32).eps, np.finfo(images.dtype).eps) if unit and images.dtype.kind == "f" else 0
    exact = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), _EXAMPLES_AT_ONCE):
        raw = images[start : start + _EXAMPLES_AT_ONCE]
        pixels = np.round(raw.astype(np.float64) * factor)
        if np.abs(pixels / factor - raw).max() > roundoff:
            raise DataError(
                f"{where} has fractional pixels that are no bytes divided by 255, and bytes would round them: "
                "give the original uint8 pixels"
            )
        exact[start : start + _EXAMPLES_AT_ONCE] = pixels
    return exact


def _as_labels(labels: Shaped[np.ndarray, "..."], where: str) -> Num[np.ndarray, " examples"]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(
            f"{where} has labels in an array of shape {labels.shape}: "
            "it must be [examples], one whole number for each image"
        )
    if labels.dtype.kind not in "iuf":
        raise DataError(f"{where} has labels of type {labels.dtype}: they must be whole numbers")
    if labels.dtype.kind == "f" and not (np.isfinite(labels) & (labels == np.floor(labels))).all():
        raise DataError(f"{where} has labels that are no whole numbers: they must number the classes from 0")
    return labels
