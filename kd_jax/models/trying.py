"""What a model of anybody's raises for inputs that it does not take, as one sentence with what it was given."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from kd_jax.errors import ConfigError, DataError

CALL = "give inputs as the model takes them, or say how it is called with call="
PREPARE = "mend prepare(key, inputs, train), or give inputs as it takes them"


@contextlib.contextmanager
def told(who: str, inputs: Any, remedy: str = CALL) -> Iterator[None]:
    """Raises `ConfigError` for what a call of a user's function raises; errors of kd_jax and of the device pass."""
    try:
        yield
    except (ConfigError, DataError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        leaves = jax.tree.leaves(inputs)
        given = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves if hasattr(leaf, "dtype"))
        raise ConfigError(f"{who} cannot be called with inputs of {given} ({reason(error)}): {remedy}") from error


def reason(error: Exception) -> str:
    """The kind of an error and its first line, no longer than is read."""
    return f"{type(error).__name__}: {' '.join(str(error).partition(chr(10))[0].split())[:300]}".removesuffix(": ")
