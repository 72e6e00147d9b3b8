"""Distillation of sigmoid outputs: two classes by one logit, or several labels at once."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.losses.checks import Logits, Scalar, as_pair
from kd_jax.losses.logits import kd


def binary_kd(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Float[Array, "..."]:
    r"""`kd` of sigmoids: $T^2 \sum_k \mathrm{KL}(B(p_k) \| B(q_k))$, B being Bernoulli, $p_k = \sigma(z_{t,k} / T)$.

    The KL of all outputs together, each being independent of the others. For one logit it is the `kd` of the two
    logits z and 0. Others take the mean over the outputs: that is this divided by their number.

    temperature: T > 0. Logits `[..., outputs]`. Returns `[...]`.
    """
    student, teacher = (jnp.stack([z, jnp.zeros_like(z)], axis=-1) for z in as_pair(student_logits, teacher_logits))
    return jnp.sum(kd(student, teacher, temperature=temperature), axis=-1)
