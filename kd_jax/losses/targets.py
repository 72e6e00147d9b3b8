"""Distillation that looks at the label's class apart from the others: `[..., classes]` and labels `[...]` -> `[...]`.

p is the teacher's softmax(z_t / T), q the student's softmax(z_s / T), y the label. A label outside [0, classes) gives
NaN and no gradient, as in `cross_entropy`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.errors import ShapeError
from kd_jax.losses.checks import Labels, Logits, Scalar, as_labels, as_pair, is_label, number
from kd_jax.losses.labels import soft_cross_entropy
from kd_jax.losses.logits import kd, kl_divergence
from kd_jax.losses.pairs import Pair, difference_of, distribution, pair, relative_entropy


def dkd(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Labels,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
) -> Float[Array, "..."]:
    r"""Decoupled KD: $\alpha \, \mathrm{TCKD} + \beta \, \mathrm{NCKD}$, each a KL times T².

    TCKD is the KL of $[p_y, 1 - p_y]$, NCKD that of the softmaxes without the label's class; kd is TCKD +
    $(1 - p_y)$ NCKD. Zhao et al. (2022), https://arxiv.org/abs/2203.08679, equation 7. Public code takes the logarithm
    of a summed softmax, which may be 0, and hides the label's class by -1000.

    alpha, beta: weights. temperature: T > 0. Returns `[...]`.
    """
    student, teacher, label, known = with_labels(student_logits, teacher_logits, labels)
    t = number(temperature, student)
    target = t**2 * _against_others(pair(student, teacher, t), label, label)
    some, *others = of_others(student, teacher, label)
    of_rest = jnp.where(some, kd(*others, temperature=t), 0)
    return where_known(known, number(alpha, t) * target + number(beta, t) * of_rest)


def nkd(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Labels,
    *,
    gamma: Scalar = 1.5,
    temperature: Scalar = 1.0,
) -> Float[Array, "..."]:
    r"""Normalised KD: $-p_y \log q_y$ at T = 1, and $-\gamma T^2 \sum_{k \neq y} \hat p_k \log \hat q_k$ at T.

    The hats are the softmaxes without the label's class. Both terms are cross entropies, not KLs: equal networks do not
    give 0. Yang et al. (2023), https://arxiv.org/abs/2303.13005.

    gamma: weight of the other classes. temperature: T > 0. Returns `[...]`.
    """
    student, teacher, label, known = with_labels(student_logits, teacher_logits, labels)
    t = number(temperature, student)
    p, _ = distribution(teacher, jnp.ones_like(t))
    target = soft_cross_entropy(student, jnp.where(label, p, 0))
    some, *others = of_others(student, teacher, label)
    student, teacher = (tempered(z, t) for z in others)
    of_rest = jnp.where(some, soft_cross_entropy(student, distribution(teacher, jnp.ones_like(t))[0]), 0)
    return where_known(known, target + number(gamma, t) * t**2 * of_rest)


def ttm(student_logits: Logits, teacher_logits: Logits, *, gamma: Scalar = 0.1) -> Float[Array, "..."]:
    r"""Transformed teacher matching: $\mathrm{KL}(p^\gamma / \sum_j p_j^\gamma \,\|\, q)$, the student at T = 1.

    Zheng and Yang (2024), https://arxiv.org/abs/2402.11148. γ is 1/T of the teacher; no T².

    gamma: γ > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    student, teacher = as_pair(student_logits, teacher_logits)
    return kl_divergence(student, _times(teacher, number(gamma, student)))


