"""Distillation by optimal transport between classes, which knows that some are alike."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from kd_jax.errors import ShapeError
from kd_jax.losses.checks import Labels, Logits, Scalar, number
from kd_jax.losses.labels import soft_cross_entropy
from kd_jax.losses.pairs import pair
from kd_jax.losses.targets import log_sum_exp, of_others, where_known, with_labels


def wkd(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Labels,
    *,
    similarity: Shaped[Array | np.ndarray, "..."],
    gamma: Scalar = 600.0,
    temperature: Scalar = 8.0,
    regulariser: Scalar = 0.05,
    iterations: int = 10,
) -> Float[Array, "..."]:
    r"""WKD-L: $-p_y \log q_y$ at T = 1, and γ times the transport from $\hat q$ to $\hat p$ at the cost 1 - similarity.

    The hats are softmaxes at T without the label's class. The plan is Sinkhorn's after `iterations`, in logarithms;
    its gradient is that of these steps. Lv et al. (2024), https://arxiv.org/abs/2412.08139. No T², as in the paper.
    Public code is not in logarithms, adds 1e-8, and its default regulariser is 25 where its settings have 0.05.

    similarity: of classes, in [0, 1], sharpened as wanted, `[classes, classes]`. gamma: weight; 30 at T = 2 for
        ImageNet. temperature, regulariser: > 0. Returns `[...]`; memory `[..., classes, classes]`.
    """
    student, teacher, label, known = with_labels(student_logits, teacher_logits, labels)
    similarity = jnp.asarray(similarity).astype(student.dtype)
    classes = student.shape[-1]
    if similarity.shape != (classes, classes):
        raise ShapeError(
            f"similarity {list(similarity.shape)} does not fit {classes} classes: it must be {[classes, classes]}"
        )
    t, strength = number(temperature, student), number(regulariser, student)
    target = soft_cross_entropy(student, jnp.where(label, pair(student, teacher, jnp.ones_like(t)).p, 0))
    some, *logits = of_others(student, teacher, label)
    others = pair(*logits, t)
    cost = jnp.broadcast_to(1 - similarity, (*student.shape, classes))
    plan = jnp.exp(_plan(others.log_q, others.log_p, cost / strength, iterations))
    moved = jnp.where(some, jnp.sum(plan * cost, axis=(-2, -1)), 0)
    return where_known(known, target + number(gamma, t) * moved)


def _plan(log_a: Array, log_b: Array, cost: Array, iterations: int) -> Array:
    """Logarithm of the plan between two distributions, `[..., classes, classes]`, at a cost in units of the strength.

    Classes of probability 0 send and receive nothing. The rows' sums are those of the first, exactly.
    """
    here, there = ~jnp.isneginf(log_a), ~jnp.isneginf(log_b)
    log_a, log_b = jnp.where(here, log_a, 0), jnp.where(there, log_b, 0)
    kernel = jnp.where(here[..., :, None] & there[..., None, :], -cost, -jnp.inf)

    def step(u: Array, _: Any) -> tuple[Array, Array]:
        v = log_b - _finite(log_sum_exp(jnp.swapaxes(kernel + u[..., :, None], -1, -2)))
        return log_a - _finite(log_sum_exp(kernel + v[..., None, :])), v

    u, v = jax.lax.scan(step, jnp.zeros_like(log_a), length=iterations)
    return kernel + u[..., :, None] + v[-1][..., None, :]


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isneginf(x), 0, x)
