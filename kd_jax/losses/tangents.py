"""Derivatives with `symbolic_zeros`: what does not move is not multiplied by a derivative that may be infinite."""

from typing import Any

import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array


def product(derivative: Array, tangent: Any) -> Array:
    """`derivative` times `tangent`; 0 where that is a `SymbolicZero`."""
    return jnp.zeros_like(derivative) if isinstance(tangent, SymbolicZero) else derivative * tangent
