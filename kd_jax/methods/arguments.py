"""What a class or a function takes as arguments."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kd_jax.errors import ArgumentError, MethodError


def check_given(cls: type, given: Sequence[Any], named: Iterable[str]) -> None:
    """Raises `ArgumentError` for what a class is not made of: a name, of which it tells the nearest, or anything."""
    start: Callable[..., Any] = cls.__init__  # type: ignore[misc]
    if (given or named) and start is object.__init__:
        raise ArgumentError(f"{cls.__name__} takes no arguments: write @dataclass(frozen=True) above the class")
    if not named:
        return
    taken = list(inspect.signature(start).parameters.values())[1:]
    names = [one.name for one in taken if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)]
    unknown = [name for name in named if name not in names]
    if unknown and not any(one.kind is one.VAR_KEYWORD for one in taken):
        near = difflib.get_close_matches(unknown[0], names, 1, 0)
        others = ", ".join(near + [name for name in names if name not in near]) or "none by name"
        raise ArgumentError(f"{cls.__name__} has no {unknown[0]}: it takes {others}")


def as_factor(factor: Any, name: str) -> Any:
    """What a method is multiplied by; numbers of NumPy as JAX's. Raises `MethodError` for what is no number."""
    if factor is None or isinstance(factor, str | bytes | list | tuple | dict):
        raise MethodError(f"{name} is multiplied by {factor!r}: give a number, its weight")
    return jnp.asarray(factor) if isinstance(factor, np.generic | np.ndarray) else factor


def tuple_of_texts(value: Any) -> Any:
    """A list of texts as a tuple, which can be compared; anything else as it is."""
    return tuple(value) if isinstance(value, list) and value and all(isinstance(one, str) for one in value) else value


def takes_one(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with one argument by position; True where it does not tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(None)
    except TypeError:
        return False
    return True


def count_arguments(function: Callable[..., Any]) -> int:
    """How many arguments by position a function needs, and three where the third is `labels`; 0 where it does not tell.

    Others that have a default are numbers of its own.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [one for one in parameters if one.kind in kinds]
    needed = sum(one.default is one.empty for one in taken)
    return 3 if needed == 2 and len(taken) > 2 and taken[2].name == "labels" else needed
