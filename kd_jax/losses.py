"""Logit losses: pure functions, one value per example."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    surplus = logits - of_label
    # The largest surplus is taken out of the exponentials, so that none overflows.
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(surplus, axis=-1, keepdims=True), 0))
    others = jnp.sum(jnp.where(is_label, 0, jnp.exp(surplus - largest)), axis=-1, keepdims=True)
    # `largest` moves nothing: its own derivative cancels, and is therefore left out.
    return (largest + jnp.log1p(others + jnp.expm1(-largest)))[:, 0]


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
    t = jnp.asarray(temperature, student_logits.dtype)
    student = jax.nn.softmax(student_logits / t)
    teacher = jax.nn.log_softmax(teacher_logits / t)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def mix(hard: Float[Array, " batch"], soft: Float[Array, " batch"], *, alpha: Scalar) -> Float[Array, " batch"]:
    r"""The weighted sum $\alpha \, \mathrm{hard} + (1 - \alpha) \, \mathrm{soft}$: `alpha` weighs the hard loss.

    So do torchdistill's alpha and Keras's `student_loss_weight`; RepDistiller's alpha is the soft loss's weight.
    """
    return alpha * hard + (1 - alpha) * soft


# Beyond this an exponential could overflow float32. KL is as large there, and the plain form has lost nothing.
_LARGEST_EXPONENT = 80.0


@jax.custom_jvp
def _kl(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    temperature: Float[Array, ""],
) -> Float[Array, " batch"]:
    return _kl_parts(student_logits, teacher_logits, temperature).value


@_kl.defjvp
def _kl_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """dKL = (p_s - p_t)·(da - db) + (p_s - p_t - p_t v)·db, with a and b the tempered logits."""
    _, teacher_logits, temperature = primals
    student_tangent, teacher_tangent, temperature_tangent = tangents
    parts = _kl_parts(*primals)
    tempered = (teacher_logits - jnp.max(teacher_logits, axis=-1, keepdims=True)) / temperature
    of_difference = (student_tangent - teacher_tangent - parts.difference * temperature_tangent) / temperature
    of_teacher = (teacher_tangent - tempered * temperature_tangent) / temperature
    tangent = parts.gap * of_difference + (parts.gap - parts.teacher * parts.centred) * of_teacher
    return parts.value, jnp.sum(tangent, axis=-1)


class _KLParts(NamedTuple):
    """KL, p_s - p_t, p_t, the difference of the tempered logits, and that centred, without cancellation."""

    value: Array
    gap: Array
    teacher: Array
    difference: Array
    centred: Array


def _kl_parts(student_logits: Array, teacher_logits: Array, temperature: Array) -> _KLParts:
    student_top = jnp.max(student_logits, axis=-1, keepdims=True)
    teacher_top = jnp.max(teacher_logits, axis=-1, keepdims=True)
    student_tempered = (student_logits - student_top) / temperature
    teacher_tempered = (teacher_logits - teacher_top) / temperature
    # Not the difference of the two lines above, which have rounded each on its own.
    difference = (student_logits - teacher_logits - (student_top - teacher_top)) / temperature
    teacher_normaliser = jnp.log(jnp.sum(jnp.exp(teacher_tempered), axis=-1, keepdims=True))
    teacher_log = teacher_tempered - teacher_normaliser
    student_log = jax.nn.log_softmax(student_tempered)
    teacher = jnp.exp(teacher_log)
    mean = jnp.sum(teacher * difference, axis=-1, keepdims=True)
    # v, and log(p_t e^v).
    centred, weighted_log = difference - mean, student_tempered - teacher_normaliser - mean
    close = jnp.max(weighted_log, axis=-1, keepdims=True) < _LARGEST_EXPONENT
    v = jnp.where(close, centred, 0)
    rare = jnp.exp(jnp.where(close, weighted_log, 0)) - teacher * (1 + v)
    terms = jnp.where(v < 1, teacher * _exp_minus_1_minus_x(jnp.minimum(v, 1)), rare)
    exact = jnp.log1p(jnp.sum(terms, axis=-1, keepdims=True))
    plain = jnp.sum(teacher * (teacher_log - student_log), axis=-1, keepdims=True)
    log_ratio = v - exact
    near = close & (jnp.abs(log_ratio) < 1)
    gap = jnp.where(near, teacher * jnp.expm1(jnp.where(near, log_ratio, 0)), jnp.exp(student_log) - teacher)
    return _KLParts(jnp.where(close, exact, plain)[..., 0], gap, teacher, difference, centred)


def _exp_minus_1_minus_x(x: Array) -> Array:
    """e^x - 1 - x, to rounding also near 0, where the subtraction would lose it."""
    small = jnp.abs(x) < 0.5
    y = jnp.where(small, x, 0)
    series = jnp.ones_like(x)
    for k in range(15, 2, -1):
        series = 1 + y / k * series
    return jnp.where(small, y * y / 2 * series, jnp.expm1(x) - x)
