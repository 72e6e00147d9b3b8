"""What is kept of a teacher's answers: which numbers, made on the device, and how they lie in a file."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, Shaped

from kd_jax.data.batch import check_whole
from kd_jax.errors import ConfigError, DataError
from kd_jax.losses.sparse import drawn_at
from kd_jax.losses.targets import log_sum_exp
from kd_jax.models import Output

FAULTS = ("wrong", "beyond")
KINDS = ("logits", "top-k", "samples", "hidden")
DTYPES = ("float32", "bfloat16", "float16")
_MOST_DRAWS = 1 << 16

Arrays = dict[str, Shaped[np.ndarray, "..."]]


@dataclass(frozen=True)
class Keep:
    """kind: one of `KINDS`. k: of the most probable classes. draws, power, systematic: of samples.

    hidden: the path of the feature that the head is applied to. features: those beside the logits. dtype: of floats;
    empty for their own, at least float32.
    """

    kind: str = "logits"
    k: int = 0
    draws: int = 0
    power: float = 1.0
    systematic: bool = False
    hidden: str = ""
    features: tuple[str, ...] = ()
    dtype: str = "float32"

    @property
    def asked(self) -> tuple[str, ...]:
        """The features that the teacher is asked for."""
        return (self.hidden,) if self.kind == "hidden" else self.features

    def as_json(self) -> dict[str, Any]:
        """As a description holds it."""
        return dataclasses.asdict(self) | {"features": list(self.features)}


def make_keep(
    kind: str, *, k: Any, draws: Any, power: Any, systematic: bool, hidden: Any, features: tuple[str, ...], dtype: Any
) -> Keep:
    """What is asked for. Raises `ConfigError` where its parts do not go together."""
    if kind not in KINDS:
        raise ConfigError(f"keep is {kind!r}: use {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    needed = {"top-k": ("k", k), "hidden": ("hidden", hidden)}
    for other, (name, value) in needed.items():
        if value is None and kind == other:
            raise ConfigError(f"keep is {kind!r} without {name}: give {name}=, too")
        if value is not None and kind != other:
            raise ConfigError(f"{name} is {value!r} and keep is {kind!r}: give keep={other!r}, or leave {name} out")
    if kind != "samples" and (draws is not None or power != 1 or systematic):
        raise ConfigError(f"draws, power and systematic are of samples, and keep is {kind!r}: give keep='samples'")
    if features and kind != "logits":
        raise ConfigError(f"features are kept beside logits alone, and keep is {kind!r}: leave them out")
    try:
        name = jnp.dtype(np.float32 if dtype is None else dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name}: use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if not (isinstance(power, int | float | np.number) and 0 < power < math.inf):
        raise ConfigError(f"power is {power!r}: it must be a number above 0")
    if kind == "samples":
        draws = check_whole(50 if draws is None else draws, "draws")
        if draws >= _MOST_DRAWS:
            raise ConfigError(f"draws is {draws}: it must be below {_MOST_DRAWS}")
    k = 0 if k is None else check_whole(k, "k")
    return Keep(kind, k, draws or 0, float(power), bool(systematic), hidden or "", tuple(features), name)


def reduced(keep: Keep, output: Output, rows: Int[Array, " batch"], key: Key[Array, ""]) -> dict[str, Any]:
    """What is kept of an output, on the device. rows: which examples these are; each has a key of its own.

    Also `wrong`, whether an answer at a place is NaN or infinite and has no probabilities; and of logits and features
    `beyond`, whether a number there has become infinite.
    """
    dtype = jnp.dtype(keep.dtype or np.float32)

    def typed(values: Any, name: str = "") -> Any:
        # Features of whole numbers and booleans stay as they are: a narrow type would round them.
        if name.startswith("features.") and not jnp.issubdtype(values.dtype, jnp.floating):
            return values
        return values.astype(dtype) if keep.dtype or values.dtype.itemsize < 4 else values

    if keep.kind in ("hidden", "logits"):
        wide = {"hidden": output.features[keep.hidden]} if keep.kind == "hidden" else {"logits": output.logits}
        wide |= {f"features.{path}": output.features[path] for path in keep.features}
        for name, x in wide.items():
            if keep.dtype and jnp.issubdtype(x.dtype, jnp.complexfloating):
                raise DataError(f"{name} are {x.dtype}, of which nothing is kept: give real numbers")
        beyond = [jnp.isinf(typed(x)) & jnp.isfinite(x) & ~_are_masks(x) for x in _floats(wide.values())]
        at = output.logits.shape[:-1]
        faults = {"wrong": are_wrong(wide.values(), at), "beyond": _faults_at(beyond, at)}
        return {name: typed(x, name) for name, x in wide.items()} | faults
    log_p = jax.nn.log_softmax(output.logits.astype(jnp.float32), axis=-1)
    wrong = jnp.any(jnp.isnan(log_p), axis=-1)
    if keep.kind == "top-k":
        if keep.k > log_p.shape[-1]:
            raise ConfigError(f"k is {keep.k}: it must be at most {log_p.shape[-1]}, the number of classes")
        top, classes = jax.lax.top_k(log_p, keep.k)
        others = jnp.put_along_axis(log_p, classes, jnp.full_like(top, -jnp.inf), axis=-1, inplace=False)
        rest = log_sum_exp(others)
        known = {"classes": classes, "log_probabilities": top.astype(dtype), "log_rest": rest.astype(dtype)}
        return known | {"wrong": wrong}
    log_r = jax.nn.log_softmax(keep.power * log_p, axis=-1) if keep.power != 1 else log_p

    def places(row: Array) -> Array:
        own, shape = jax.random.fold_in(key, row), log_p.shape[1:-1]
        if keep.systematic:
            steps = jnp.arange(keep.draws, dtype=jnp.float32).reshape((1,) * len(shape) + (-1,))
            return (steps + jax.random.uniform(own, (*shape, 1))) / keep.draws
        return jax.random.uniform(own, (*shape, keep.draws))

    drawn = jnp.sort(drawn_at(jnp.exp(log_r), jax.vmap(places)(rows)), axis=-1)
    found = {"drawn": drawn.astype(jnp.int32), "wrong": wrong}
    if keep.power != 1:
        found["log_ratios"] = jnp.take_along_axis(log_p, drawn, -1) - jnp.take_along_axis(log_r, drawn, -1)
    return found


def are_wrong(answers: Iterable[Any], places: tuple[int, ...]) -> Array:
    """Whether an answer is NaN or infinite, `places`; -inf rules out."""
    return _faults_at([jnp.isnan(one) | jnp.isposinf(one) for one in _floats(answers)], places)


def of_examples(faults: Bool[np.ndarray, "..."], weights: Any) -> Bool[np.ndarray, " examples"]:
    """Whether an example has a fault `[examples, ...]` where its weights are not 0."""
    if weights is not None:
        present = np.asarray(weights) != 0
        if present.shape != faults.shape[: present.ndim]:
            present = present.reshape(len(present), -1).any(axis=1)
        faults = faults & present.reshape(present.shape + (1,) * (faults.ndim - present.ndim))
    return np.asarray(faults.any(axis=tuple(range(1, faults.ndim))))


def _floats(answers: Iterable[Any]) -> list[Array]:
    return [jnp.asarray(one) for one in answers if jnp.issubdtype(one.dtype, jnp.floating)]


def _faults_at(faults: Sequence[Array], places: tuple[int, ...]) -> Array:
    """Whether there is any of them at a place; those of an answer without these places are at all of the example."""
    found = jnp.zeros(places, bool)
    for one in faults:
        lead = len(places) if one.shape[: len(places)] == places else 1
        any_of = jnp.any(one, axis=tuple(range(lead, one.ndim)))
        found |= any_of.reshape(any_of.shape + (1,) * (len(places) - lead))
    return found


def _are_masks(values: Array) -> Array:
    """What is as low as masks are, which may stand for -inf."""
    return values < jnp.finfo(values.dtype).min / 2


def stored(keep: Keep, found: Mapping[str, Any], classes: int) -> Arrays:
    """The same on the host as it is kept, with a first axis of examples; but `entries` are those of all, in a row."""
    arrays = {name: np.asarray(array) for name, array in found.items() if name not in FAULTS}
    if keep.kind == "top-k":
        return arrays | {"classes": packed(arrays["classes"], _bytes(classes - 1))}
    if keep.kind != "samples":
        return arrays
    drawn = arrays["drawn"].reshape(len(arrays["drawn"]), -1, keep.draws)
    new = np.ones(drawn.shape, bool)
    new[..., 1:] = drawn[..., 1:] != drawn[..., :-1]
    firsts = np.flatnonzero(new)
    counts = np.diff(firsts, append=new.size)
    shift = (keep.draws - 1).bit_length()
    entries = drawn.reshape(-1)[firsts].astype(np.uint64) << np.uint64(shift) | (counts - 1).astype(np.uint64)
    distinct = new.sum(axis=-1).astype(np.uint8 if keep.draws < 256 else np.uint16)
    kept = {"distinct": distinct, "entries": packed(entries, _bytes((classes << shift) - 1))}
    if keep.power != 1:
        ratios = np.exp(arrays["log_ratios"].reshape(-1)[firsts])
        kept["ratios"] = np.minimum(ratios, np.finfo(np.float16).max).astype(np.float16)
    return kept


def joined(parts: Sequence[Arrays]) -> Arrays:
    """Parts of the examples as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def looked_up(
    keep: Keep, arrays: Arrays, rows: Int[np.ndarray, " rows"], positions: Int[np.ndarray, " rows"] | None, most: int
) -> Arrays:
    """Of some examples, or of one position of each; draws with `most` places each, of which the last may be empty."""
    index: Any = rows if positions is None else (rows, positions)
    if positions is not None and keep.kind == "logits":
        check_places({name: array.shape for name, array in arrays.items()}, arrays["logits"].shape[1:-1])
    if keep.kind != "samples":
        found = {name: array[index] for name, array in arrays.items() if name != "begins"}
        if keep.kind == "top-k":
            found["classes"] = unpacked(found["classes"]).astype(np.int32)
        return found
    own, back = np.unique(rows, return_inverse=True)
    distinct = np.asarray(arrays["distinct"][own]).astype(np.int64)
    begins = arrays["begins"][own][:, None] + np.cumsum(distinct, axis=1) - distinct
    index = back if positions is None else (back, positions)
    distinct, begins = distinct[index], begins[index]
    there = np.arange(most) < distinct[..., None]
    at = np.where(there, begins[..., None] + np.arange(most), 0)
    entries = unpacked(arrays["entries"][at])
    shift = np.uint64((keep.draws - 1).bit_length())
    counts = (entries & ((np.uint64(1) << shift) - np.uint64(1))).astype(np.int32) + 1
    found = {
        "classes": np.where(there, (entries >> shift).astype(np.int32), 0),
        "counts": np.where(there, counts, 0).astype(arrays["distinct"].dtype if keep.draws < 256 else np.int32),
    }
    if keep.power != 1:
        found["ratios"] = np.where(there, arrays["ratios"][at], np.float16(0))
    return found