def wttm(student_logits: Logits, teacher_logits: Logits, *, gamma: Scalar = 0.1) -> Float[Array, "..."]:
    r"""`ttm`, each position weighted by $\sum_j p_j^\gamma$, which is large where the teacher is unsure.

    Zheng and Yang (2024), https://arxiv.org/abs/2402.11148, equation 13.

    gamma: γ > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    student, teacher = as_pair(student_logits, teacher_logits)
    power = number(gamma, student)
    _, log_p = distribution(teacher, jnp.ones_like(power))
    weight = jnp.sum(jnp.where(jnp.isneginf(log_p), 0, jnp.exp(_times(log_p, power))), axis=-1)
    return weight * kl_divergence(student, _times(teacher, power))


def rld(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Labels,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
) -> Float[Array, "..."]:
    r"""Refined logit distillation, for teachers that are wrong: two KLs, each times T².

    α weighs that of $[p_{max}, 1 - p_{max}]$ and $[q_y, 1 - q_y]$: the student is to be as sure of the label as the
    teacher is of its top class. β weighs that of the softmaxes over the classes whose teacher's logit is below the
    label's; 0 where there is none. Sun et al. (2025), https://arxiv.org/abs/2408.07666. Public code hides by -1e9.

    alpha, beta: weights. temperature: T > 0. Returns `[...]`.
    """
    student, teacher, label, known = with_labels(student_logits, teacher_logits, labels)
    t = number(temperature, student)
    top = jnp.argmax(teacher, axis=-1, keepdims=True)
    is_top = top == jax.lax.broadcasted_iota(top.dtype, teacher.shape, teacher.ndim - 1)
    confidence = t**2 * _against_others(pair(student, teacher, t), label, is_top)
    below = teacher < jnp.sum(jnp.where(label, teacher, 0), axis=-1, keepdims=True)
    some, *lower = of_others(student, teacher, ~below)
    of_rest = jnp.where(some, kd(*lower, temperature=t), 0)
    return where_known(known, number(alpha, t) * confidence + number(beta, t) * of_rest)


def ofa(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Labels,
    *,
    gamma: Scalar = 1.0,
    temperature: Scalar = 1.0,
) -> Float[Array, "..."]:
    r"""One-for-all KD: $-T^2 \sum_k [(p_k + 1_{k = y})^\gamma - 1_{k = y}] \log q_k$ of one head's logits.

    Hao et al. (2023), https://arxiv.org/abs/2310.19444, equation 5. A cross entropy: equal networks do not give 0, and
    γ = 1 is that of p. Public code takes the logarithm of a softmax, and no T².

    gamma: γ >= 1, 1 to 1.5 in the paper. temperature: T > 0. Returns `[...]`.
    """
    student, teacher, label, known = with_labels(student_logits, teacher_logits, labels)
    t, power = number(temperature, student), number(gamma, student)
    p, log_p = distribution(teacher, t)
    of_label = jnp.expm1(power * jnp.log1p(p))
    of_others = jnp.where(p == 0, 0, jnp.exp(power * jnp.where(p == 0, 0, log_p)))
    return where_known(known, t**2 * soft_cross_entropy(tempered(student, t), jnp.where(label, of_label, of_others)))


def virtual_teacher(
    logits: Logits, labels: Labels, *, probability: Scalar = 0.99, temperature: Scalar = 20.0
) -> Float[Array, "..."]:
    r"""`kd` from a teacher who is right with the same probability everywhere: $p_y = a$, else $(1 - a) / (K - 1)$.

    Yuan et al. (2020), https://arxiv.org/abs/1909.11723, Tf-KD with a designed teacher. Public code takes the softmax
    of these probabilities divided by T, and leaves the student at T = 1.

    logits: `[..., classes]`. labels: `[...]`. probability: a in (0, 1). temperature: T > 0. Returns `[...]`.
    """
    student, _, label, known = with_labels(logits, logits, labels)
    a = number(probability, student)
    rest = jnp.log1p(-a) - jnp.log(jnp.asarray(student.shape[-1] - 1, student.dtype))
    return where_known(known, kd(student, jnp.where(label, jnp.log(a), rest), temperature=temperature))


def with_labels(student_logits: Logits, teacher_logits: Logits, labels: Labels) -> tuple[Array, Array, Array, Array]:
    """Both logits, 0 where the label is unknown; whether a class is the label; and whether it is known, `[...]`."""
    student, teacher = as_pair(student_logits, teacher_logits)
    if student.shape[-1] < 2:
        raise ShapeError(f"logits {list(student.shape)} have one class, and this loss compares the label's with others")
    label = is_label(as_labels(labels, student), student)
    known = jnp.any(label, axis=-1, keepdims=True)
    # Where it is unknown the first class stands in, so that no row is without one.
    label = jnp.where(known, label, is_label(jnp.zeros(student.shape[:-1], jnp.int32), student))
    return jnp.where(known, student, 0), jnp.where(known, teacher, 0), label, known[..., 0]


def where_known(known: Array, values: Array) -> Array:
    """NaN where the label is unknown."""
    return jnp.where(known, values, jnp.nan)


def without(logits: Array, label: Array) -> Array:
    """Logits of the other classes; the label's is ruled out."""
    return jnp.where(label, -jnp.inf, logits)


