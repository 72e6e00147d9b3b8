"""A teacher's and a student's distributions, what divergences are made of, and sums that lose nothing where they agree.

Each divergence is a sum over the classes of terms that are never negative and 0 where p = q: $p \\log(p/q) - p + q$ in
place of $p \\log(p/q)$, whose sum is the same. Then neither a value nor a gradient cancels where the two are close.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from kd_jax.losses.checks import Logits, Scalar, as_pair, number
from kd_jax.losses.compensated import difference, divide, exp, subtract
from kd_jax.losses.softmax import (
    are_many,
    exp_minus_1_minus_x,
    gaps,
    gaps_of_another,
    is_top,
    largest_exponent,
    slight,
    softmax,
)


class Pair(NamedTuple):
    """Teacher p and student q, `[..., classes]`: probabilities, their logarithms, and log(q / p).

    A class that both rule out has the ratio log(q / p) = 0.
    """

    p: Array
    q: Array
    log_p: Array
    log_q: Array
    ratio: Array


def as_distributions(student_logits: Logits, teacher_logits: Logits, temperature: Scalar) -> tuple[Pair, Array]:
    """Softmaxes at a temperature, and the temperature as an array."""
    student, teacher = as_pair(student_logits, teacher_logits)
    t = number(temperature, student)
    return (of_many if are_many(student) else pair)(student, teacher, t), t


@jax.custom_jvp
def pair(student: Array, teacher: Array, temperature: Array) -> Pair:
    """Softmaxes of checked logits. log(q / p) is not the difference of two logarithms where these are close."""
    top = is_top(teacher)
    student_gaps, teacher_gaps = gaps_of_another(student, top), gaps(teacher, top)
    a, b = divide(student_gaps, temperature), divide(teacher_gaps, temperature)
    d = divide(subtract(student_gaps, teacher_gaps), temperature).value
    (q, log_q), (p, log_p) = softmax(a), softmax(b)
    ruled_out = jnp.isneginf(log_p) | jnp.isneginf(log_q)
    d = jnp.where(ruled_out, 0, d)
    # log(q / p) is d - log(sum of p e^d), which is near d where the two are close.
    moderate = jnp.max(a.value, axis=-1, keepdims=True) < largest_exponent(d.dtype)
    raised = exp(jax.tree.map(lambda x: jnp.where(moderate, x, 0), a)) * jnp.sum(
        jnp.where(top, p, 0), axis=-1, keepdims=True
    )
    close = (jnp.abs(d) < 1) & ~ruled_out
    surplus = jnp.where(close, p * jnp.expm1(jnp.where(close, d, 0)), raised - p)
    total = jnp.sum(surplus, axis=-1, keepdims=True)
    known = moderate & (total > -0.5) & ~ruled_out
    exact = d - jnp.log1p(jnp.where(known, total, 0))
    both = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    plain = jnp.where(both, 0, log_q) - jnp.where(both, 0, log_p)
    return Pair(p, q, log_p, log_q, jnp.where(known, exact, plain))


@pair.defjvp
def _pair_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Pair, Pair]:
    """A logarithm of a softmax moves as its logit moves above the mean of the movements.

    All are measured from the top class: then the gradient of a class whose probability is nearly 1 does not cancel.
    """
    student, teacher, temperature = primals
    found = pair(*primals)
    by_log_q = _moved(student, found.q, temperature, tangents[0], tangents[2])
    by_log_p = _moved(teacher, found.p, temperature, tangents[1], tangents[2])
    return found, Pair(found.p * by_log_p, found.q * by_log_q, by_log_p, by_log_q, by_log_q - by_log_p)


def _moved(logits: Array, probabilities: Array, temperature: Array, by_logits: Array, by_temperature: Array) -> Array:
    top = is_top(logits)
    above = logits - jnp.sum(jnp.where(top, logits, 0), axis=-1, keepdims=True)
    by_logit = (by_logits - jnp.where(jnp.isneginf(above), 0, above / temperature) * by_temperature) / temperature
    from_top = jnp.where(top, 0, by_logit - jnp.sum(jnp.where(top, by_logit, 0), axis=-1, keepdims=True))
    return from_top - jnp.sum(probabilities * from_top, axis=-1, keepdims=True)


@jax.custom_jvp
def of_many(student: Array, teacher: Array, temperature: Array) -> Pair:
    """`pair` in float32, in few passes over the logits: exponentials of plain numbers, and none is computed twice.

    What must not cancel does not: with d = z_s / T - z_t / T, log(q / p) is d - log(1 + sum of p (e^d - 1)). A
    probability has the relative error of its exponent, a roundoff times its distance from the largest logit over T.
    """
    of_student, of_teacher = (jnp.max(z, axis=-1, keepdims=True) for z in (student, teacher))
    a, b = (student - of_student) / temperature, (teacher - of_teacher) / temperature
    # Networks may be alike but for a constant, which must not round what is left.
    each, largest = difference(student, teacher), difference(of_student, of_teacher)
    d = ((each.value - largest.value) + (each.error - largest.error)) / temperature
    odds_a, odds_b = jnp.exp(a), jnp.exp(b)
    sum_a, sum_b = (jnp.sum(odds, axis=-1, keepdims=True) for odds in (odds_a, odds_b))
    near = jnp.abs(d) < 0.5
    close = jnp.where(near, d, 0)
    surplus = jnp.where(near, odds_b * (close + slight(close)), odds_a - odds_b)
    total = jnp.sum(surplus, axis=-1, keepdims=True) / sum_b
    log_a, log_b = jnp.log(sum_a), jnp.log(sum_b)
    near = jnp.abs(total) < 0.5
    ratio = d - jnp.where(near, jnp.log1p(jnp.where(near, total, 0)), log_a - log_b)
    log_p, log_q = b - log_b, a - log_a
    no_p, no_q = jnp.isneginf(b), jnp.isneginf(a)
    ratio = jnp.where(no_p, jnp.where(no_q, 0, jnp.inf), jnp.where(no_q, -jnp.inf, ratio))
    return Pair(odds_b / sum_b, odds_a / sum_a, log_p, log_q, ratio)


def _of_many_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Any, Any, Any]) -> tuple[Pair, Pair]:
    """As a pair moves; a network that does not move costs nothing."""
    student, teacher, temperature = primals
    by_student, by_teacher, by_temperature = tangents
    found = of_many(*primals)
    by_log_q = _moved_of_many(student, found.q, temperature, by_student, by_temperature)
    by_log_p = _moved_of_many(teacher, found.p, temperature, by_teacher, by_temperature)
    return found, Pair(found.p * by_log_p, found.q * by_log_q, by_log_p, by_log_q, by_log_q - by_log_p)


of_many.defjvp(_of_many_jvp, symbolic_zeros=True)


def _moved_of_many(
    logits: Array, probabilities: Array, temperature: Array, by_logits: Any, by_temperature: Any
) -> Array:
    """As `_moved`: measured from the mean of the top classes, which is the one where one is nearly certain."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    moved = jnp.zeros_like(logits) if isinstance(by_logits, SymbolicZero) else by_logits
    if not isinstance(by_temperature, SymbolicZero):
        above = logits - largest
        moved -= jnp.where(jnp.isneginf(above), 0, above / temperature) * by_temperature
    moved /= temperature
    top = (logits >= largest).astype(logits.dtype)
    # A program may compute the two in other precisions, so that none reaches the largest.
    top /= jnp.maximum(jnp.sum(top, axis=-1, keepdims=True), 1)
    from_top = jnp.where(top == 1, 0, moved - jnp.sum(top * moved, axis=-1, keepdims=True))
    return from_top - jnp.sum(probabilities * from_top, axis=-1, keepdims=True)


