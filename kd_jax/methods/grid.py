"""A grid of methods, of which a comparison chooses one."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_jax.errors import ConfigError
from kd_jax.methods.base import Method, as_method


@dataclass(frozen=True)
class Grid:
    """Methods, one for each combination of some numbers. It adds up with methods and other grids, and has multiples."""

    methods: tuple[Method, ...]
    labels: tuple[str, ...]

    def __add__(self, other: Any) -> "Grid":
        """A method of each of these and `other`; of two grids each with each."""
        return _sums(self, other)

    def __radd__(self, other: Any) -> "Grid":
        """As `__add__`, with `other` first."""
        return self if isinstance(other, int) and other == 0 else _sums(other, self)

    def __mul__(self, factor: Any) -> "Grid":
        """Each of them times a number."""
        return Grid(tuple(factor * method for method in self.methods), self.labels)

    __rmul__ = __mul__


def grid(method: Callable[..., Any], **values: Any) -> Grid:
    """A method for each combination of the values, given as lists: `kd.grid(kd.KD, temperature=[1, 2, 4])`.

    method: a class of methods, or a function that makes one, `lambda weight: kd.KD() + weight * kd.FitNet("conv1")`.
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
            found.append(as_method(method(**given)))
        except TypeError as error:
            name = getattr(method, "__name__", type(method).__name__)
            raise ConfigError(f"{name} cannot be made of {given} ({error}): use its own numbers") from None
        labels.append(", ".join(f"{name} {_shown(given[name])}" for name in several))
    return Grid(tuple(found), tuple(labels))


def _sums(first: Any, second: Any) -> Grid:
    ones, others = (one if isinstance(one, Grid) else Grid((as_method(one),), ("",)) for one in (first, second))
    return Grid(
        tuple(one + other for one in ones.methods for other in others.methods),
        tuple(", ".join(filter(None, (one, other))) for one in ones.labels for other in others.labels),
    )


def _shown(value: Any) -> str:
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return f"{value:g}"
    return getattr(value, "__name__", str(value))