def of_others(student: Array, teacher: Array, left_out: Array) -> tuple[Array, Array, Array]:
    """Whether the teacher leaves any other class, `[...]`; and both logits of the others, 0 where it leaves none.

    Classes that are all ruled out have no softmax.
    """
    some = jnp.any(~left_out & ~jnp.isneginf(teacher), axis=-1, keepdims=True)
    student, teacher = (jnp.where(some, without(z, left_out), 0) for z in (student, teacher))
    return some[..., 0], student, teacher


def _times(logits: Array, factor: Array) -> Array:
    """A product that keeps what is ruled out, also at a factor of 0, and whose derivative does."""
    ruled_out = jnp.isneginf(logits)
    return jnp.where(ruled_out, -jnp.inf, jnp.where(ruled_out, 0, logits) * factor)


def tempered(logits: Array, temperature: Array) -> Array:
    """A quotient that keeps what is ruled out, and whose derivative by the temperature does."""
    ruled_out = jnp.isneginf(logits)
    return jnp.where(ruled_out, -jnp.inf, jnp.where(ruled_out, 0, logits) / temperature)


def _against_others(found: Pair, of_student: Array, of_teacher: Array) -> Array:
    """The KL of [p, 1 - p] and [q, 1 - q], for a class of the teacher's and one of the student's."""

    def chosen(x: Array, which: Array) -> Array:
        return jnp.sum(jnp.where(which, x, 0), axis=-1)

    def others(x: Array, which: Array) -> Array:
        return jnp.sum(jnp.where(which, 0, x), axis=-1)

    log_p, log_q = chosen(found.log_p, of_teacher), chosen(found.log_q, of_student)
    log_rest_p, log_rest_q = (
        log_sum_exp(without(x, which)) for x, which in ((found.log_p, of_teacher), (found.log_q, of_student))
    )
    same = jnp.any(of_student & of_teacher, axis=-1)
    ratio = jnp.where(same, chosen(found.ratio, of_student), _difference(log_q, log_p))
    rest_p, rest_q = others(found.p, of_teacher), others(found.q, of_student)
    # Where the two are close, the logarithm of (1 - q) / (1 - p) is not the difference of two logarithms.
    apart = others(difference_of(found), of_student)
    near = same & (jnp.abs(apart) < rest_p / 2)
    slight = jnp.log1p(jnp.where(near, apart, 0) / jnp.where(near, rest_p, 1))
    rest_ratio = jnp.where(near, slight, _difference(log_rest_q, log_rest_p))
    p, q = jnp.stack([chosen(found.p, of_teacher), rest_p], -1), jnp.stack([chosen(found.q, of_student), rest_q], -1)
    return relative_entropy(p, q, jnp.stack([ratio, rest_ratio], -1))


def _difference(a: Array, b: Array) -> Array:
    """a - b of logarithms; 0 where both are -inf."""
    both = jnp.isneginf(a) & jnp.isneginf(b)
    return jnp.where(both, 0, a) - jnp.where(both, 0, b)


def log_sum_exp(logits: Array) -> Array:
    """-inf, with no derivative, where all classes are ruled out."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    some = ~jnp.isneginf(top)
    odds = jnp.exp(jnp.where(some, logits, 0) - jnp.where(some, top, 0))
    return jnp.where(some, top + jnp.log(jnp.sum(odds, axis=-1, keepdims=True)), -jnp.inf)[..., 0]
