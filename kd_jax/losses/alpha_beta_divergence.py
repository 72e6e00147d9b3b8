"""The alpha-beta divergences, without cancellation at the limits where the formula divides by 0."""

from math import factorial

import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.losses.checks import Logits, Scalar, number
from kd_jax.losses.pairs import Pair, as_distributions

FLOOR = -1e30


def alpha_beta(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    alpha: Scalar = 0.2,
    beta: Scalar = 0.7,
    temperature: Scalar = 1.0,
) -> Float[Array, "..."]:
    r"""$-\frac{T^2}{\alpha \beta} \sum_k [p^\alpha q^\beta - \frac{\alpha}{\alpha + \beta} p^{\alpha + \beta} -
    \frac{\beta}{\alpha + \beta} q^{\alpha + \beta}]$, and its limits where a denominator is 0.

    Wang et al. (2025), ABKD, https://arxiv.org/abs/2505.04560. (1, 0) is KL(p‖q), (0, 1) KL(q‖p), (½, ½)
    4 (1 - Σ √(pq)). In public code the limits are off by 1/α or 1/β, so that it jumps there, and T² is missing.

    alpha, beta: of any sign. temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    pair, t = as_distributions(student_logits, teacher_logits, temperature)
    terms, endless = alpha_beta_terms(pair, number(alpha, t), number(beta, t))
    return t**2 * jnp.sum(jnp.where(endless, jnp.inf, terms), axis=-1)


def alpha_beta_terms(pair: Pair, alpha: Array, beta: Array) -> tuple[Array, Array]:
    """A term for each class, and where a class that one network alone rules out makes it infinite."""
    log_p, log_q, ratio = _bounded(pair)
    # The divergence is its own mirror image; the larger number is the one that is divided by.
    mirrored = jnp.abs(beta) > jnp.abs(alpha)
    alpha, beta = jnp.where(mirrored, beta, alpha), jnp.where(mirrored, alpha, beta)
    log_p, log_q = jnp.where(mirrored, log_q, log_p), jnp.where(mirrored, log_p, log_q)
    ratio = jnp.where(mirrored, -ratio, ratio)
    terms = _terms(log_p, log_q, ratio, alpha, beta)
    # The term of a class that one alone rules out is finite, or grows with the floor.
    return terms, (jnp.isneginf(pair.log_p) | jnp.isneginf(pair.log_q)) & (terms > 1e20)


def alpha_beta_slopes(pair: Pair, alpha: Array, beta: Array) -> Array:
    """q times the derivative by q, $(q^{\alpha + \beta} - p^\alpha q^\beta) / \alpha$, for each class."""
    log_p, log_q, ratio = _bounded(pair)
    slopes = -_risen(alpha * log_p + beta * log_q, -ratio, alpha, jnp.exp((alpha + beta) * log_q))
    return jnp.where(jnp.isneginf(pair.log_q), 0, slopes)


def _bounded(pair: Pair) -> tuple[Array, Array, Array]:
    """log p, log q and log(q / p), none of them infinite; 0 for a class that both rule out."""
    ruled_out = jnp.isneginf(pair.log_p) & jnp.isneginf(pair.log_q)
    log_p, log_q = (jnp.where(ruled_out, 0, jnp.maximum(x, FLOOR)) for x in (pair.log_p, pair.log_q))
    return log_p, log_q, jnp.clip(pair.ratio, FLOOR, -FLOOR)


def _terms(u: Array, v: Array, r: Array, alpha: Array, beta: Array) -> Array:
    """Terms that are never negative, of u = log p, v = log q, r = v - u.

    With s = α + β and F(x) = p^s (e^{xr} - 1) / x, a term is (F(s) - F(β)) / α. Near r = 0, where all are p^s r, it is
    p^s r² (s φ(sr) - β φ(βr)) / α, with φ(y) = (e^y - 1 - y) / y²: where α is the larger number, neither cancels.
    """
    s = alpha + beta
    both_0 = alpha == 0
    divisor = jnp.where(both_0, 1, alpha)
    near = jnp.abs(r) * jnp.maximum(jnp.abs(alpha), jnp.abs(s)) < 1
    x = jnp.where(near, r, 0)
    size = jnp.exp(s * u)
    slope = jnp.where(both_0, 0.5, (s * _series(s * x, 2) - beta * _series(beta * x, 2)) / divisor)
    close = size * x * x * slope
    y = jnp.where(near, 0, r)
    far = (_risen(s * v, y, s, size) - _risen(alpha * u + beta * v, y, beta, size)) / divisor
    return jnp.where(near, close, far)


def _risen(exponent: Array, r: Array, x: Array, size: Array) -> Array:
    """F(x), from the exponent of p^s e^{xr}: F(s) has q^s, F(β) has p^α q^β."""
    slight = jnp.abs(x * r) < 1
    plain = (jnp.exp(jnp.where(slight, 0, exponent)) - size) / jnp.where(slight, 1, x)
    return jnp.where(slight, size * r * _series(jnp.where(slight, x * r, 0), 1), plain)


def _series(y: Array, order: int) -> Array:
    """(e^y - its series below `order`) / y^order for |y| <= 1."""
    series = jnp.full_like(y, 1 / factorial(order + 20))
    for k in range(order + 19, order - 1, -1):
        series = 1 / factorial(k) + y * series
    return series
