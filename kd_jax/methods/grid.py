"""A grid of methods, of which a comparison chooses one."""

import itertools
from typing import Any, NamedTuple

import numpy as np

from kd_jax.errors import ConfigError
from kd_jax.methods.base import Method


class Grid(NamedTuple):
    """Methods of one class, one for each combination of some numbers."""

    methods: tuple[Method, ...]
    labels: tuple[str, ...]


def grid(method: type[Method], **values: Any) -> Grid:
    """A method for each combination of the values, given as lists: `kd.grid(kd.KD, temperature=[1, 2, 4])`.

    What is no list is the same in all. `compare` chooses the best on a development split. Raises `ConfigError`.
    """
    names = list(values)
    lists = [list(value) if isinstance(value, list | tuple | np.ndarray) else [value] for value in values.values()]
    if not all(lists):
        raise ConfigError(
            f"{names[[bool(own) for own in lists].index(False)]} is an empty list: give at least one value"
        )
    several = [name for name, own in zip(names, lists, strict=True) if len(own) > 1]
    found, labels = [], []
    for chosen in itertools.product(*lists):
        given = dict(zip(names, chosen, strict=True))
        try:
            found.append(method(**given))
        except TypeError as error:
            raise ConfigError(f"{method.__name__} cannot be made of {given} ({error}): use its own numbers") from None
        labels.append(", ".join(f"{name} {_shown(given[name])}" for name in several))
    return Grid(tuple(found), tuple(labels))


def _shown(value: Any) -> str:
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return f"{value:g}"
    return getattr(value, "__name__", str(value))
