"""Bounds of a method's numbers, which the type of a field tells: `temperature: Temperature = 4.0`."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import jax
import numpy as np

from kd_jax.errors import MethodError
from kd_jax.methods.base import Method, Scalar


class Bounds(NamedTuple):
    """Where a number may lie: from `least`, or above it, to `most`; it is finite in any case."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        """As a sentence has it."""
        if self.above:
            return f"above {self.least:g}, and finite"
        if math.isinf(self.least):
            return "finite"
        return f"at least {self.least:g}, and finite" if math.isinf(self.most) else f"{self.least:g} to {self.most:g}"

    def hold(self, value: float) -> bool:
        """Whether a number is within them."""
        return math.isfinite(value) and self.least <= value <= self.most and not (self.above and value == self.least)


Temperature = Annotated[Scalar, Bounds(0, above=True)]
"""T > 0."""
Share = Annotated[Scalar, Bounds(0, 1)]
"""A part of a whole, in [0, 1]."""
Weight = Annotated[Scalar, Bounds(0)]
"""At least 0: below, a student would be trained away from what the term asks for."""
Finite = Annotated[Scalar, Bounds()]
"""Of any sign."""
_WHOLE = (int, np.integer)


def walk(method: Method) -> Iterator[Method]:
    """A method, and those that it is made of."""
    yield method
    for field in _fields(method):
        value = getattr(method, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Method):
                yield from walk(one)


def check_numbers(method: Method) -> None:
    """Raises `MethodError` for a number out of its bounds or not whole, and for what is neither a number nor static.

    Grids (numbers with axes) and what is traced are left alone.
    """
    for one in walk(method):
        for field in _fields(one):
            value, name = getattr(one, field.name), f"the {field.name} of {type(one).__name__}"
            bounds = _bounds(field)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(bounds, Bounds) and isinstance(part, str):
                    raise MethodError(f"{name} is the text {part!r}: it must be a number, {bounds}")
                if part is not None and is_whole(field) and (isinstance(part, bool) or not isinstance(part, _WHOLE)):
                    raise MethodError(f"{name} is {part!r}: it must be a whole number")
                known = _is_number(part) and not isinstance(part, jax.core.Tracer) and np.ndim(part) == 0
                if known and isinstance(bounds, Bounds) and not bounds.hold(float(part)):
                    raise MethodError(f"{name} is {float(part):g}: it must be {bounds}")
            for leaf in () if isinstance(value, str) else jax.tree.leaves(value):
                if isinstance(leaf, str) and not isinstance(value, tuple):
                    raise MethodError(f"{name} is {value!r}, which cannot be compared: give its texts in a tuple")


def bounds_of(method: Method, name: str) -> Bounds:
    """The bounds of a number of a method; finite where its type tells none."""
    found = next((_bounds(field) for field in _fields(method) if field.name == name), None)
    return found if isinstance(found, Bounds) else Bounds()


def _bounds(field: dataclasses.Field[Any]) -> Any:
    return get_args(field.type)[1] if get_origin(field.type) is Annotated else None


def is_whole(field: dataclasses.Field[Any]) -> bool:
    """Whether a static field holds whole numbers, by its type."""
    kind = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
    return bool(field.metadata.get("static")) and int in (kind, *get_args(kind))


def _fields(method: Method) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
