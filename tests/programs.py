"""Losses as programs that each compile once for a shape: their numbers are arguments.

Called outside `jax.jit`, each operation of a loss is a program of its own, and its derivatives are traced at each call.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax


@cache
def compiled(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The values."""
    return jax.jit(loss)


@cache
def with_gradients(loss: Callable[..., jax.Array], sides: tuple[int, ...] = (0,)) -> Callable[..., Any]:
    """The values, and the gradients of their sum by the arguments at `sides`."""

    def total(*given: Any, **numbers: Any) -> tuple[jax.Array, jax.Array]:
        values = loss(*given, **numbers)
        return values.sum(), values

    def program(*given: Any, **numbers: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        (_, values), gradients = jax.value_and_grad(total, sides, has_aux=True)(*given, **numbers)
        return values, gradients

    return jax.jit(program)
