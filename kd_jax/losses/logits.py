"""Distillation by soft targets: pure functions of logits `[..., classes]`, one value for each position `[...]`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.losses.checks import Logits, Scalar, as_pair, number
from kd_jax.losses.compensated import Compensated, divide, exp, subtract
from kd_jax.losses.pairs import of_many
from kd_jax.losses.softmax import (
    are_many,
    exp_minus_1_minus_x,
    gaps_of_another,
    is_top,
    largest_exponent,
    slight,
    softmax,
)
from kd_jax.losses.softmax import gaps as gaps_of
from kd_jax.losses.tangents import product

LARGE_TEMPERATURE = 2.0**40


def kl_divergence(student_logits: Logits, teacher_logits: Logits) -> Float[Array, "..."]:
    r"""$\mathrm{KL}(p_t \,\|\, p_s) = \sum_k p_{t,k} (\log p_{t,k} - \log p_{s,k})$ of softmaxes, in nats.

    The difference of two log-softmaxes loses every digit where the distributions are close, as they are at a high
    temperature. With $v = z_s - z_t - \sum_k p_t (z_s - z_t)$, whose mean under the teacher is 0, the same value is
    $\log(1 + \sum_k p_t (e^v - 1 - v))$: a sum of terms that are never negative, exact to rounding at any distance.

    Both `[..., classes]`. Returns `[...]`, in float32 or better. ShapeError: shapes differ, or logits are no floats.
    """
    return distillation_kl(student_logits, teacher_logits, temperature=1.0)


def distillation_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar) -> Float[Array, "..."]:
    r"""The soft loss without its factor T²: $\mathrm{KL}(p_t^T \| p_s^T)$, $p^T = \mathrm{softmax}(z/T)$, in nats.

    Its gradient shrinks as 1/T², so a change of temperature also changes its weight; `kd` undoes that.
    PyTorch's `KLDivLoss(reduction="batchmean")` of log-softmax and softmax is the mean of these values.

    temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    student, teacher = as_pair(student_logits, teacher_logits)
    return (_kl_of_many if are_many(student) else _kl)(student, teacher, number(temperature, student))


def kd(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar) -> Float[Array, "..."]:
    r"""The soft loss of Hinton, Vinyals and Dean (2015), section 2: $T^2 \, \mathrm{KL}(p_t^T \,\|\, p_s^T)$, in nats.

    The factor T² keeps the gradient's size the same at every temperature. As T grows it becomes logit matching,
    half the mean over the classes of the squared difference of centred logits.

    RepDistiller's `DistillKL` is the mean of these values; its alpha (0.9) weighs them, its gamma (0.1) the hard loss.
    torchdistill's `KDLoss` is the mean of `mix(hard, kd, alpha)`, but drops T² at alpha 0 exactly and without labels.
    Keras's `LogitsDistillation` is their mean if it is given an instance of `KLDivergence`; its default (3.15) takes
    neither softmax nor T² and is another loss. Their values for the same logits are in `tests/losses/test_peers.py`.

    temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    student, teacher = as_pair(student_logits, teacher_logits)
    if are_many(student):
        # Beyond, it is logit matching to rounding.
        t = jnp.minimum(number(temperature, student), LARGE_TEMPERATURE)
        return t**2 * _kl_of_many(student, teacher, t)
    # The reciprocal of a larger temperature may be 0.
    return _kd(student, teacher, jnp.minimum(number(temperature, student), jnp.finfo(student.dtype).max / 64))


def kd_as_written(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar) -> Float[Array, "..."]:
    r"""The reference notebook's soft loss as it was written: $\sum_k p_{t,k}^T (\log p_{t,k}^T - p_{s,k}^T)$. Not a KL.

    `KLDivLoss` was given the student's probabilities where it wants their logarithms. The value is not 0 for equal
    distributions, and its gradient is not that of a divergence. Only for checking the notebook's numbers.

    temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    student, teacher = as_pair(student_logits, teacher_logits)
    return _as_written(student, teacher, number(temperature, student))


