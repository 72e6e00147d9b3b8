"""Losses of labels: what a student learns without a teacher."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from kd_jax.losses import softmax as soft
from kd_jax.losses.checks import (
    Labels,
    Logits,
    Scalar,
    are_soft,
    as_labels,
    as_logits,
    as_soft_labels,
    is_label,
    number,
)
from kd_jax.losses.compensated import difference, exp, subtract
from kd_jax.losses.mixing import mix


def cross_entropy(logits: Logits, labels: Labels) -> Float[Array, "..."]:
    r"""Cross entropy, the hard loss: $-\log q_y$, or $-\sum_k p_k \log q_k$ of soft labels, $q = softmax(z)$, in nats.

    Evaluated as $\log(1 + \sum_{k \neq y} e^{z_k - z_y})$, which keeps its digits, and those of its gradient, where a
    network is nearly certain and right; the logarithm of a softmax then rounds to 0.

    logits: z, `[..., classes]`. labels: y in [0, classes), integers `[...]`; one outside gives NaN.
        Or soft labels p, floats `[..., classes]`; a class of p = 0 counts for nothing, also where it is ruled out.
    Returns `[...]`, in float32 or better; +inf where the label's own logit is -inf. ShapeError: shapes do not fit.
    """
    logits = as_logits(logits)
    if are_soft(labels):
        return soft_cross_entropy(logits, as_soft_labels(labels, logits))
    ours = is_label(as_labels(labels, logits), logits)
    return (_cross_entropy_of_many if soft.are_many(logits) else _cross_entropy)(logits, ours)


def label_smoothing(logits: Logits, labels: Labels, *, smoothing: Scalar) -> Float[Array, "..."]:
    r"""Cross entropy with smoothed labels: $(1 - \epsilon) \, \mathrm{CE}(z, y) - \frac{\epsilon}{K} \sum_k \log p_k$.

    A teacher that knows nothing but the label: the baseline that tells whether a real one's soft targets matter.
    Szegedy et al. (2016), https://arxiv.org/abs/1512.00567, section 7. In nats, `[...]`.

    logits: z, `[..., classes]`. labels: as for `cross_entropy`. smoothing: epsilon in [0, 1]; at 0 this is
        `cross_entropy`.
    """
    logits = as_logits(logits)
    epsilon = number(smoothing, logits)
    cleared = logits
    if not are_soft(labels):
        cleared = _cleared(logits, jnp.any(is_label(as_labels(labels, logits), logits), axis=-1, keepdims=True))
    # Every term is negative, so nothing cancels.
    uniform = -jnp.mean(soft.softmax(soft.gaps(cleared, soft.is_top(cleared)))[1], axis=-1)
    return mix(cross_entropy(logits, labels), uniform, alpha=1 - epsilon)


def _cross_entropy(logits: Array, is_label: Array) -> Array:
    known = jnp.any(is_label, axis=-1, keepdims=True)
    # What the value is besides: infinite where the label is ruled out, NaN where there is none. A sum over the classes
    # stands between this choice and what a caller does with the value, so that compilers contract the same operations.
    besides = jnp.where(known, jnp.where(is_label & jnp.isneginf(logits), jnp.inf, 0), jnp.nan)
    logits = _cleared(logits, known)
    of_label = _raised(jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True))
    surplus = difference(logits, of_label)
    # The largest surplus, that of the label being 0, is taken out of the exponentials, so that none overflows. It moves
    # nothing: its own derivative cancels, and is therefore left out.
    largest = jax.tree.map(jax.lax.stop_gradient, soft.of_chosen(surplus, soft.is_top(surplus.value)))
    others = jnp.sum(jnp.where(is_label, 0, exp(subtract(surplus, largest))), axis=-1, keepdims=True)
    logarithm = jnp.where(known, jnp.log1p(others + jnp.expm1(-largest.value)), 0)
    start = largest.value + jax.lax.stop_gradient(jnp.sum(besides, axis=-1, keepdims=True))
    return (start + (largest.error + logarithm))[..., 0]


@jax.custom_jvp
def _cross_entropy_of_many(logits: Array, is_label: Array) -> Array:
    return _cross_entropy_parts(logits, is_label)[0]


@_cross_entropy_of_many.defjvp
def _cross_entropy_of_many_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    value, gap = _cross_entropy_parts(*primals)
    return value, jnp.sum(gap * tangents[0], axis=-1)


def _cross_entropy_parts(logits: Array, is_label: Array) -> tuple[Array, Array]:
    """The same in few passes, see `pairs.of_many`, and q - y: at the label minus the sum of the others."""
    known = jnp.any(is_label, axis=-1, keepdims=True)
    logits = jnp.where(known, logits, 0)
    top = jnp.max(logits, axis=-1, keepdims=True)
    odds = jnp.exp(logits - top)
    others = jnp.sum(jnp.where(is_label, 0, odds), axis=-1, keepdims=True)
    own = jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True) - top
    of_label = jnp.exp(own)
    total = others + of_label
    sure = others < of_label
    value = jnp.where(sure, jnp.log1p(others / jnp.where(sure, of_label, 1)), jnp.log(total) - own)
    gap = jnp.where(known, jnp.where(is_label, -others, odds) / total, 0)
    return jnp.where(known, value, jnp.nan)[..., 0], gap


@jax.custom_jvp
def _cleared(logits: Array, known: Array) -> Array:
    """0 in rows without a label, so that nothing there is multiplied by a derivative of 0; its own derivative is 1."""
    return jnp.where(known, logits, 0)


@_cleared.defjvp
def _cleared_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    return _cleared(*primals), tangents[0]


@jax.custom_jvp
def _raised(logits: Array) -> Array:
    """The lowest finite number for -inf, with the derivative 1: then the gradient of the cross entropy is p - y too."""
    return jnp.maximum(logits, jnp.finfo(logits.dtype).min)


@_raised.defjvp
def _raised_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _raised(*primals), tangents[0]


@jax.custom_jvp
def soft_cross_entropy(logits: Array, labels: Array) -> Array:
    """Of checked arrays of one type."""
    _, logs = soft.softmax(soft.gaps(logits, soft.is_top(logits)))
    return -jnp.sum(jnp.where(labels == 0, 0, labels * logs), axis=-1)


def _soft_cross_entropy_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    """By a logit, q_j Σ_{k≠j} p_k - p_j Σ_{k≠j} q_k: the difference q - p without the cancellation of two near 1."""
    logits, labels = primals
    by_logits, by_labels = tangents
    q, logs = soft.softmax(soft.gaps(logits, soft.is_top(logits)))
    value = -jnp.sum(jnp.where(labels == 0, 0, labels * logs), axis=-1)
    tangent = jnp.zeros_like(value)
    if not isinstance(by_logits, SymbolicZero):
        tangent += jnp.sum((q * _of_others(labels) - labels * _of_others(q)) * by_logits, axis=-1)
    if not isinstance(by_labels, SymbolicZero):
        # Where a class is ruled out, by -inf or by the lowest number, its label of 0 has no derivative.
        tangent -= jnp.sum(jnp.where((labels == 0) & (logs < -1e30), 0, logs) * by_labels, axis=-1)
    return value, tangent


soft_cross_entropy.defjvp(_soft_cross_entropy_jvp, symbolic_zeros=True)


def _of_others(p: Array) -> Array:
    """The sum of the other classes; of the largest class without itself, since there it would cancel."""
    top = soft.is_top(p)
    without_top = jnp.sum(jnp.where(top, 0, p), axis=-1, keepdims=True)
    return jnp.where(top, without_top, without_top + jnp.sum(jnp.where(top, p, 0), axis=-1, keepdims=True) - p)
