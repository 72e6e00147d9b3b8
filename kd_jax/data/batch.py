"""`Batch`: examples as models are called with them, in memory and on the device."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from kd_jax.errors import ConfigError, DataError, ShapeError

PyTree = Any

_INPUTS, _LABELS = ("inputs", "image", "images", "x"), ("labels", "label", "y", "targets")
_WEIGHTS = ("weights", "weight", "sample_weight")


class Batch(NamedTuple):
    """Examples. Each field is a PyTree of arrays whose first axis counts examples.

    inputs: what the model is called with: an array of any type, or a tuple or dict of arrays.
    labels: whole numbers `[examples, ...]`, soft or several labels `[examples, ..., classes]`, or None.
    weights: `[examples]`, or one for each position, `[examples, positions]`; None for 1 each. What has the weight 0
        is as if it were absent.
    indices: `[examples]`, which row of the training set each example is, for methods that remember examples (CRD) and
        teachers who know them (`kd.cached`). For these, of packed sequences also `[examples, positions, 2]`: which
        example each position is of, and its place there.
    """

    inputs: PyTree
    labels: PyTree = None
    weights: PyTree = None
    indices: PyTree = None


def as_batch(data: Any, *, convert: Callable[[Any], Any] | None = None) -> Batch:
    """`data` as a `Batch` of arrays: a `Batch`, `(inputs, labels)`, `(inputs, labels, weights)`, or a dict of these.

    Lists, PyTorch tensors, h5py data sets and whatever else NumPy reads are converted, once. Integers of 64 bits
    become those of 32. convert: what makes an array of each of them, in place of that. Raises `DataError` where there
    are no inputs, or the parts differ in their number of examples.
    """
    convert = convert or as_array
    if isinstance(data, Batch):
        parts = data
    elif isinstance(data, Mapping):
        parts = _of_mapping(data)
    elif isinstance(data, tuple | list) and 2 <= len(data) <= 3:
        parts = Batch(*data)
    else:
        whole = hasattr(data, "shape") or isinstance(data, str | bytes | tuple | list)
        gives_batches = hasattr(data, "__iter__") and not whole
        besides = ", which gives batches, and all examples are needed together" if gives_batches else ""
        raise DataError(
            f"the data is a {type(data).__name__}{besides}: give kd.Batch(inputs, labels), a pair (inputs, labels) or "
            "a dict with inputs and labels"
        )
    inputs = jax.tree.map(convert, parts.inputs, is_leaf=_is_array_like)
    labels = jax.tree.map(convert, parts.labels, is_leaf=_is_array_like)
    weights, indices = (None if part is None else convert(part) for part in (parts.weights, parts.indices))
    batch = Batch(inputs, labels, weights, indices)
    check_counts(batch)
    return batch


def is_in_memory(data: Any) -> bool:
    """Whether `data` is one batch, and no iterable of several: a list of two or three arrays is a batch, too."""
    if isinstance(data, list):
        return 2 <= len(data) <= 3 and all(hasattr(part, "shape") for part in data)
    return isinstance(data, Batch | tuple | Mapping)


def check_whole(number: Any, name: str, least: int = 1) -> int:
    """`number` as one of Python. Raises `ConfigError` unless it is a whole number of at least `least`."""
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
        raise ConfigError(f"{name} is {number!r}: it must be a whole number of at least {least}")
    return int(number)


def check_counts(batch: Batch) -> int:
    """The number of examples. Raises `DataError` where the parts do not have the same."""
    leaves = jax.tree.leaves(batch.inputs)
    if not leaves:
        raise DataError("the batch has no inputs: give at least one array of them")
    if any(np.ndim(leaf) == 0 for leaf in leaves):
        raise DataError("an input of the batch is a single number: its first axis must count examples")
    count = int(leaves[0].shape[0])
    for leaf in leaves[1:]:
        if leaf.shape[0] != count:
            raise _unequal(batch.inputs, f"have {count} and {leaf.shape[0]} examples: all must have the same number")
    for name, part in (("labels", batch.labels), ("weights", batch.weights), ("indices", batch.indices)):
        for leaf in jax.tree.leaves(part):
            if np.ndim(leaf) == 0 or leaf.shape[0] != count:
                found = "no axis" if np.ndim(leaf) == 0 else f"{leaf.shape[0]}"
                if isinstance(batch.inputs, list) and found == str(len(batch.inputs)):
                    raise _unequal(batch.inputs, "")
                raise DataError(
                    f"there are {count} examples and {name} of {found}: give one for each example, in their order"
                )
    return count


def _unequal(inputs: PyTree, problem: str) -> DataError:
    """The error for inputs that differ in their examples: a list of arrays is often meant to be the examples."""
    if not isinstance(inputs, list):
        return DataError(f"the inputs of the batch {problem}")
    shapes = ", ".join(dict.fromkeys(str(list(leaf.shape)) for leaf in jax.tree.leaves(inputs)))
    return DataError(
        f"the inputs of the batch are a list of {len(inputs)} arrays of the shapes {shapes}, each of which counts as "
        "an input of the model with all examples: give the examples as one array, np.stack(arrays), after they are "
        "brought to one shape"
    )


def check_values(
    batch: Batch, classes: int | None, *, soft: bool = False, several: bool = False, absent: bool = False
) -> None:
    """Raises `DataError` for labels outside the classes and for weights that cannot weigh.

    Nothing that is traced is looked at. classes: None where the labels are none of classes. soft: whether float labels
    must be probabilities of them. several: whether they must be 0 to 1, each by itself. absent: whether all weights may
    be 0. A label of weight 0 may be anything.
    """
    labels, weights = batch.labels, batch.weights
    if weights is not None and not isinstance(weights, jax.core.Tracer):
        known = np.asarray(weights, np.float32)
        if known.size and not np.isfinite(known).all():
            raise DataError("a weight is NaN or infinite: every weight must be finite and at least 0")
        if known.size and known.min() < 0:
            raise DataError(f"a weight is {known.min():g}: every weight must be at least 0")
        if known.size and known.sum() == 0 and not absent:
            raise DataError("the weights sum to 0: at least one example must have a weight above 0")
    unknown = labels is None or not hasattr(labels, "dtype") or isinstance(labels, jax.core.Tracer)
    if unknown or classes is None:
        return
    whole = np.asarray(labels)
    if several and whole.dtype.kind not in "biu":
        shares = whole.astype(np.float32)
        outside = _counted(~((shares >= 0) & (shares <= 1)), weights)
        if outside.any():
            raise DataError(
                f"a label is {shares[outside][0]:g}: labels of sigmoids are floats, 0 to 1 for each, or have the "
                "weight 0"
            )
    if classes == 1:
        # One output is a number, which labels no class.
        return
    if whole.dtype.kind not in "iu":
        if soft and whole.ndim > 1 and whole.shape[-1] == classes and whole.size:
            _check_probabilities(whole.astype(np.float32), weights)
        return
    outside = _counted((whole < 0) | (whole >= classes), weights)
    if outside.any():
        raise DataError(
            f"the label {whole[outside][0]} is outside the {classes} classes: labels must be 0 to {classes - 1}, or "
            "have the weight 0"
        )


def _check_probabilities(labels: Any, weights: Any) -> None:
    """Raises `DataError` for rows that are negative or do not sum to 1."""
    total = labels.sum(axis=-1)
    # Of labels in half precision the sum is off by the last digits of each.
    wrong = _counted(~(np.abs(total - 1) < 0.02) | (labels < 0).any(axis=-1), weights)
    if wrong.any():
        first, said = labels[wrong][0], total[wrong][0]
        what = f"has {first.min():g}" if first.min() < 0 else f"sums to {said:g}"
        raise DataError(
            f"a row of soft labels {what}: give probabilities that sum to 1, or a loss of labels of another kind"
        )


def _counted(found: Any, weights: Any) -> Any:
    """Where something is found that has a weight. Raises `ShapeError` for weights that do not fit."""
    if weights is None or isinstance(weights, jax.core.Tracer):
        return found
    if np.shape(weights) != found.shape[: np.ndim(weights)]:
        raise ShapeError(
            f"the weights have the shape {np.shape(weights)} and the labels {found.shape}: give one weight for each "
            "example, or one for each position"
        )
    counted = np.asarray(weights, np.float32) != 0
    return found & counted.reshape(counted.shape + (1,) * (found.ndim - counted.ndim))


def take(tree: PyTree, rows: Int[Array, "..."]) -> PyTree:
    """The examples `rows` of every array of `tree`."""
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def epoch_order(
    key: Key[Array, ""], epoch: int | Int[Array, ""], *, examples: int, batch_size: int
) -> Int[Array, "steps batch"]:
    """The rows of every batch of an epoch: a fresh shuffle of all examples, without the last, incomplete batch.

    Raises `DataError` where there is no whole batch.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}: it must be at least 1")
    if batch_size > examples:
        raise DataError(f"batch_size is {batch_size}: it must be at most the {examples} examples")
    order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, _ORDER), epoch), examples)
    steps = examples // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def batches(data: Batch, *, key: Any, batch_size: int, epochs: int) -> Iterator[Batch]:
    """The batches that a training with `key` (a whole number or a key) takes from `data` in memory, in its order."""
    data, key = as_batch(data), as_key(key)
    for epoch in range(epochs):
        for rows in epoch_order(key, epoch, examples=check_counts(data), batch_size=batch_size):
            yield take(data, rows)