def _kl_moved(parts: "_KLParts", temperature: Array, tangents: tuple[Any, Any, Any]) -> tuple[Array, Array]:
    """dKL = (p_s - p_t)·da - p_t v·db, with a and b the tempered logits: z/T, so that da = dz/T - a dT/T."""
    student_tangent, teacher_tangent, temperature_tangent = tangents
    tangent = product(parts.gap, student_tangent) - product(parts.surprise, teacher_tangent)
    tangent -= product(_by_temperature(parts), temperature_tangent)
    return parts.value, jnp.sum(tangent, axis=-1) / temperature


def _by_temperature(parts: "_KLParts") -> Array:
    """(p_s - p_t)·a - p_t v·b in the terms that do not cancel where the distributions are close."""
    return parts.gap * parts.apart + (parts.gap - parts.surprise) * parts.teacher_tempered


@jax.custom_jvp
def _kd(student_logits: Array, teacher_logits: Array, temperature: Array) -> Array:
    matching = _logit_matching(student_logits, teacher_logits, temperature)
    return _times_t_squared(_kl_parts(student_logits, teacher_logits, temperature).value, matching, temperature)


def _kd_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Any, Any, Any]) -> tuple[Array, Array]:
    """That of the KL times T², or in the limit, where it is logit matching, d·dz with d = z_s - z_t centred, over K."""
    temperature = primals[2]
    student_tangent, teacher_tangent, temperature_tangent = tangents
    parts, matching = _kl_parts(*primals), _logit_matching(*primals)
    limit = matching.reached[..., None]
    tangent = product(jnp.where(limit, matching.slope, parts.gap), student_tangent)
    tangent -= product(jnp.where(limit, matching.slope, parts.surprise), teacher_tangent)
    tangent -= product(jnp.where(limit, 0, _by_temperature(parts)), temperature_tangent)
    total = jnp.sum(tangent, axis=-1)
    large = temperature > LARGE_TEMPERATURE
    moderate = jnp.where(large, jnp.ones_like(temperature), temperature)
    by_logits = jnp.where(
        large, jnp.where(matching.reached, total, temperature * total), moderate**2 * (total / moderate)
    )
    by_factor = jnp.where(matching.reached, 0, 2 * temperature * parts.value)
    return _times_t_squared(parts.value, matching, temperature), by_logits + product(by_factor, temperature_tangent)


_kd.defjvp(_kd_jvp, symbolic_zeros=True)


class _Matching(NamedTuple):
    """T² KL in the limit of a high temperature, its slope by the student's logits, and where the limit is reached."""

    value: Array
    slope: Array
    reached: Array


def _logit_matching(student: Array, teacher: Array, temperature: Array) -> _Matching:
    negligible = jnp.finfo(student.dtype).eps / 8
    a, b = ((z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))) / temperature for z in (student, teacher))
    # Below, an exponential is 0 in any precision: such a class is ruled out.
    ruled_out = (a < -800) & (b < -800)
    size = jnp.max(jnp.where(ruled_out, 0, jnp.maximum(-a, -b)), axis=-1)
    apart = jnp.where(ruled_out, 0, student - teacher)
    count = jnp.sum(jnp.where(ruled_out, 0, jnp.ones_like(a)), axis=-1, keepdims=True)
    slope = jnp.where(ruled_out, 0, apart - jnp.sum(apart, axis=-1, keepdims=True) / count) / count
    reached = (size < negligible) & (temperature > LARGE_TEMPERATURE)
    return _Matching(count[..., 0] * jnp.sum(slope * slope, axis=-1) / 2, slope, reached)


def _times_t_squared(kl: Array, matching: _Matching, temperature: Array) -> Array:
    """Beyond a large temperature T² may overflow and the KL underflow."""
    large = temperature > LARGE_TEMPERATURE
    moderate = jnp.where(large, jnp.ones_like(temperature), temperature)
    # One number multiplies last, so that compilers put it together with a weight.
    return moderate**2 * jnp.where(
        large, jnp.where(matching.reached, matching.value, temperature * (temperature * kl)), kl
    )


