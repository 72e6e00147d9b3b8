"""Images on the disk: written once, by one of several at once, and told as what they are."""

import resource
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_jax.data import mapped
from kd_jax.data.sources import tfds
from kd_jax.errors import DataError

RNG = np.random.default_rng(0)
NAME = "tfds:some"


class Builder:
    """Gives examples as TFDS does. most: of the pixels."""

    data_dir = "/prepared"

    def __init__(self, most: int = 255) -> None:
        self.parts = {
            part: [{"image": RNG.integers(0, most + 1, (4, 4, 1)).astype(np.uint8), "label": i % 3} for i in range(n)]
            for part, n in (("train", 30), ("test", 6))
        }

    def as_data_source(self, part: str, file_format: str) -> Any:
        return self.parts[part]

    def write(self, folder: Path) -> None:
        tfds._decode(self, "image", "label", NAME, folder)


def test_bits_are_not_taken_for_bytes(tmp_path: Path) -> None:
    """In memory they are scaled by 255."""
    with pytest.raises(DataError, match="the images of tfds:some are 0 and 1 alone, which are scaled to bytes"):
        mapped.opened(NAME, tmp_path / "bits", Builder(1).write, classes=3)
    builder = Builder()
    found = mapped.opened(NAME, tmp_path / "bytes", builder.write, classes=3)
    np.testing.assert_array_equal(found.train_images, [one["image"] for one in builder.parts["train"]])
    assert mapped.is_mapped(found)
    # Black is the same in bits and in bytes.
    assert not mapped.opened(NAME, tmp_path / "black", Builder(0).write, classes=3).train_images.max()


def test_a_full_disk_is_no_damage_of_the_data(tmp_path: Path) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(DataError, match=r"the images of tfds:some cannot be kept in .* \(.+\): make room"):
            mapped.opened(NAME, tmp_path / "full", Builder().write, classes=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert mapped.opened(NAME, tmp_path / "full", Builder().write, classes=3).classes == 3


def test_several_at_once_wait_for_the_one_that_writes(tmp_path: Path) -> None:
    builder, written, wrong = Builder(), [], []

    def write(folder: Path) -> None:
        written.append(folder)
        builder.write(folder)

    def open_one(folder: Path, start: threading.Barrier) -> None:
        start.wait()
        try:
            mapped.opened(NAME, folder, write, classes=3)
        except BaseException as error:
            wrong.append(error)

    for number in range(10):
        start = threading.Barrier(4)
        threads = [
            threading.Thread(target=open_one, args=(tmp_path / f"data{number}", start)) for _ in range(4)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(written) == 10
