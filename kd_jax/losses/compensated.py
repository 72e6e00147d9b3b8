"""Differences, quotients and exponentials whose rounding error is kept: a number is the sum of two floats.

e^x inherits the absolute rounding of x: computed plainly in float32, e^-30 is wrong by up to 30 roundoffs, and the
difference of two logits near 10,000 by 1e-3. What a plain operation rounds away is itself a float that a few more
operations find exactly (Dekker 1971, A floating-point technique for extending the available precision).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Compensated(NamedTuple):
    """`value + error`, where `error` is at most about half a unit in the last place of `value`."""

    value: Float[Array, "*shape"]
    error: Float[Array, "*shape"]


def difference(a: Float[Array, "..."], b: Float[Array, "..."]) -> Compensated:
    """a - b exactly, where it does not overflow (Knuth's TwoSum). Shapes broadcast."""
    value = a - b
    taken = a - value
    return _finite(value, (a - (value + taken)) + (taken - b))


def subtract(a: Compensated, b: Compensated) -> Compensated:
    """a - b, to about two roundoffs of the larger error."""
    high = difference(a.value, b.value)
    return _renormalised(high.value, high.error + (a.error - b.error))


def divide(a: Compensated, b: Float[Array, "..."]) -> Compensated:
    """a / b, to about the square of a roundoff.

    A compiler may contract a product and a sum into one operation, in one place and not in another, and XLA takes a
    quotient by a broadcast number for a product. Here each product that is summed is exact (of halves, Dekker) and each
    quotient that is summed is rounded to half its digits first, so that `value` has the same bits wherever it is used.
    """
    b_high, b_low = _halves(b)
    quotient = a.value / b
    high = _rounded_to_half(quotient)
    rest = (a.value - high * b_high) - high * b_low
    low = _rounded_to_half(rest / b)
    low = jnp.where(jnp.isfinite(low), low, 0)
    rest = (rest - low * b_high) - low * b_low
    value = high + low
    # The largest numbers of a type have no half that it can hold.
    value = jnp.where(jnp.isfinite(value), value, quotient)
    return _finite(value, (low - (value - high)) + (rest + a.error) / b)


def exp(x: Compensated) -> Float[Array, "..."]:
    """e^x with the relative accuracy of the exponential itself."""
    return jnp.exp(x.value) * (1 + x.error)


def _halves(x: Array) -> tuple[Array, Array]:
    """x as a sum of two numbers of half its digits, so that products of halves are exact."""
    high = _rounded_to_half(x)
    return high, x - high


def _rounded_to_half(x: Array) -> Array:
    """x with half its digits."""
    kind = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=(kind.nmant - 1) // 2)


def _renormalised(value: Array, error: Array) -> Compensated:
    total = value + error
    return _finite(total, error - (total - value))


def _finite(value: Array, error: Array) -> Compensated:
    """Nothing is known to be lost beside an infinity. The error is constant: `value` alone has the derivative."""
    return Compensated(value, jax.lax.stop_gradient(jnp.where(jnp.isfinite(error), error, 0)))
