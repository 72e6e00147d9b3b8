"""Augmentation and normalisation of images inside the compiled step, for `prepare=`.

    prepare=kd.augment.chain(
        kd.augment.random_crop(padding=4),
        kd.augment.random_flip(),
        kd.augment.normalise(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
    )

is what the papers do with CIFAR-100. Each is a function `(key, images, train) -> images`, equal by value, of images
`[batch, height, width, channels]`. Crops and flips are drawn from the key, anew for each image and step, in training
alone: student and teacher see the same view, and a resumed training draws what it would have drawn. `mixup` and
`cutmix` change the labels, too; they stand in a chain after these, or alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from kd_jax.data.batch import Batch, check_whole
from kd_jax.data.mixing import checked_probability, mixes, prepared
from kd_jax.data.mixing import cutmix as cutmix
from kd_jax.data.mixing import mixup as mixup
from kd_jax.errors import ConfigError, ShapeError

Prepare = Callable[[Key[Array, ""], Any, bool], Any]
Images = Num[Array, "batch height width channels"]


def random_crop(padding: int) -> Prepare:
    """Cuts an image of the same size out of one with `padding` pixels of 0 on each side; every place is as likely.

    It stands before `normalise`, where 0 is black. Raises `ConfigError` unless it is a whole number of at least 0.
    """
    return _RandomCrop(check_whole(padding, "padding", 0))


def random_flip(probability: float = 0.5) -> Prepare:
    """Turns left to right, with a probability. Raises `ConfigError` for one outside of 0 to 1."""
    return _RandomFlip(checked_probability(probability))


def normalise(mean: Any, std: Any) -> Prepare:
    """(x − mean) / std of each channel, in training and evaluation. Bytes become x / 255 before.

    mean, std: of the training images, in [0, 1] as their pixels; one number for each channel. Floats keep their type,
    bytes become float32. Raises `ConfigError`.
    """
    try:
        means, deviations = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError):
        raise ConfigError(
            f"mean is {mean!r} and std {std!r}: give a number for each channel, such as (0.13,)"
        ) from None
    if len(means) != len(deviations) or not means:
        raise ConfigError(f"mean has {len(means)} numbers and std {len(deviations)}: give one of each for each channel")
    if not all(deviation > 0 for deviation in deviations):
        raise ConfigError(f"std is {deviations}: every number must be above 0")
    return _Normalise(means, deviations)


def chain(*functions: Any) -> Prepare:
    """One after the other, in training each with its own key. Raises `ConfigError` for what is no function."""
    for function in functions:
        if not callable(function):
            raise ConfigError(f"{function!r} is no function: chain functions of (key, images, train)")
    return _Chain(functions)


@dataclass(frozen=True)
class _RandomCrop:
    padding: int

    def __call__(self, key: Any, images: Any, train: bool) -> Any:
        images = _checked(images)
        if not train or not self.padding:
            return images
        margin = (self.padding, self.padding)
        padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)))
        starts = jax.random.randint(key, (len(images), 2), 0, 2 * self.padding + 1)

        def cut(image: Array, start: Array) -> Array:
            return jax.lax.dynamic_slice(image, (start[0], start[1], jnp.zeros_like(start[0])), images.shape[1:])

        return jax.vmap(cut)(padded, starts)


@dataclass(frozen=True)
class _RandomFlip:
    probability: float

    def __call__(self, key: Any, images: Any, train: bool) -> Any:
        images = _checked(images)
        if not train:
            return images
        turned = jax.random.bernoulli(key, jnp.float32(self.probability), (len(images),))
        return jnp.where(turned[:, None, None, None], images[:, :, ::-1], images)


@dataclass(frozen=True)
class _Normalise:
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, key: Any, images: Any, train: bool) -> Float[Array, "batch height width channels"]:
        images = _checked(images)
        if images.shape[-1] != len(self.mean):
            raise ShapeError(
                f"the images have {images.shape[-1]} channels and normalise {len(self.mean)} means: give one of each"
            )
        if jnp.issubdtype(images.dtype, jnp.integer):
            images = images.astype(jnp.float32) / 255
        mean, std = (jnp.asarray(numbers, images.dtype)[None, None, None] for numbers in (self.mean, self.std))
        return (images - mean) / std


@dataclass(frozen=True)
class _Chain:
    functions: tuple[Prepare, ...]

    @property
    def mixes(self) -> bool:
        """Whether one of them mixes examples."""
        return any(map(mixes, self.functions))

    def __call__(self, key: Any, images: Any, train: bool) -> Any:
        for number, function in enumerate(self.functions):
            images = function(jax.random.fold_in(key, number) if train else key, images, train)
        return images

    def of_batch(self, key: Any, batch: Batch) -> Batch:
        """In training, with the same keys; those that mix change the labels, too."""
        for number, function in enumerate(self.functions):
            batch = prepared(function, batch, jax.random.fold_in(key, number))
        return batch


def _checked(images: Any) -> Images:
    """Raises `ShapeError` for what are no images."""
    if getattr(images, "ndim", None) != 4:
        shown = f"of the shape {images.shape}" if hasattr(images, "shape") else f"a {type(images).__name__}"
        raise ShapeError(f"the inputs are {shown}: give images [batch, height, width, channels]")
    return jnp.asarray(images)