class _KLParts(NamedTuple):
    """KL; p_s - p_t; p_t v; and, from the teacher's top class, a - b and b. Without cancellation."""

    value: Array
    gap: Array
    surprise: Array
    apart: Array
    teacher_tempered: Array


def _kl_parts(student_logits: Array, teacher_logits: Array, temperature: Array) -> _KLParts:
    """All is measured from the teacher's top class r: then what v is centred by is a sum of the other classes alone."""
    top = is_top(teacher_logits)
    student_gaps, teacher_gaps = gaps_of_another(student_logits, top), gaps_of(teacher_logits, top)
    a, b = divide(student_gaps, temperature), divide(teacher_gaps, temperature)
    d = divide(subtract(student_gaps, teacher_gaps), temperature).value
    odds = exp(b)
    others = jnp.sum(jnp.where(top, 0, odds), axis=-1, keepdims=True)
    teacher = odds / (1 + others)
    # A class that the teacher rules out (-inf) counts by the student's probability alone.
    ruled_out = jnp.isneginf(b.value)
    d = jnp.where(ruled_out, 0, d)
    mean = jnp.sum(teacher * d, axis=-1, keepdims=True)
    student, student_log = softmax(a)
    # v, and log(p_t e^v).
    centred, weight = d - mean, subtract(a, Compensated(mean, jnp.zeros_like(mean)))
    close = jnp.max(weight.value, axis=-1, keepdims=True) < largest_exponent(d.dtype)
    v = jnp.where(close, centred, 0)
    weighted = exp(jax.tree.map(lambda x: jnp.where(close, x, 0), weight)) / (1 + others)
    terms = jnp.where(
        (v < 1) & ~ruled_out, teacher * exp_minus_1_minus_x(jnp.minimum(v, 1)), weighted - teacher * (1 + v)
    )
    exact = jnp.log1p(jnp.sum(terms, axis=-1, keepdims=True))
    teacher_log = b.value - jnp.log1p(others)
    plain = jnp.sum(jnp.where(teacher == 0, 0, teacher * (teacher_log - student_log)), axis=-1, keepdims=True)
    # log(p_s / p_t) is v - KL, a difference that may cancel where KL is nearly v. It is d - log(1 + sum p_t (e^d - 1)),
    # too, which does not; but that overflows where the student's top class is far above the teacher's.
    moderate = jnp.max(a.value, axis=-1, keepdims=True) < largest_exponent(d.dtype)
    raised = exp(jax.tree.map(lambda x: jnp.where(moderate, x, 0), a)) / (1 + others)
    nearby = (jnp.abs(d) < 1) & ~ruled_out
    surplus = jnp.where(nearby, teacher * jnp.expm1(jnp.where(nearby, d, 0)), raised - teacher)
    log_ratio = jnp.where(moderate, d - jnp.log1p(jnp.sum(surplus, axis=-1, keepdims=True)), v - exact)
    # Where v is large its rounding is as well, and the plain difference of probabilities is the better one.
    near = close & (jnp.abs(log_ratio) < 1) & (jnp.abs(v) < 1) & ~ruled_out
    gap = jnp.where(near, teacher * jnp.expm1(jnp.where(near, log_ratio, 0)), student - teacher)
    # The gaps add up to 0. Where both are nearly certain of r, its own would be a small difference of v and KL.
    gap = jnp.where(top & (others < 1), -jnp.sum(jnp.where(top, 0, gap), axis=-1, keepdims=True), gap)
    # From the teacher's top class, too: of a class that it rules out, also by a large negative number, a alone.
    without = teacher == 0
    apart = jnp.where(without, jnp.where(jnp.isneginf(a.value), 0, a.value), d)
    value = jnp.where(close, exact, plain)[..., 0]
    return _KLParts(value, gap, teacher * centred, apart, jnp.where(without, 0, b.value))