def as_key(key: Any) -> Key[Array, ""]:
    """A key of `jax.random` from a whole number or a key, of the old kind, too. Raises `DataError`."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not -(2**63) <= int(key) < 2**63:
            raise DataError(f"key is {key}: a whole number must be -2**63 to 2**63 - 1")
        low, high = int(key) & 0xFFFFFFFF, int(key) >> 32
        # JAX looks at 32 bits, so that two such numbers would be one key.
        return (
            jax.random.key(int(key)) if high in (0, -1) else jax.random.fold_in(jax.random.key(low), high & 0xFFFFFFFF)
        )
    if isinstance(key, jax.Array) and key.ndim == 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1:
        return jax.random.wrap_key_data(key)
    raise DataError(f"key is {key!r}: give a whole number such as 0, or jax.random.key(0)")


# What a training's key is folded with for the order of its batches; the other numbers are in `train.step`.
_ORDER = 1


def _of_mapping(data: Mapping[str, Any]) -> Batch:
    inputs = next((data[name] for name in _INPUTS if name in data), None)
    if inputs is None:
        raise DataError(
            f"a batch has {', '.join(map(str, data)) or 'nothing'}: give it as a dict with inputs and labels, or as "
            "kd.Batch(inputs, labels)"
        )
    labels = next((data[name] for name in _LABELS if name in data), None)
    weights = next((data[name] for name in _WEIGHTS if name in data), None)
    known = (*_INPUTS, *_LABELS, *_WEIGHTS, "indices")
    passed_over = [name for name in data if name not in known and re.search("mask|weight", str(name).lower())]
    if passed_over:
        raise DataError(
            f"a batch has {passed_over[0]}, which nothing here reads: give it as weights, where 0 is padding, or as "
            "one of the inputs, or leave it out"
        )
    return Batch(inputs, labels, weights, data.get("indices"))


def _is_array_like(value: Any) -> bool:
    """Whether `value` is one array and no tree of them: a list of numbers is one."""
    if isinstance(value, list):
        return not any(hasattr(item, "shape") and getattr(item, "ndim", 1) > 0 for item in value)
    if isinstance(value, tuple):
        return len(value) > 0 and all(isinstance(item, int | float | np.number) for item in value)
    return value is not None and not isinstance(value, dict)


def as_array(value: Any) -> Any:
    """An array that JAX takes; on the host until it is needed. Raises `DataError`."""
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"a {type(value).__name__} cannot be read as an array ({str(error).partition(chr(10))[0]}): give arrays of "
            "equal shapes"
        ) from None
    if array.dtype.kind == "c":
        raise DataError(
            f"the data has values of type {array.dtype}: give real numbers, such as np.stack([x.real, x.imag], axis=-1)"
        )
    if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise DataError(f"the data has values of type {array.dtype}: give numbers, in one array of one shape")
    canonical = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind in "iu" and canonical != array.dtype and array.size:
        kept = np.iinfo(canonical)
        largest = array.max() if array.max() > kept.max else array.min()
        if not kept.min <= largest <= kept.max:
            raise DataError(f"the data has the number {largest}: whole numbers must be {kept.min} to {kept.max}")
    return array