def check_places(shapes: Mapping[str, tuple[int, ...]], places: tuple[int, ...]) -> None:
    """Raises `DataError` where answers by name have no axes of these places, and cannot be looked up by position."""
    for name, shape in shapes.items():
        if not places or shape[1 : 1 + len(places)] != places:
            raise DataError(
                f"the kept {name} are {list(shape[1:])} for each example, without positions as the logits have them "
                f"{list(places)}: look up whole examples, or do not keep them"
            )


def begins_of(distinct: Shaped[np.ndarray, "rows places"]) -> Int[np.ndarray, " rows"]:
    """Where the entries of each example begin."""
    sums = distinct.sum(axis=1, dtype=np.int64)
    return np.cumsum(sums) - sums


def packed(numbers: Shaped[np.ndarray, "..."], width: int) -> Shaped[np.ndarray, "..."]:
    """Whole numbers in `width` bytes each, the lowest first: one more axis, of bytes."""
    wide = np.ascontiguousarray(numbers.astype("<u8"))
    return np.ascontiguousarray(wide.view(np.uint8).reshape(*numbers.shape, 8)[..., :width])


def unpacked(numbers: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The numbers that `packed` wrote."""
    wide = np.zeros((*numbers.shape[:-1], 8), np.uint8)
    wide[..., : numbers.shape[-1]] = numbers
    return wide.view("<u8")[..., 0]


def _bytes(largest: int) -> int:
    return max(1, (largest.bit_length() + 7) // 8)
