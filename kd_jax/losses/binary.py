"""Distillation of sigmoid outputs: two classes by one logit, or several labels at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.errors import ShapeError
from kd_jax.losses.checks import Labels, Logits, Scalar, as_logits, as_pair
from kd_jax.losses.logits import kd


def binary_kd(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Float[Array, "..."]:
    r"""`kd` of sigmoids: $T^2 \sum_k \mathrm{KL}(B(p_k) \| B(q_k))$, B being Bernoulli, $p_k = \sigma(z_{t,k} / T)$.

    The KL of all outputs together, each being independent of the others. For one logit it is the `kd` of the two
    logits z and 0. Others take the mean over the outputs: that is this divided by their number.

    temperature: T > 0. Logits `[..., outputs]`. Returns `[...]`.
    """
    student, teacher = (jnp.stack([z, jnp.zeros_like(z)], axis=-1) for z in as_pair(student_logits, teacher_logits))
    return jnp.sum(kd(student, teacher, temperature=temperature), axis=-1)


def binary_cross_entropy(logits: Logits, labels: Labels) -> Float[Array, "..."]:
    r"""Cross entropy of sigmoids, the hard loss beside `binary_kd`: $-\sum_k y_k \log p_k + (1 - y_k) \log (1 - p_k)$.

    The sum over the outputs, as there; others take the mean.

    logits: `[..., outputs]`. labels: y in [0, 1], of the same shape, else ShapeError. Returns `[...]`, in nats.
    """
    logits, targets = as_logits(logits), jnp.asarray(labels)
    if targets.shape != logits.shape:
        raise ShapeError(
            f"labels {list(targets.shape)} do not fit logits {list(logits.shape)}: give one for each output, 0 or 1"
        )
    y = targets.astype(logits.dtype)
    # A label of 0 or 1 has one term alone: the other may be infinite.
    yes = jnp.where(y == 0, 0, y * jax.nn.softplus(-logits))
    no = jnp.where(y == 1, 0, (1 - y) * jax.nn.softplus(logits))
    return jnp.sum(yes + no, axis=-1)
