"""How networks of an experiment see images: cropped, turned, mixed in training, and normalised inside the network."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kd_jax.data import augment
from kd_jax.data.augment import Prepare
from kd_jax.data.dataset import Dataset
from kd_jax.experiments.notebook.config import Training
from kd_jax.models import Model, Network, Output

PADDING = 4
"""Pixels, of `crop-flip`."""
ALPHAS = {"mixup": 0.2, "cutmix": 1.0}
"""Of the Beta distribution that the shares of mixed images are drawn from."""

_CHANGES = {
    "crop-flip": (augment.random_crop(PADDING), augment.random_flip()),
    "mixup": (augment.mixup(ALPHAS["mixup"]),),
    "cutmix": (augment.cutmix(ALPHAS["cutmix"]),),
}
_SOME = 10_000


@dataclass(frozen=True)
class Normalised(Network):
    """A network behind `kd.augment.normalise`; it is given pixels in [0, 1].

    Whatever crops, turns and mixes them, for student and teacher alike, stands before it, where 0 is black.
    """

    network: Network
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def init(self, key: Any) -> Any:
        """Those of the network itself."""
        return self.network.init(key)

    def apply(
        self, variables: Any, inputs: Any, *, train: bool = False, key: Any = None, features: tuple[str, ...] = ()
    ) -> tuple[Output, Any]:
        """The network's output for normalised images."""
        images = augment.normalise(self.mean, self.std)(key, inputs, train)
        return self.network.apply(variables, images, train=train, key=key, features=features)

    def split(self, variables: Any) -> tuple[Any, Any]:
        """As the network does."""
        return self.network.split(variables)

    def merge(self, params: Any, state: Any) -> Any:
        """As the network does."""
        return self.network.merge(params, state)

    def feature_shapes(self, variables: Any, inputs: Any) -> Any:
        """Those of the network, for which normalised images have the same shape."""
        return self.network.feature_shapes(variables, inputs)


def prepare(training: Training) -> Prepare | None:
    """What is drawn anew in each step; None for nothing."""
    if training.augment == "none":
        return None
    return augment.chain(*(change for name in training.augment.split("+") for change in _CHANGES[name]))


def seen(model: Model, training: Training, dataset: Dataset) -> Model:
    """The model as it sees images of a training like this."""
    if training.augment == "none":
        return model
    return Model(Normalised(model.network, *moments(dataset)), model.variables)


def moments(dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of the training images' pixels, as numbers in [0, 1].

    The deviation of a channel without one is 1.
    """
    return _moments(_Same(dataset.train_images))


class _Same:
    """Images, equal to themselves alone: a sweep asks for each of its settings."""

    def __init__(self, images: UInt8[np.ndarray, "examples height width channels"]) -> None:
        self.images = images

    def __hash__(self) -> int:
        return id(self.images)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.images is self.images


@lru_cache(maxsize=2)
def _moments(same: _Same) -> tuple[tuple[float, ...], tuple[float, ...]]:
    images = same.images

    # Some at a time: they may be on the disk.
    def counted(part: Any) -> Any:
        return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(part, -1, 0)])

    counts = np.sum([counted(images[first : first + _SOME]) for first in range(0, len(images), _SOME)], axis=0)
    levels, number = np.arange(256) / 255, counts[0].sum()
    mean = counts @ levels / number
    std = np.sqrt(np.sum(counts * (levels - mean[:, None]) ** 2, axis=1) / number)
    return tuple(map(float, mean)), tuple(map(float, np.where(std == 0, 1, std)))
