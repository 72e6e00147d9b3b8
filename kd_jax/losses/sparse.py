"""Distillation from a part of a large vocabulary, and between two vocabularies."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from kd_jax.errors import ConfigError, ShapeError
from kd_jax.losses.checks import Logits, Scalar, as_logits, as_pair, number
from kd_jax.losses.logits import kd, kl_divergence
from kd_jax.losses.pairs import difference_of, pair, size_of
from kd_jax.losses.targets import log_sum_exp, tempered

RESTS = ("renormalised", "tail", "zero")

Numbers = Shaped[Array, "..."]


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
        raise ConfigError(f'rest {rest!r} is unknown: use "renormalised", "tail" or "zero"')
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


def top_k_targets(
    student_logits: Logits,
    classes: Numbers,
    log_probabilities: Numbers,
    log_rest: Numbers,
    *,
    k: int | None = None,
    temperature: Scalar = 1.0,
    rest: str = "tail",
) -> Float[Array, "..."]:
    r"""`top_k_kl` by a teacher of whom the k most probable classes alone are known, without the logits of the others.

    classes, log_probabilities: `[..., k]`, the most probable first; of a softmax over all classes at temperature 1.
    log_rest: $\log P$ of all others, `[...]`. k: how many of them to use; None for all, and the others join the rest.
    temperature: T > 0, and 1 unless `rest` is "renormalised": what the others sum to at another one is not known, so
        that the loss is NaN there. No gradient by the teacher. Returns `[...]`.
    """
    student = as_logits(student_logits, "student logits")
    if rest not in RESTS:
        raise ConfigError(f'rest {rest!r} is unknown: use "renormalised", "tail" or "zero"')
    shapes = (classes.shape, log_probabilities.shape, (*log_rest.shape, classes.shape[-1]))
    if set(shapes) != {(*student.shape[:-1], classes.shape[-1])}:
        raise ShapeError(
            f"classes {list(classes.shape)}, log-probabilities {list(log_probabilities.shape)} and log-rests "
            f"{list(log_rest.shape)} do not fit logits {list(student.shape)}: give [..., k], [..., k] and [...]"
        )
    known = classes.shape[-1]
    if k is not None and not 1 <= k <= known:
        raise ConfigError(f"k is {k}: it must be from 1 to {known}, the number of classes that are known")
    t = number(temperature, student)
    log_p, tail = (jax.lax.stop_gradient(x).astype(student.dtype) for x in (log_probabilities, log_rest))
    if k is not None and k < known:
        tail = jnp.logaddexp(tail, log_sum_exp(log_p[..., k:]))
        classes, log_p = classes[..., :k], log_p[..., :k]
    if rest == "tail":
        teacher = jnp.concatenate([log_p, tail[..., None]], axis=-1)
        ours = _with_tail(student, classes)
        if classes.shape[-1] == student.shape[-1]:
            teacher = log_p
        return jnp.where(t == 1, kl_divergence(ours, teacher), jnp.nan)
    log_q = jax.nn.log_softmax(student / t, axis=-1)
    log_q = jnp.take_along_axis(log_q, classes, axis=-1)
    if rest == "zero":
        return jnp.where(t == 1, _cross(jnp.exp(log_p), log_p - log_q), jnp.nan)
    log_p = jax.nn.log_softmax(log_p / t, axis=-1)
    return t**2 * _cross(jnp.exp(log_p), log_p - log_q)


def sampled_targets(student_logits: Logits, classes: Numbers, weights: Numbers) -> Float[Array, "..."]:
    r"""Cross entropy with sampled targets, $-\sum_i w_i \log q_i$, at temperature 1; by the logits q Σw − w.

    Where the mean of w over the draws is the teacher's p, as of w = counts / N, its gradient is on average that of
    `kd` at temperature 1, and its value that of `kd` plus the teacher's entropy. Anshumann et al. (2025),
    https://arxiv.org/abs/2503.16870.

    classes: `[..., distinct]`. weights: as classes; what has the weight 0 is as if it were absent. No gradient by
    them. Returns `[...]`.
    """
    student = as_logits(student_logits, "student logits")
    if classes.shape != weights.shape or classes.shape[:-1] != student.shape[:-1]:
        raise ShapeError(
            f"classes {list(classes.shape)} and weights {list(weights.shape)} do not fit logits {list(student.shape)}: "
            "give [..., distinct] of both"
        )
    w = jax.lax.stop_gradient(weights).astype(student.dtype)
    log_q = jnp.take_along_axis(jax.nn.log_softmax(student, axis=-1), classes, axis=-1)
    return -_cross(w, log_q)


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
    places = jax.random.uniform(key, (*proposal.shape[:-1], samples), proposal.dtype)
    drawn = drawn_at(jax.lax.stop_gradient(proposal), places)
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


def _with_tail(logits: Array, classes: Array) -> Array:
    """The logits of some classes, and behind them the logarithm of what the others sum to, if there are any."""
    own = jnp.take_along_axis(logits, classes, axis=-1)
    if classes.shape[-1] == logits.shape[-1]:
        return own
    others = jnp.put_along_axis(logits, classes, jnp.full(own.shape, -jnp.inf, own.dtype), axis=-1, inplace=False)
    return jnp.concatenate([own, log_sum_exp(others)[..., None]], axis=-1)


def _cross(weights: Array, values: Array) -> Array:
    """The sum of weight times value; what has the weight 0 may be infinite."""
    absent = weights == 0
    return jnp.sum(jnp.where(absent, 0, weights * jnp.where(absent, 0, values)), axis=-1)


def drawn_at(mass: Array, places: Array) -> Array:
    """Classes at places in [0, 1) of their masses' running share, `[..., draws]`; none whose mass is 0.

    mass: `[..., classes]`. places: `[..., draws]`; uniform ones draw in proportion to the masses.
    """
    rows = mass.reshape(-1, mass.shape[-1])
    cumulative = rising(rows)
    total = cumulative[:, -1:]
    at = jnp.minimum(places.reshape(rows.shape[0], -1) * total, jnp.nextafter(total, 0))
    found = jax.vmap(lambda row, points: jnp.searchsorted(row, points, side="right"))(cumulative, at)
    return found.reshape(*mass.shape[:-1], places.shape[-1])


def rising(mass: Array) -> Array:
    """The running sums over the last axis, which rise at a mass above 0 alone: XLA's sum may also fall a bit."""
    return jax.lax.cummax(jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0), axis=mass.ndim - 1)
