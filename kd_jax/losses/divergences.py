"""Divergences between a teacher's and a student's distribution: `[..., classes]` -> `[...]`, in nats, T² included.

p is the teacher's softmax(z_t / T), q the student's softmax(z_s / T).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.errors import ConfigError
from kd_jax.losses.checks import Logits, Scalar, as_pair, number
from kd_jax.losses.mixing import mix
from kd_jax.losses.pairs import as_distributions, counted, difference_of, log_mixture, relative_entropy, size_of


def reverse_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Float[Array, "..."]:
    r"""The reverse KL, which seeks the teacher's modes: $T^2 \, \mathrm{KL}(q \,\|\, p)$.

    Gu et al. (2024), MiniLLM, https://arxiv.org/abs/2306.08543. +inf where the student has a class that the teacher
    rules out. One public trainer has its sign reversed in a branch.

    temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    pair, t = as_distributions(student_logits, teacher_logits, temperature)
    return t**2 * relative_entropy(pair.q, pair.p, -pair.ratio)


def symmetric_kl(
    student_logits: Logits, teacher_logits: Logits, *, skew: Scalar = 0.9, temperature: Scalar = 1.0
) -> Float[Array, "..."]:
    r"""Both KLs: $T^2 [(1 - \lambda) \, \mathrm{KL}(p \,\|\, q) + \lambda \, \mathrm{KL}(q \,\|\, p)]$.

    `skew` is λ, the weight of the reverse KL, 0.9 as in DistiLLM's code, https://arxiv.org/abs/2402.03898. Public code
    takes the cross entropy for the first term: the same gradient, another value.

    skew: in [0, 1]. temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    pair, t = as_distributions(student_logits, teacher_logits, temperature)
    share = number(skew, t)
    forward, reverse = counted(pair, 1 - share), counted(pair, share)
    return t**2 * mix(
        relative_entropy(reverse.q, reverse.p, -reverse.ratio),
        relative_entropy(forward.p, forward.q, forward.ratio),
        alpha=share,
    )


def skew_kl(
    student_logits: Logits, teacher_logits: Logits, *, skew: Scalar = 0.1, temperature: Scalar = 1.0
) -> Float[Array, "..."]:
    r"""The KL to a mixture with the student: $T^2 \, \mathrm{KL}(p \,\|\, \lambda p + (1 - \lambda) q)$.

    Ko et al. (2024), DistiLLM, https://arxiv.org/abs/2402.03898, section 3.1. Finite for every student where λ > 0.
    Public code returns the cross entropy, without the teacher's entropy.

    skew: λ in [0, 1]; 0 is the forward KL, 1 is 0. temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    pair, t = as_distributions(student_logits, teacher_logits, temperature)
    share = number(skew, t)
    return t**2 * _to_mixture(pair.p, pair.q, pair.ratio, share)


def skew_reverse_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    skew: Scalar = 0.1,
    temperature: Scalar = 1.0,
    detached: bool = False,
) -> Float[Array, "..."]:
    r"""The reverse KL to a mixture with the teacher: $T^2 \, \mathrm{KL}(q \,\|\, \lambda q + (1 - \lambda) p)$.

    Ko et al. (2024), DistiLLM, https://arxiv.org/abs/2402.03898, section 3.1. DistiLLM-2's code stops the gradient of
    the q inside the mixture: the same value, another gradient; `detached=True` is that.

    skew: λ in [0, 1]; 0 is the reverse KL, 1 is 0. temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    pair, t = as_distributions(student_logits, teacher_logits, temperature)
    share = number(skew, t)
    if not detached:
        return t**2 * _to_mixture(pair.q, pair.p, -pair.ratio, share)
    # 0, with the derivative of -log q.
    held = jnp.where(jnp.isneginf(pair.log_q), 0, jax.lax.stop_gradient(pair.log_q) - pair.log_q)
    fixed = jax.lax.stop_gradient(pair.q)
    ratio = log_mixture(-(pair.ratio + held), share, 1 - share) + held
    return t**2 * relative_entropy(pair.q, share * fixed + (1 - share) * pair.p, ratio)


def jsd(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
    convention: str = "paper",
) -> Float[Array, "..."]:
    r"""Generalised Jensen-Shannon divergence, with $m = \beta p + (1 - \beta) q$, times T².

    "paper": $\beta \, \mathrm{KL}(p \| m) + (1 - \beta) \, \mathrm{KL}(q \| m)$, Agarwal et al. (2024),
    https://arxiv.org/abs/2306.13649, equation 1; it goes to 0 at both ends. "continuous":
    $(1 - \beta) \, \mathrm{KL}(p \| m) + \beta \, \mathrm{KL}(q \| m)$, which is KL(p‖q) at 0 and KL(q‖p) at 1.
    Public code takes the paper's form and puts the two KLs at its ends, where it then jumps.

    beta: in [0, 1]; at 0.5 the two agree. temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    if convention not in ("paper", "continuous"):
        raise ConfigError(f'convention {convention!r} is unknown: use "paper" or "continuous"')
    pair, t = as_distributions(student_logits, teacher_logits, temperature)
    share = number(beta, t)
    weight = share if convention == "paper" else 1 - share
    teachers, students = counted(pair, weight), counted(pair, 1 - weight)
    of_teacher = _to_mixture(teachers.p, teachers.q, teachers.ratio, share)
    of_student = _to_mixture(students.q, students.p, -students.ratio, 1 - share)
    return t**2 * mix(of_teacher, of_student, alpha=weight)


