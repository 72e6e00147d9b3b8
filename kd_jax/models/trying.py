"""What a model of anybody's raises for inputs that it does not take, as one sentence with what it was given."""

import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import Float, Shaped

from kd_jax.errors import ConfigError, DataError, FeatureError

RNGS = "give layers such as nnx.Dropout their random numbers when they are made, nnx.Dropout(0.2, rngs=rngs)"
CALL = "give inputs as the model takes them, or say how it is called with call="
_WITHIN = ("kd_jax.", "jaxtyping.", "beartype.")
PREPARE = "mend prepare(key, inputs, train), or give inputs as it takes them"


@contextlib.contextmanager
def told(who: str, inputs: Any, remedy: str = CALL) -> Iterator[None]:
    """Raises `ConfigError` for what a call of a user's function raises; errors of kd_jax and of the device pass."""
    try:
        yield
    except FeatureError as error:
        raise error.of(who) from None
    except (ConfigError, DataError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        expected, better = _expected(error, inputs) if remedy == CALL else ("", "")
        if "rngs" in str(error) and isinstance(error, ValueError) and remedy == CALL:
            better = RNGS
        raise ConfigError(
            f"{who} cannot be called with inputs of {_kinds(inputs)}{expected} ({reason(error)}): {better or remedy}"
        ) from error


@contextlib.contextmanager
def told_of_measure(name: str, logits: Any, labels: Any) -> Iterator[None]:
    """Raises `ConfigError` for what a measure of the user's raises."""
    try:
        yield
    except (ConfigError, DataError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise ConfigError(
            f"the measure {name} cannot be computed with logits of {list(logits.shape)} and labels of "
            f"{_kinds(labels) or 'none'} ({reason(error)}): mend it, or give labels as it takes them"
        ) from error


def warn_of_logits(logits: Float[np.ndarray, "..."], weights: Any = None, *, whose: str = "") -> None:
    """Warns of logits that are NaN or infinite, and count. Minus infinity is the logit of a class that cannot be.

    weights: of examples or of positions; those of 0 do not count. whose: as "the teacher's ".
    """
    if logits.ndim < 2:
        return
    broken = ~np.isfinite(logits.max(axis=-1, initial=-np.inf))
    if weights is not None and np.shape(weights) == broken.shape[: np.ndim(weights)]:
        broken &= np.reshape(np.asarray(weights) != 0, np.shape(weights) + (1,) * (broken.ndim - np.ndim(weights)))
    examples = broken.reshape(len(broken), -1).any(axis=-1)
    if examples.any():
        frame, level = sys._getframe(), 1
        while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_WITHIN):
            frame, level = frame.f_back, level + 1
        warnings.warn(
            f"{whose or 'the '}logits of example {int(np.argmax(examples))} are NaN or infinite "
            f"({int(examples.sum())} such examples of {len(examples)}), and the measures mean nothing: look at the "
            "inputs of that example, and at the parameters",
            stacklevel=level,  # where kd_jax was called
        )


def as_numbers(values: Any) -> Shaped[np.ndarray, "..."]:
    """What a measure gave, as an array. Raises `TypeError` for what are no real numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        kind = type(values).__name__ if array.dtype.kind in "OSU" else f"{array.dtype}{list(array.shape)}"
        raise TypeError(f"it gives a {kind} and no real numbers")
    return array


def _expected(error: Exception, inputs: Any) -> tuple[str, str]:
    """What the layer of Flax that raised takes, and what makes that of images; nothing where it is none."""
    taken = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        taken = _taken(frame.f_locals.get("self")) or taken
    if taken is None:
        return "", ""
    name, space, channels = taken
    axes = {0: "…", 1: "length", 2: "height, width", 3: "depth, height, width"}.get(space, f"{space} axes of space")
    remedy, leaves = "", jax.tree.leaves(inputs)
    shape: tuple[int, ...] = leaves[0].shape if len(leaves) == 1 and space else ()
    if len(shape) == space + 2 and shape[1] == channels != shape[-1]:
        remedy = f"channels come last, so give inputs.transpose{(0, *range(2, space + 2), 1)}"
    elif len(shape) == space + 1 and channels == 1:
        remedy = "an axis of channels comes last, so give inputs[..., None]"
    return f", where {name} takes [examples, {axes}, {channels}]", remedy


def _taken(layer: Any) -> tuple[str, int, int] | None:
    """The name of a layer, its axes of space, and its channels."""
    name = type(layer).__name__
    if isinstance(layer, nnx.Conv):
        return name, len(layer.kernel.shape) - 2, layer.in_features
    if isinstance(layer, nnx.Linear):
        return name, 0, layer.in_features
    # One that is the model itself is bound to its variables only while it is called.
    bound = isinstance(layer, linen.Conv | linen.Dense) and layer.scope is not None
    if bound and layer.has_variable("params", "kernel"):
        kernel: tuple[int, ...] = layer.get_variable("params", "kernel").shape
        return name, len(kernel) - 2, kernel[-2] * getattr(layer, "feature_group_count", 1)
    return None


def _kinds(tree: Any) -> str:
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def reason(error: Exception) -> str:
    """The kind of an error and its first line, no longer than is read."""
    return f"{type(error).__name__}: {' '.join(str(error).partition(chr(10))[0].split())[:300]}".removesuffix(": ")
