"""How a hard and a soft loss add up."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from kd_jax.losses.checks import Scalar, number
from kd_jax.losses.tangents import product


def mix(hard: Float[Array, "*batch"], soft: Float[Array, "*batch"], *, alpha: Scalar) -> Float[Array, "*batch"]:
    r"""The weighted sum $\alpha \, \mathrm{hard} + (1 - \alpha) \, \mathrm{soft}$: `alpha` weighs the hard loss.

    So do torchdistill's alpha and Keras's `student_loss_weight`; RepDistiller's alpha is the soft loss's weight.
    A term of weight 0 is left out of the sum, so that its infinities and NaNs count for nothing.

    alpha: in [0, 1]. Returns `[...]`.
    """
    # A Python number is subtracted from 1 in Python's precision.
    alpha = alpha if isinstance(alpha, int | float) else number(alpha, hard)
    return _sum(hard, soft, number(alpha, hard), number(1 - alpha, hard))


@jax.custom_jvp
def _sum(hard: Array, soft: Array, alpha: Array, rest: Array) -> Array:
    # Chosen after the sum: a compiler then contracts product and sum as if there were no choice.
    plain = alpha * hard + rest * soft
    alone = jnp.where(alpha == 0, soft, hard)
    return jnp.where(jnp.isfinite(plain) | ((alpha != 0) & (rest != 0)), plain, alone)


def _sum_jvp(primals: tuple[Array, Array, Array, Array], tangents: tuple[Any, Any, Any, Any]) -> tuple[Array, Array]:
    hard, soft, alpha, rest = primals
    by_hard, by_soft, by_alpha, by_rest = tangents
    kept_hard = jnp.where((alpha == 0) & ~jnp.isfinite(hard), 0, hard)
    kept_soft = jnp.where((rest == 0) & ~jnp.isfinite(soft), 0, soft)
    by_terms = _times(alpha, by_hard, hard) + _times(rest, by_soft, soft)
    return _sum(*primals), by_terms + (product(kept_hard, by_alpha) + product(kept_soft, by_rest))


_sum.defjvp(_sum_jvp, symbolic_zeros=True)


def _times(weight: Array, tangent: Any, like: Array) -> Array:
    return jnp.zeros_like(like) if isinstance(tangent, SymbolicZero) else weight * tangent