@jax.custom_jvp
def distribution(logits: Array, temperature: Array) -> tuple[Array, Array]:
    """One of a pair, and its logarithm: they do not move with the other network, whose loss may be infinite."""
    return softmax(divide(gaps(logits, is_top(logits)), temperature))


@distribution.defjvp
def _distribution_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    found = distribution(*primals)
    by_log = _moved(primals[0], found[0], primals[1], *tangents)
    return found, (found[0] * by_log, by_log)


def counted(found: Pair, weight: Array) -> Pair:
    """The pair, or the student and itself where what follows has the weight 0: no derivative there is infinite.

    weight: a number, or `[...]`.
    """
    left_out = weight == 0 if jnp.ndim(weight) == 0 else (weight == 0)[..., None]
    q, log_q = jax.lax.stop_gradient(found.q), jax.lax.stop_gradient(found.log_q)
    alike = Pair(q, q, log_q, log_q, jnp.zeros_like(q))
    return jax.tree.map(lambda other, own: jnp.where(left_out, other, own), alike, found)


def relative_entropy(p: Array, q: Array, ratio: Array) -> Array:
    """KL(p‖q) from ratio = log(q / p), `[...]`."""
    near = jnp.abs(ratio) < 1
    close = p * exp_minus_1_minus_x(jnp.where(near, ratio, 0))
    # A class of p = 0 counts by q alone, whatever its ratio.
    far = (q - p) - p * jnp.where((p == 0) | near, 0, ratio)
    return jnp.sum(jnp.where(near, close, far), axis=-1)


def log_mixture(ratio: Array, rest: Array, weight: Array) -> Array:
    """log(rest + weight e^ratio) for rest + weight = 1: the logarithm of a mixture's ratio to its first part."""
    near, above = jnp.abs(ratio) < 1, ratio >= 1
    slight = jnp.log1p(weight * jnp.expm1(jnp.where(near, ratio, 0)))
    share = jnp.exp(jnp.where(near, 0, -jnp.abs(ratio)))
    inner = jnp.where(above, weight + rest * share, rest + weight * share)
    # Where the mixture's only part has vanished, the ratio is its own logarithm.
    kept = inner > 0
    logs = jnp.log(jnp.where(kept, inner, 1))
    below = jnp.where(kept, logs, jnp.where(near, 0, ratio))
    return jnp.where(near, slight, jnp.where(above, jnp.where(kept, ratio + logs, 0), below))


def size_of(x: Array) -> Array:
    """|x|, whose derivative at 0 is 0."""
    return jax.lax.stop_gradient(jnp.sign(x)) * x


def difference_of(pair: Pair) -> Array:
    """q - p, to rounding also where they are close."""
    near = jnp.abs(pair.ratio) < 1
    return jnp.where(near, pair.p * jnp.expm1(jnp.where(near, pair.ratio, 0)), pair.q - pair.p)
