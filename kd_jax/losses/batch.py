"""Losses that couple the examples of a batch: `[batch, classes]` -> `[batch]`, whose mean is the paper's loss.

`weights`, `[batch]`, says how much an example counts: one of weight 0 is absent, whatever stands there. The mean is
then sum(weights × values) / sum(weights). All of them see the whole batch: over several devices, the global one.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from kd_jax.errors import ShapeError
from kd_jax.losses.checks import Logits, Scalar, as_pair, number
from kd_jax.losses.logits import kd
from kd_jax.losses.pairs import difference_of, pair

Weights = Shaped[Array | np.ndarray, "..."]


def dist(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    beta: Scalar = 1.0,
    gamma: Scalar = 1.0,
    temperature: Scalar = 1.0,
    weights: Weights | None = None,
) -> Float[Array, " batch"]:
    r"""Correlations in place of a KL: $T^2 [\beta (1 - \bar\rho_{rows}) + \gamma (1 - \bar\rho_{columns})]$.

    ρ is Pearson's correlation of the two softmaxes, of a row over the classes, of a column over the batch. Two that do
    not vary correlate fully, one alone not at all. Huang et al. (2022), https://arxiv.org/abs/2205.10536, equation 9.
    The factor T² is in the authors' code, not in the paper's appendix. Public code adds 1e-8 to the norms.

    beta, gamma: weights. temperature: T > 0. weights: `[batch]`. Logits `[batch, classes]`, two examples at least.
    """
    student, teacher, w = _of_batch(student_logits, teacher_logits, weights)
    if student.shape[0] == 1:
        raise ShapeError("a batch of 1 has no correlation over its examples: dist needs 2 at least")
    t = number(temperature, student)
    found = pair(student, teacher, t)
    rows = _decorrelation(found.p, found.q, jnp.ones_like(found.p), axis=-1)
    columns = _decorrelation(found.p, found.q, jnp.broadcast_to(w[:, None], found.p.shape), axis=0)
    return t**2 * (number(beta, t) * rows + number(gamma, t) * jnp.mean(columns))


def mlkd(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Scalar | Sequence[Scalar] = (2.0, 3.0, 4.0, 5.0, 6.0),
    weights: Weights | None = None,
) -> Float[Array, " batch"]:
    r"""Multi-level KD: $\sum_T T^2 \mathrm{KL} + \|G_b(p) - G_b(q)\|^2 / B + \|G_c(p) - G_c(q)\|^2 / K$.

    $G_b = P P^\top$ are the products of the examples of the batch, $G_c = P^\top P$ those of the classes. Jin et al.
    (2023), CVPR, Multi-level logit distillation. Of one view: the paper adds this over a weak and a strong one. In
    public code the mask of the confident only scales, and two temperatures take the weak view's logits for the strong.

    temperature: one or several T > 0. weights: `[batch]`. Logits `[batch, classes]`. Returns `[batch]`.
    """
    student, teacher, w = _of_batch(student_logits, teacher_logits, weights)
    values = jnp.zeros(student.shape[:1], student.dtype)
    for one in temperature if isinstance(temperature, Sequence) else (temperature,):
        found = pair(student, teacher, number(one, student))
        p, q, apart = found.p, found.q, difference_of(found)
        # P Pᵀ - Q Qᵀ without the difference of two that are nearly equal.
        by_batch = _product(p, apart.T) + _product(apart, q.T)
        by_class = _product((w[:, None] * p).T, apart) + _product((w[:, None] * apart).T, q)
        values += kd(student, teacher, temperature=one)
        values += jnp.sum(w[None, :] * by_batch**2, axis=-1) + jnp.sum(by_class**2) / student.shape[-1]
    return values


def _of_batch(student_logits: Logits, teacher_logits: Logits, weights: Weights | None) -> tuple[Array, Array, Array]:
    """Logits, 0 in absent rows, and the weights, of which the mean over the examples that are present is 1."""
    student, teacher = as_pair(student_logits, teacher_logits)
    if student.ndim != 2:
        raise ShapeError(
            f"logits {list(student.shape)} must be [batch, classes], since this loss couples examples: reshape them"
        )
    if weights is None:
        return student, teacher, jnp.ones(student.shape[:1], student.dtype)
    w = jnp.asarray(weights)
    if w.shape != student.shape[:1]:
        raise ShapeError(f"weights {list(w.shape)} do not fit logits {list(student.shape)}: give one for each example")
    w, present = w.astype(student.dtype), w != 0
    total = jnp.sum(w)
    w = w * jnp.sum(present).astype(w.dtype) / jnp.where(total == 0, 1, total)
    return jnp.where(present[:, None], student, 0), jnp.where(present[:, None], teacher, 0), w


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _decorrelation(p: Array, q: Array, w: Array, axis: int) -> Array:
    """1 - ρ as half the squared distance of the two standardised vectors, which does not cancel."""
    (a, a_varies), (b, b_varies) = _standardised(p, w, axis), _standardised(q, w, axis)
    apart = jnp.sum(w * (a - b) ** 2, axis=axis) / 2
    return jnp.where(a_varies & b_varies, apart, jnp.where(a_varies | b_varies, 1, 0))


def _standardised(x: Array, w: Array, axis: int) -> tuple[Array, Array]:
    """Centred, and of weighted norm 1; 0 and False where nothing varies."""
    total = jnp.sum(w, axis=axis, keepdims=True)
    centred = x - jnp.sum(w * x, axis=axis, keepdims=True) / jnp.where(total == 0, 1, total)
    # Squares of small probabilities vanish: what is largest is 1.
    largest = jax.lax.stop_gradient(jnp.max(jnp.where(w == 0, 0, jnp.abs(centred)), axis=axis, keepdims=True))
    # What rounding leaves of equal numbers is no variation.
    size = jax.lax.stop_gradient(jnp.max(jnp.where(w == 0, 0, jnp.abs(x)), axis=axis, keepdims=True))
    varies = largest > 4 * jnp.finfo(x.dtype).eps * size
    scaled = jnp.where(varies, centred / jnp.where(varies, largest, 1), 0)
    square = jnp.sum(w * scaled**2, axis=axis, keepdims=True)
    return scaled / jnp.sqrt(jnp.where(varies, square, 1)), jnp.squeeze(varies, axis)
