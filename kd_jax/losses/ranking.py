"""Distillation of the teacher's order of the classes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.losses.checks import Labels, Logits, Scalar, number
from kd_jax.losses.pairs import pair
from kd_jax.losses.targets import where_known, with_labels

FLOOR = -1e30


def pld(
    student_logits: Logits, teacher_logits: Logits, labels: Labels, *, temperature: Scalar = 1.0
) -> Float[Array, "..."]:
    r"""Plackett-Luce distillation: $\sum_k p_{\pi_k} [\log \sum_{j \geq k} e^{z_{\pi_j}} - z_{\pi_k}]$.

    z are the student's logits, without a temperature; π has the label first and the others in the teacher's descending
    order; p is the teacher's softmax at T. It contains the cross entropy: none is added. Not 0 for equal networks; no
    T². Bassam et al. (2025), https://arxiv.org/abs/2506.12542.

    temperature: T > 0 of the teacher; 4 in the paper's CIFAR runs. Logits `[..., classes]`. Returns `[...]`.
    """
    student, teacher, label, known = with_labels(student_logits, teacher_logits, labels)
    p = pair(student, teacher, number(temperature, student)).p
    order = jnp.argsort(jnp.where(label, -jnp.inf, -teacher), axis=-1, stable=True)
    p = jnp.take_along_axis(p, order, axis=-1)
    # A class that the student rules out is far below all others; the sums stay finite.
    z = jnp.maximum(student - jax.lax.stop_gradient(jnp.max(student, axis=-1, keepdims=True)), FLOOR)
    z = jnp.take_along_axis(z, order, axis=-1)
    ruled_out = z <= FLOOR
    from_here: Array = jax.lax.associative_scan(jnp.logaddexp, z, reverse=True, axis=z.ndim - 1)
    # log(1 + the odds of what comes after), whose derivative is small where a class is sure: nothing cancels.
    after = jnp.concatenate([from_here[..., 1:], jnp.full_like(z[..., :1], FLOOR)], axis=-1)
    terms = p * jnp.where(ruled_out & (p == 0), 0, jnp.logaddexp(after - z, 0))
    return where_known(known, jnp.sum(jnp.where(ruled_out & (p > 0), jnp.inf, terms), axis=-1))