def adaptive_kl(
    student_logits: Logits, teacher_logits: Logits, *, mu: Scalar = 0.5, temperature: Scalar = 1.0
) -> Float[Array, "..."]:
    r"""Forward and reverse KL, weighed by where they differ: $T^2 [g_h \mathrm{KL}(p\|q) + g_t \mathrm{KL}(q\|p)]$.

    Wu et al. (2025), https://arxiv.org/abs/2404.02657. The head is the teacher's most probable class and those whose
    cumulative probability, in descending order, is at most `mu`; $g_h$ and $g_t$ are the shares of the head and the
    tail in $\sum |p - q|$, without gradient. Public copies sort ascending, or mask unsorted differences.

    mu: in [0, 1]. temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    pair, t = as_distributions(student_logits, teacher_logits, temperature)
    p, apart = (jax.lax.stop_gradient(x) for x in (pair.p, size_of(difference_of(pair))))
    order = jnp.argsort(-p, axis=-1, stable=True)
    first = jax.lax.broadcasted_iota(jnp.int32, p.shape, p.ndim - 1) == 0
    head = first | (jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1) <= number(mu, t))
    total = jnp.sum(apart, axis=-1)
    in_head = jnp.sum(jnp.where(head, jnp.take_along_axis(apart, order, axis=-1), 0), axis=-1)
    share = jnp.where(total == 0, 0.5, in_head / jnp.where(total == 0, 1, total))
    heads, tails = counted(pair, share), counted(pair, 1 - share)
    forward, reverse = relative_entropy(heads.p, heads.q, heads.ratio), relative_entropy(tails.q, tails.p, -tails.ratio)
    return t**2 * (share * forward + (1 - share) * reverse)


def total_variation(
    student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0
) -> Float[Array, "..."]:
    r"""Total variation: $\frac{T^2}{2} \sum_k |p_k - q_k|$, in [0, T²]. Wen et al. (2023), arXiv:2307.15190.

    Its derivative where p = q is 0. Some public code leaves out the half.

    temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    pair, t = as_distributions(student_logits, teacher_logits, temperature)
    return t**2 * jnp.sum(size_of(difference_of(pair)), axis=-1) / 2


def logit_mse(student_logits: Logits, teacher_logits: Logits) -> Float[Array, "..."]:
    r"""Logit matching: the mean over the classes of $(z_s - z_t)^2$.

    Ba and Caruana (2014), https://arxiv.org/abs/1312.6184; Kim et al. (2021), arXiv:2105.08919. Not blind to shifts.
    Classes that both rule out (-inf) are left out. Others write half the sum: that is classes / 2 times this.

    Logits `[..., classes]`. Returns `[...]`.
    """
    student, teacher = as_pair(student_logits, teacher_logits)
    both = jnp.isneginf(student) & jnp.isneginf(teacher)
    apart = jnp.where(both, 0, student) - jnp.where(both, 0, teacher)
    count = jnp.sum(jnp.where(both, 0, jnp.ones_like(student)), axis=-1)
    return jnp.sum(apart * apart, axis=-1) / jnp.maximum(count, 1)


def _to_mixture(p: Array, q: Array, ratio: Array, share: Array) -> Array:
    """KL(p ‖ share p + (1 - share) q) from ratio = log(q / p)."""
    return relative_entropy(p, share * p + (1 - share) * q, log_mixture(ratio, share, 1 - share))
