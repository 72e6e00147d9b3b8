"""What a model of anybody's raises for inputs that it does not take, as one sentence with what it was given."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from kd_jax.errors import ConfigError, DataError, FeatureError

CALL = "give inputs as the model takes them, or say how it is called with call="
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
        raise ConfigError(
            f"{who} cannot be called with inputs of {_kinds(inputs)} ({reason(error)}): {remedy}"
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


def _kinds(tree: Any) -> str:
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def reason(error: Exception) -> str:
    """The kind of an error and its first line, no longer than is read."""
    return f"{type(error).__name__}: {' '.join(str(error).partition(chr(10))[0].split())[:300]}".removesuffix(": ")
