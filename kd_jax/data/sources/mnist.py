"""The real MNIST, packaged with kd_jax: 60,000 training and 10,000 test images of 28 × 28 pixels.

MNIST is by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, and licensed CC BY-SA 3.0; see `MNIST-LICENSE.md`
beside the file. `tools/pack_mnist.py` packs it.
"""

from importlib import resources

import numpy as np
from jaxtyping import UInt8

from kd_jax.data.dataset import Dataset, make_dataset

TRAIN, TEST, SIDE = 60_000, 10_000, 28


def pack(images: UInt8[np.ndarray, "..."]) -> tuple[UInt8[np.ndarray, " bytes"], UInt8[np.ndarray, " pixels"]]:
    """A bit mask of the pixels that are not 0, and those pixels: deflated, 9 % smaller than the images deflated."""
    return np.packbits(images != 0), images[images != 0]


def unpack(mask: UInt8[np.ndarray, " bytes"], ink: UInt8[np.ndarray, " pixels"]) -> UInt8[np.ndarray, " all_pixels"]:
    """What `pack` packed, flat."""
    inked = np.unpackbits(mask).view(bool)
    pixels = np.zeros(inked.size, np.uint8)
    pixels[inked] = ink
    return pixels


def load() -> Dataset:
    """MNIST, bit for bit as it was published; no network and no TensorFlow is needed."""
    with resources.files("kd_jax.data.sources").joinpath("mnist.npz").open("rb") as file, np.load(file) as packed:
        images = unpack(packed["ink_mask"], packed["ink"]).reshape(-1, SIDE, SIDE)
        labels = packed["labels"]
    return make_dataset("mnist", images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:], classes=10)
