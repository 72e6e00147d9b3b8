"""Logits whose shift and scale are taken out before they are compared."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.errors import ShapeError
from kd_jax.losses.checks import Logits, as_logits

SMALLEST = 1e-7


def standardise(logits: Logits) -> Float[Array, "..."]:
    r"""$(z - \bar z) / (10^{-7} + s)$ of each position, for both networks before `kd` or another loss.

    s is the unbiased standard deviation over the classes. Sun et al. (2024), https://arxiv.org/abs/2403.01427, with
    T = 2 and the weight 9 there. A class that is ruled out stays so and counts for nothing. Logits that do not vary, as
    of a head of zeros, give 0 and no gradient, where the formula's is $10^7$.

    logits: `[..., classes]`, two at least. Returns `[..., classes]`, in float32 or better.
    """
    logits = as_logits(logits)
    if logits.shape[-1] < 2:
        raise ShapeError(f"logits {list(logits.shape)} have one class, which has no standard deviation")
    # The square of a mask such as the lowest finite number would overflow.
    ruled_out = logits < jnp.finfo(logits.dtype).min / 2
    count = jnp.sum(jnp.where(ruled_out, 0, jnp.ones_like(logits)), axis=-1, keepdims=True)
    # From the largest, so that a large shift takes no digits.
    kept = jnp.where(ruled_out, 0, logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    centred = jnp.where(ruled_out, 0, kept - jnp.sum(kept, axis=-1, keepdims=True) / jnp.maximum(count, 1))
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / jnp.maximum(count - 1, 1)
    varies = variance > 0
    deviation = jnp.sqrt(jnp.where(varies, variance, 1))
    return jnp.where(ruled_out, logits, jnp.where(varies, centred / (SMALLEST + deviation), 0))
