"""A `Dataset` by the name of its source."""

from kd_jax.data.dataset import Dataset
from kd_jax.data.mapped import mapped
from kd_jax.errors import DataError


def load(source: str, *, stream: bool = False) -> Dataset:
    """The `Dataset` that `source` names: `mnist`, `tfds:NAME`, `idx:DIR` or `npz:FILE`.

    stream: whether the training images stay on the disk, in kd_jax's cache, and are read as they are needed. Those of
    `tfds:NAME` are never all in memory then; those of the others are once, when they are put there.
    Raises `DataError` where there is no such source or its data cannot be used.
    """
    if not isinstance(source, str):
        raise DataError(f"the data set is {source!r}: give its name as a string, such as 'npz:FILE'")
    if stream and not source.startswith("tfds:"):
        return mapped(load(source))
    kind, colon, place = source.partition(":")
    if kind not in ("mnist", "tfds", "idx", "npz") or (kind == "mnist") == bool(colon):
        raise DataError(f"unknown data set {source!r}: use mnist, tfds:NAME, idx:DIR or npz:FILE")
    if kind != "mnist" and not place:
        raise DataError(f"data set {source!r} names nothing after the colon: use tfds:NAME, idx:DIR or npz:FILE")
    if kind == "mnist":
        from kd_jax.data.sources import mnist

        return mnist.load()
    if kind == "tfds":
        from kd_jax.data.sources import tfds

        return tfds.load(place, stream=stream)
    if kind == "idx":
        from kd_jax.data.sources import idx

        return idx.load(place)
    from kd_jax.data.sources import npz

    return npz.load(place)
