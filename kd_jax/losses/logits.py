"""Logit losses: pure functions, one value per example."""

from math import log
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kd_jax.losses.compensated import Compensated, difference, divide, exp, subtract

Scalar = float | Float[Array, ""]


def cross_entropy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    r"""Cross entropy of integer labels, the hard loss: $-\log \mathrm{softmax}(z)_y$, in nats, `[batch]`.

    Evaluated as $\log(1 + \sum_{k \neq y} e^{z_k - z_y})$, which keeps its digits, and those of its gradient, where a
    network is nearly certain and right; the logarithm of a softmax then rounds to 0.

    logits: z, `[batch, classes]`. labels: y in [0, classes), `[batch]`; one outside gives NaN.
    """
    is_label = labels[:, None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, :]
    known = jnp.any(is_label, axis=-1, keepdims=True)
    of_label = jnp.where(known, jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True), jnp.nan)
    surplus = difference(logits, of_label)
    # The largest surplus, that of the label being 0, is taken out of the exponentials, so that none overflows. It moves
    # nothing: its own derivative cancels, and is therefore left out.
    largest = jax.tree.map(jax.lax.stop_gradient, _chosen(surplus, _is_top(surplus.value)))
    others = jnp.sum(jnp.where(is_label, 0, exp(subtract(surplus, largest))), axis=-1, keepdims=True)
    return (largest.value + (largest.error + jnp.log1p(others + jnp.expm1(-largest.value))))[:, 0]


def label_smoothing(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], *, smoothing: Scalar
) -> Float[Array, " batch"]:
    r"""Cross entropy with smoothed labels: $(1 - \epsilon) \, \mathrm{CE}(z, y) - \frac{\epsilon}{K} \sum_k \log p_k$.

    A teacher that knows nothing but the label: the baseline that tells whether a real one's soft targets matter.
    Szegedy et al. (2016), https://arxiv.org/abs/1512.00567, section 7. In nats, `[batch]`.

    logits: z, `[batch, classes]`. labels: y in [0, classes), `[batch]`. smoothing: epsilon in [0, 1]; at 0 this is
        `cross_entropy`.
    """
    epsilon = jnp.asarray(smoothing, logits.dtype)
    # Every term is negative, so nothing cancels.
    uniform = -jnp.mean(_softmax(_gaps(logits, _is_top(logits)))[1], axis=-1)
    return mix(cross_entropy(logits, labels), uniform, alpha=1 - epsilon)


