"""Distillation from a part of a large vocabulary, and between two vocabularies."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kd_jax.errors import ConfigError, ShapeError
from kd_jax.losses.checks import Logits, Scalar, as_logits, as_pair, number
from kd_jax.losses.logits import kd, kl_divergence
from kd_jax.losses.pairs import difference_of, pair, size_of
from kd_jax.losses.targets import log_sum_exp, tempered

RESTS = ("renormalised", "tail", "zero")


def top_k_kl(
    student_logits: Logits, teacher_logits: Logits, *, k: int = 64, temperature: Scalar = 1.0, rest: str = "tail"
) -> Float[Array, "..."]:
    r"""$T^2$ KL over the teacher's k most probable classes K, with the rest in one of three ways.

    "tail": all others are one class, $\sum_K p \log(p / q) + P \log(P / Q)$; never negative, at most `kd`.
    "renormalised": $\hat p = p / \sum_K p$ in place of p, against the student's whole softmax, which is then trained to
    be too sure. "zero": $\sum_K p \log(p / q)$ alone, which may be negative. Public code has all three, under one name.

    k: at most classes. temperature: T > 0. Logits `[..., classes]`. Returns `[...]`.
    """
    student, teacher = as_pair(student_logits, teacher_logits)
    if rest not in RESTS:
        raise ValueError(f'rest {rest!r} is unknown: use "renormalised", "tail" or "zero"')
    if not 1 <= k <= student.shape[-1]:
        raise ConfigError(f"k is {k}: it must be from 1 to {student.shape[-1]}, the number of classes")
    t = number(temperature, student)
    _, top = jax.lax.top_k(teacher, k)
    chosen = jnp.any(top[..., None, :] == _numbers(teacher)[..., :, None], axis=-1)
    if rest == "renormalised":
        return kd(student, jnp.where(chosen, teacher, -jnp.inf), temperature=t)
    if rest == "zero":
        found = pair(student, teacher, t)
        terms = found.p * jnp.where(found.p == 0, 0, found.ratio)
        return -(t**2) * jnp.sum(jnp.where(chosen, terms, 0), axis=-1)

    def with_tail(logits: Array) -> Array:
        logits = tempered(logits, t)
        tail = log_sum_exp(jnp.where(chosen, -jnp.inf, logits))
        return jnp.concatenate([jnp.take_along_axis(logits, top, axis=-1), tail[..., None]], axis=-1)

    return t**2 * kl_divergence(with_tail(student), with_tail(teacher))


def sampled_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    key: Key[Array, ""],
    samples: int = 50,
    power: Scalar = 1.0,
    temperature: Scalar = 1.0,
) -> Float[Array, "..."]:
    r"""Random-sampling KD: an estimate of $T^2 \mathrm{KL}(p \| q)$ from classes drawn from the teacher.

    $T^2 \sum_i w_i \log(p_i / q_i)$ with $w_i = c_i / N$, the counts of N draws with replacement; by the student's
    logits its derivative is $q - w$, on average that of `kd`. Drawn from $p^\tau$, the counts are weighted by
    $p^{1 - \tau}$ and normalised. Anshumann et al. (2025), https://arxiv.org/abs/2503.16870; the paper has the cross
    entropy, which is this without $\log p_i$.

    key: of the draws. samples: N. power: τ > 0. temperature: T > 0. No gradient by the teacher. Returns `[...]`.
    """
    student, teacher = as_pair(student_logits, teacher_logits)
    t = number(temperature, student)
    found = pair(student, jax.lax.stop_gradient(teacher), t)
    tilt = number(power, t)
    possible = ~jnp.isneginf(found.log_p)
    log_p = jnp.where(possible, found.log_p, 0)
    proposal = jnp.where(possible, jnp.exp(tilt * (log_p - jnp.max(found.log_p, axis=-1, keepdims=True))), 0)
    drawn = jax.lax.stop_gradient(_draw(key, proposal, samples))
    weights = jnp.exp((1 - tilt) * jnp.take_along_axis(log_p, drawn, axis=-1))
    terms = -jnp.take_along_axis(found.ratio, drawn, axis=-1)
    return t**2 * jnp.sum(weights * terms, axis=-1) / jnp.sum(weights, axis=-1)


def uld(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Float[Array, "..."]:
    r"""Universal logit distillation between vocabularies: $T^2 \sum_i |p_{(i)} - q_{(i)}|$, both sorted, padded by 0.

    Boizard et al. (2024), https://arxiv.org/abs/2402.12030, equation 5. Which class is which counts for nothing. One
    public copy pairs positions by truncation, and adds tokens up where the mean is meant.

    temperature: T > 0. Logits `[..., classes]`, of numbers of classes of their own. Returns `[...]`.
    """
    student, teacher = as_logits(student_logits, "student logits"), as_logits(teacher_logits, "teacher logits")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ in their positions: "
            "align them first"
        )
    padding = max(student.shape[-1], teacher.shape[-1])
    student, teacher = as_pair(*(_padded(z, padding) for z in (student, teacher)))
    t = number(temperature, student)
    # Sorted logits are the logits of the sorted probabilities.
    found = pair(jnp.sort(student, axis=-1), jnp.sort(teacher, axis=-1), t)
    return t**2 * jnp.sum(size_of(difference_of(found)), axis=-1)


def _padded(logits: Array, classes: int) -> Array:
    missing = classes - logits.shape[-1]
    return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)


def _numbers(logits: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _draw(key: Array, mass: Array, samples: int) -> Array:
    """Classes in proportion to their mass, `[..., samples]`; none whose mass is 0."""
    rows = mass.reshape(-1, mass.shape[-1])
    cumulative = jnp.cumsum(rows, axis=-1)
    total = cumulative[:, -1:]
    at = jnp.minimum(jax.random.uniform(key, (rows.shape[0], samples), mass.dtype) * total, jnp.nextafter(total, 0))
    found = jax.vmap(lambda row, points: jnp.searchsorted(row, points, side="right"))(cumulative, at)
    return found.reshape(*mass.shape[:-1], samples)
