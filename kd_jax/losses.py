"""Logit losses: pure functions, one value per example."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = float | Float[Array, ""]


def cross_entropy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    r"""Cross entropy of integer labels, the hard loss: $-\log \mathrm{softmax}(z)_y$, in nats.

    logits: z, `[batch, classes]`. labels: y in [0, classes), `[batch]`; one outside gives NaN.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1, mode="fill", fill_value=jnp.nan)
    return -picked[:, 0]


def kl_divergence(
    student_logits: Float[Array, "batch classes"], teacher_logits: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    r"""$\mathrm{KL}(p_t \,\|\, p_s) = \sum_k p_{t,k} (\log p_{t,k} - \log p_{s,k})$ of softmaxes, in nats.

    The difference of two log-softmaxes loses every digit where the distributions are close, as they are at a high
    temperature. With $v = z_s - z_t - \sum_k p_t (z_s - z_t)$, whose mean under the teacher is 0, the same value is
    $\log(1 + \sum_k p_t (e^v - 1 - v))$: a sum of terms that are never negative, exact to rounding at any distance.

    Returns `[batch]`.
    """
    return _kl(student_logits - teacher_logits, teacher_logits)


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
    return _kl((student_logits - teacher_logits) / temperature, teacher_logits / temperature)


def kd(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    *,
    temperature: Scalar,
) -> Float[Array, " batch"]:
    r"""The soft loss of Hinton, Vinyals and Dean (2015), section 2: $T^2 \, \mathrm{KL}(p_t^T \,\|\, p_s^T)$, in nats.

    The factor T² keeps the gradient's size the same at every temperature. As T grows it becomes logit matching,
    half the mean over the classes of the squared difference of centred logits.

    temperature: T > 0. Returns `[batch]`.
    """
    return temperature**2 * distillation_kl(student_logits, teacher_logits, temperature=temperature)


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
    student = jax.nn.softmax(student_logits / temperature)
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def mix(hard: Float[Array, " batch"], soft: Float[Array, " batch"], *, alpha: Scalar) -> Float[Array, " batch"]:
    r"""The weighted sum $\alpha \, \mathrm{hard} + (1 - \alpha) \, \mathrm{soft}$: `alpha` weighs the hard loss."""
    return alpha * hard + (1 - alpha) * soft


# Beyond this the exponential of v could overflow float32; there KL is large, and the plain form has lost nothing.
_LARGEST_EXPONENT = 80.0


@jax.custom_jvp
def _kl(
    difference: Float[Array, "batch classes"], teacher_logits: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """KL of the student whose logits are the teacher's plus `difference`."""
    return _kl_parts(difference, teacher_logits)[0]


@_kl.defjvp
def _kl_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """dKL = (p_s - p_t)·du + (p_s - p_t - p_t v)·dz_t, with u the difference and v the centred one."""
    value, gap, teacher, centred = _kl_parts(*primals)
    difference_tangent, teacher_tangent = tangents
    tangent = gap * difference_tangent + (gap - teacher * centred) * teacher_tangent
    return value, jnp.sum(tangent, axis=-1)


def _kl_parts(difference: Array, teacher_logits: Array) -> tuple[Array, Array, Array, Array]:
    """KL, p_s - p_t, p_t and the centred difference v, without cancellation."""
    teacher_log = jax.nn.log_softmax(teacher_logits)
    teacher = jnp.exp(teacher_log)
    centred = difference - jnp.sum(teacher * difference, axis=-1, keepdims=True)
    close = jnp.max(centred, axis=-1, keepdims=True) < _LARGEST_EXPONENT
    v = jnp.where(close, centred, 0)
    exact = jnp.log1p(jnp.sum(teacher * _exp_minus_1_minus_x(v), axis=-1, keepdims=True))
    student_log = jax.nn.log_softmax(teacher_logits + difference)
    plain = jnp.sum(teacher * (teacher_log - student_log), axis=-1, keepdims=True)
    log_ratio = v - exact
    near = close & (jnp.abs(log_ratio) < 1)
    gap = jnp.where(near, teacher * jnp.expm1(jnp.where(near, log_ratio, 0)), jnp.exp(student_log) - teacher)
    return jnp.where(close, exact, plain)[..., 0], gap, teacher, centred


def _exp_minus_1_minus_x(x: Array) -> Array:
    """e^x - 1 - x, to rounding also near 0, where the subtraction would lose it."""
    small = jnp.abs(x) < 0.5
    y = jnp.where(small, x, 0)
    series = jnp.ones_like(x)
    for k in range(15, 2, -1):
        series = 1 + y / k * series
    return jnp.where(small, y * y / 2 * series, jnp.expm1(x) - x)