def kl_divergence(
    student_logits: Float[Array, "batch classes"], teacher_logits: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    r"""$\mathrm{KL}(p_t \,\|\, p_s) = \sum_k p_{t,k} (\log p_{t,k} - \log p_{s,k})$ of softmaxes, in nats.

    The difference of two log-softmaxes loses every digit where the distributions are close, as they are at a high
    temperature. With $v = z_s - z_t - \sum_k p_t (z_s - z_t)$, whose mean under the teacher is 0, the same value is
    $\log(1 + \sum_k p_t (e^v - 1 - v))$: a sum of terms that are never negative, exact to rounding at any distance.

    Returns `[batch]`.
    """
    return distillation_kl(student_logits, teacher_logits, temperature=1.0)


def distillation_kl(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    *,
    temperature: Scalar,
) -> Float[Array, " batch"]:
    r"""The soft loss without its factor T²: $\mathrm{KL}(p_t^T \| p_s^T)$, $p^T = \mathrm{softmax}(z/T)$, in nats.

    Its gradient shrinks as 1/T², so a change of temperature also changes its weight; `kd` undoes that.
    PyTorch's `KLDivLoss(reduction="batchmean")` of log-softmax and softmax is the mean of these values.

    temperature: T > 0. Returns `[batch]`.
    """
    return _kl(student_logits, teacher_logits, jnp.asarray(temperature, student_logits.dtype))


def kd(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    *,
    temperature: Scalar,
) -> Float[Array, " batch"]:
    r"""The soft loss of Hinton, Vinyals and Dean (2015), section 2: $T^2 \, \mathrm{KL}(p_t^T \,\|\, p_s^T)$, in nats.

    The factor T² keeps the gradient's size the same at every temperature. As T grows it becomes logit matching,
    half the mean over the classes of the squared difference of centred logits.

    RepDistiller's `DistillKL` is the mean of these values; its alpha (0.9) weighs them, its gamma (0.1) the hard loss.
    torchdistill's `KDLoss` is the mean of `mix(hard, kd, alpha)`, but drops T² at alpha 0 exactly and without labels.
    Keras's `LogitsDistillation` is their mean if it is given an instance of `KLDivergence`; its default (3.15) takes
    neither softmax nor T² and is another loss. Their values for the same logits are in `tests/test_peers.py`.

    temperature: T > 0. Returns `[batch]`.
    """
    t = jnp.asarray(temperature, student_logits.dtype)
    return t**2 * distillation_kl(student_logits, teacher_logits, temperature=t)


def kd_as_written(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    *,
    temperature: Scalar,
) -> Float[Array, " batch"]:
    r"""The reference notebook's soft loss as it was written: $\sum_k p_{t,k}^T (\log p_{t,k}^T - p_{s,k}^T)$. Not a KL.

    `KLDivLoss` was given the student's probabilities where it wants their logarithms. The value is not 0 for equal
    distributions, and its gradient is not that of a divergence. Only for checking the notebook's numbers.

    temperature: T > 0. Returns `[batch]`.
    """
    return _as_written(student_logits, teacher_logits, jnp.asarray(temperature, student_logits.dtype))


def mix(hard: Float[Array, " batch"], soft: Float[Array, " batch"], *, alpha: Scalar) -> Float[Array, " batch"]:
    r"""The weighted sum $\alpha \, \mathrm{hard} + (1 - \alpha) \, \mathrm{soft}$: `alpha` weighs the hard loss.

    So do torchdistill's alpha and Keras's `student_loss_weight`; RepDistiller's alpha is the soft loss's weight.
    """
    return alpha * hard + (1 - alpha) * soft


def _largest_exponent(dtype: jnp.dtype) -> float:
    """Beyond this an exponential could overflow. KL is as large there, and the plain form has lost nothing."""
    return min(80.0, log(float(jnp.finfo(dtype).max)) - 8)


@jax.custom_jvp
def _kl(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    temperature: Float[Array, ""],
) -> Float[Array, " batch"]:
    return _kl_parts(student_logits, teacher_logits, temperature).value


@_kl.defjvp
def _kl_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """dKL = (p_s - p_t)·da - p_t v·db, with a and b the tempered logits: z/T, so that da = dz/T - a dT/T."""
    temperature = primals[2]
    student_tangent, teacher_tangent, temperature_tangent = tangents
    parts = _kl_parts(*primals)
    # By the temperature, (p_s - p_t)·a - p_t v·b in the terms that do not cancel where the distributions are close.
    by_temperature = parts.gap * parts.apart + (parts.gap - parts.surprise) * parts.teacher_tempered
    tangent = parts.gap * student_tangent - parts.surprise * teacher_tangent - by_temperature * temperature_tangent
    return parts.value, jnp.sum(tangent, axis=-1) / temperature


class _KLParts(NamedTuple):
    """KL; p_s - p_t; p_t v; and, from the teacher's top class, a - b and b. Without cancellation."""

    value: Array
    gap: Array
    surprise: Array
    apart: Array
    teacher_tempered: Array


def _kl_parts(student_logits: Array, teacher_logits: Array, temperature: Array) -> _KLParts:
    """All is measured from the teacher's top class r: then what v is centred by is a sum of the other classes alone."""
    top = _is_top(teacher_logits)
    student_gaps, teacher_gaps = _gaps(student_logits, top), _gaps(teacher_logits, top)
    a, b = divide(student_gaps, temperature), divide(teacher_gaps, temperature)
    d = divide(subtract(student_gaps, teacher_gaps), temperature).value
    odds = exp(b)
    others = jnp.sum(jnp.where(top, 0, odds), axis=-1, keepdims=True)
    teacher = odds / (1 + others)
    # A class that the teacher rules out (-inf) counts by the student's probability alone.
    ruled_out = jnp.isneginf(b.value)
    d = jnp.where(ruled_out, 0, d)
    mean = jnp.sum(teacher * d, axis=-1, keepdims=True)
    student, student_log = _softmax(a)
    # v, and log(p_t e^v).
    centred, weight = d - mean, subtract(a, Compensated(mean, jnp.zeros_like(mean)))
    close = jnp.max(weight.value, axis=-1, keepdims=True) < _largest_exponent(d.dtype)
    v = jnp.where(close, centred, 0)
    weighted = exp(jax.tree.map(lambda x: jnp.where(close, x, 0), weight)) / (1 + others)
    terms = jnp.where(
        (v < 1) & ~ruled_out, teacher * _exp_minus_1_minus_x(jnp.minimum(v, 1)), weighted - teacher * (1 + v)
    )
    exact = jnp.log1p(jnp.sum(terms, axis=-1, keepdims=True))
    teacher_log = b.value - jnp.log1p(others)
    plain = jnp.sum(jnp.where(teacher == 0, 0, teacher * (teacher_log - student_log)), axis=-1, keepdims=True)
    # log(p_s / p_t) is v - KL, a difference that may cancel where KL is nearly v. It is d - log(1 + sum p_t (e^d - 1)),
    # too, which does not; but that overflows where the student's top class is far above the teacher's.
    moderate = jnp.max(a.value, axis=-1, keepdims=True) < _largest_exponent(d.dtype)
    raised = exp(jax.tree.map(lambda x: jnp.where(moderate, x, 0), a)) / (1 + others)
    slight = (jnp.abs(d) < 1) & ~ruled_out
    surplus = jnp.where(slight, teacher * jnp.expm1(jnp.where(slight, d, 0)), raised - teacher)
    log_ratio = jnp.where(moderate, d - jnp.log1p(jnp.sum(surplus, axis=-1, keepdims=True)), v - exact)
    # Where v is large its rounding is as well, and the plain difference of probabilities is the better one.
    near = close & (jnp.abs(log_ratio) < 1) & (jnp.abs(v) < 1) & ~ruled_out
    gap = jnp.where(near, teacher * jnp.expm1(jnp.where(near, log_ratio, 0)), student - teacher)
    # The gaps add up to 0. Where both are nearly certain of r, its own would be a small difference of v and KL.
    gap = jnp.where(top & (others < 1), -jnp.sum(jnp.where(top, 0, gap), axis=-1, keepdims=True), gap)
    return _KLParts(jnp.where(close, exact, plain)[..., 0], gap, teacher * centred, d, jnp.where(ruled_out, 0, b.value))


@jax.custom_jvp
def _as_written(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    temperature: Float[Array, ""],
) -> Float[Array, " batch"]:
    return _as_written_parts(student_logits, teacher_logits, temperature).value


@_as_written.defjvp
def _as_written_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    student_logits, teacher_logits, temperature = primals
    student_tangent, teacher_tangent, temperature_tangent = tangents
    parts = _as_written_parts(*primals)
    tangent = parts.by_student * (student_tangent - student_logits / temperature * temperature_tangent)
    tangent += parts.by_teacher * (teacher_tangent - teacher_logits / temperature * temperature_tangent)
    return parts.value, jnp.sum(tangent, axis=-1) / temperature


class _AsWrittenParts(NamedTuple):
    """The value, and its derivatives by the tempered logits."""

    value: Array
    by_student: Array
    by_teacher: Array


def _as_written_parts(student_logits: Array, teacher_logits: Array, temperature: Array) -> _AsWrittenParts:
    """Every term of the value is negative. Derivatives are centred from the class with the most weight in them."""
    student_top, teacher_top = _is_top(student_logits), _is_top(teacher_logits)
    student, _ = _softmax(divide(_gaps(student_logits, student_top), temperature))
    b = divide(_gaps(teacher_logits, teacher_top), temperature)
    teacher, teacher_log = _softmax(b)
    value = jnp.sum(jnp.where(teacher == 0, 0, teacher * (teacher_log - student)), axis=-1)

    def centred(gaps: Array, weights: Array) -> Array:
        return weights * (gaps - jnp.sum(weights * gaps, axis=-1, keepdims=True))

    by_student = -centred(_above(teacher, teacher_logits, student_top, temperature), student)
    gaps = jnp.where(teacher == 0, 0, b.value) - _above(student, student_logits, teacher_top, temperature)
    return _AsWrittenParts(value, by_student, centred(gaps, teacher))


def _above(probabilities: Array, logits: Array, chosen: Array, temperature: Array) -> Array:
    """Probabilities above that of the chosen class of each row, to rounding also where they are nearly equal."""
    of_chosen = jnp.sum(jnp.where(chosen, probabilities, 0), axis=-1, keepdims=True)
    log_ratio = divide(_gaps(logits, chosen), temperature).value
    near = jnp.abs(log_ratio) < 1
    return jnp.where(near, of_chosen * jnp.expm1(jnp.where(near, log_ratio, 0)), probabilities - of_chosen)


def _is_top(logits: Array) -> Array:
    """Whether a class is the first of the largest logits of its row."""
    return jnp.argmax(logits, axis=-1, keepdims=True) == jnp.arange(logits.shape[-1])[None]


def _gaps(logits: Array, chosen: Array) -> Compensated:
    """Logits above that of the chosen class of each row."""
    return difference(logits, jnp.sum(jnp.where(chosen, logits, 0), axis=-1, keepdims=True))


def _chosen(z: Compensated, chosen: Array) -> Compensated:
    """The value of the chosen class of each row."""
    return Compensated(*(jnp.sum(jnp.where(chosen, part, 0), axis=-1, keepdims=True) for part in z))


def _softmax(z: Compensated) -> tuple[Array, Array]:
    """Softmax and its logarithm, each to rounding, also where a probability is near 1 and its logarithm near 0."""
    top = _is_top(z.value)
    below = subtract(z, _chosen(z, top))
    odds = exp(below)
    others = jnp.sum(jnp.where(top, 0, odds), axis=-1, keepdims=True)
    return odds / (1 + others), below.value - jnp.log1p(others)


def _exp_minus_1_minus_x(x: Array) -> Array:
    """e^x - 1 - x, to rounding also near 0, where the subtraction would lose it."""
    small = jnp.abs(x) < 0.5
    y = jnp.where(small, x, 0)
    series = jnp.ones_like(x)
    for k in range(15, 2, -1):
        series = 1 + y / k * series
    return jnp.where(small, y * y / 2 * series, jnp.expm1(x) - x)