def _kl_parts_of_many(student_logits: Array, teacher_logits: Array, temperature: Array) -> _KLParts:
    """The same in few passes, with a - b and b measured from the logarithms of the sums."""
    pair = of_many(student_logits, teacher_logits, temperature)
    ruled_out = pair.p == 0
    near = (jnp.abs(pair.ratio) < 0.5) & ~ruled_out
    close = jnp.where(near, pair.ratio, 0)
    ratio = jnp.where(ruled_out, 0, pair.ratio)
    curved = slight(close)
    terms = jnp.where(near, pair.p * curved, (pair.q - pair.p) - pair.p * ratio)
    value = jnp.sum(terms, axis=-1, keepdims=True)
    gap = jnp.where(near, pair.p * (close + curved), pair.q - pair.p)
    apart = jnp.where(ruled_out, jnp.where(jnp.isneginf(pair.log_q), 0, pair.log_q), ratio)
    return _KLParts(value[..., 0], gap, pair.p * (ratio + value), apart, jnp.where(ruled_out, 0, pair.log_p))


def _with_derivatives(parts_of: Callable[[Array, Array, Array], "_KLParts"]) -> Callable[[Array, Array, Array], Array]:
    """The KL of checked logits at a temperature, whose derivatives are made of the same parts."""

    @jax.custom_jvp
    def kl(student_logits: Array, teacher_logits: Array, temperature: Array) -> Array:
        return parts_of(student_logits, teacher_logits, temperature).value

    def moved(primals: tuple[Array, Array, Array], tangents: tuple[Any, Any, Any]) -> tuple[Array, Array]:
        return _kl_moved(parts_of(*primals), primals[2], tangents)

    kl.defjvp(moved, symbolic_zeros=True)
    return kl


_kl, _kl_of_many = _with_derivatives(_kl_parts), _with_derivatives(_kl_parts_of_many)


@jax.custom_jvp
def _as_written(student_logits: Array, teacher_logits: Array, temperature: Array) -> Array:
    return _as_written_parts(student_logits, teacher_logits, temperature).value


@_as_written.defjvp
def _as_written_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    student_logits, teacher_logits, temperature = primals
    student_tangent, teacher_tangent, temperature_tangent = tangents
    parts = _as_written_parts(*primals)
    # A class that is ruled out has no derivative: its logit -inf must not be multiplied by a tangent of 0.
    a, b = (jnp.where(jnp.isneginf(z), 0, z / temperature) for z in (student_logits, teacher_logits))
    tangent = parts.by_student * (student_tangent - a * temperature_tangent)
    tangent += parts.by_teacher * (teacher_tangent - b * temperature_tangent)
    return parts.value, jnp.sum(tangent, axis=-1) / temperature


class _AsWrittenParts(NamedTuple):
    """The value, and its derivatives by the tempered logits."""

    value: Array
    by_student: Array
    by_teacher: Array


def _as_written_parts(student_logits: Array, teacher_logits: Array, temperature: Array) -> _AsWrittenParts:
    """Every term of the value is negative. Derivatives are centred from the class with the most weight in them."""
    student_top, teacher_top = is_top(student_logits), is_top(teacher_logits)
    student, _ = softmax(divide(gaps_of(student_logits, student_top), temperature))
    b = divide(gaps_of(teacher_logits, teacher_top), temperature)
    teacher, teacher_log = softmax(b)
    value = jnp.sum(jnp.where(teacher == 0, 0, teacher * (teacher_log - student)), axis=-1)

    def centred(gaps: Array, weights: Array) -> Array:
        return weights * (gaps - jnp.sum(weights * gaps, axis=-1, keepdims=True))

    by_student = -centred(_above(teacher, teacher_logits, student_top, temperature), student)
    gaps = jnp.where(teacher == 0, 0, b.value) - _above(student, student_logits, teacher_top, temperature)
    return _AsWrittenParts(value, by_student, centred(gaps, teacher))


def _above(probabilities: Array, logits: Array, chosen: Array, temperature: Array) -> Array:
    """Probabilities above that of the chosen class of each row, to rounding also where they are nearly equal."""
    of_chosen = jnp.sum(jnp.where(chosen, probabilities, 0), axis=-1, keepdims=True)
    log_ratio = divide(gaps_of(logits, chosen), temperature).value
    near = jnp.abs(log_ratio) < 1
    return jnp.where(near, of_chosen * jnp.expm1(jnp.where(near, log_ratio, 0)), probabilities - of_chosen)
