"""How good a network is on labelled examples, and how close to its teacher."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from kd_jax.data import shifts as augment
from kd_jax.losses import cross_entropy, kl_divergence
from kd_jax.losses.compensated import difference, exp
from kd_jax.models.network import Network, Params, State
from kd_jax.train.step import scale

_ECE_BINS = 15
_PARTS = 128


class Evaluation(NamedTuple):
    """Measures of one network on n examples.

    correct, errors: numbers of examples. accuracy: fraction of correct ones. nll: mean negative log-likelihood of the
    labels, in nats. ece: expected calibration error, a fraction (`calibration_error`).
    teacher_agreement: fraction of examples with the teacher's answer. kl_to_teacher: mean KL(teacher ‖ network) at
    temperature 1, in nats. Both are None without a teacher.
    """

    correct: Int[Array, ""]
    errors: Int[Array, ""]
    accuracy: Float[Array, ""]
    nll: Float[Array, ""]
    ece: Float[Array, ""]
    teacher_agreement: Float[Array, ""] | None
    kl_to_teacher: Float[Array, ""] | None


@partial(jax.jit, static_argnames=("network", "batch_size", "dtype", "shift"))
def predict(
    params: Params,
    state: State,
    images: UInt8[Array, "examples height width channels"],
    *,
    network: Network,
    batch_size: int = 1000,
    dtype: Any = jnp.float32,
    shift: int = 0,
) -> Float[Array, "examples classes"]:
    """Logits in evaluation mode (no dropout, carried statistics), `batch_size` images at a time, scaled in `dtype`.

    shift: where it is not 0, the logits are means over the (2 shift + 1)² views of an image that is moved by up to so
    many pixels, with 0 where there was none (test-time augmentation); `teacher.outputs` gives those of every view.
    Raises `ValueError` where it is negative or would move an image out of sight.
    """
    smallest = min(images.shape[1:3], default=0)
    if shift and not 0 < shift < smallest:
        raise ValueError(
            f"shift is {shift}: it must be from 0 to {smallest - 1}, less than the images' {smallest} pixels"
        )
    examples = len(images)
    batch_size = min(batch_size, examples)
    batches = -(-examples // batch_size)
    padding = [(0, batches * batch_size - examples)] + [(0, 0)] * (images.ndim - 1)
    batched = jnp.pad(images, padding).reshape(batches, batch_size, *images.shape[1:])
    unused_key = jax.random.key(0)

    def logits(batch: Array) -> Array:
        return network.apply(params, state, scale(batch, dtype), train=False, key=unused_key)[0].logits

    def mean_logits(batch: Array) -> Array:
        padded, count = augment.pad(batch, shift), augment.view_count(shift)

        def view(number: Array) -> Array:
            down, right = number // (2 * shift + 1), number % (2 * shift + 1)
            none = jnp.zeros_like(number)
            return logits(jax.lax.dynamic_slice(padded, (none, down, right, none), batch.shape))

        total = jax.lax.fori_loop(1, count, lambda number, total: total + view(number), view(jnp.int32(0)))
        return total / count

    stacked = jax.lax.map(mean_logits if shift else logits, batched)
    return stacked.reshape(batches * batch_size, -1)[:examples]


@jax.jit
def evaluate(
    logits: Float[Array, "examples classes"],
    labels: Int[Array, " examples"],
    teacher_logits: Float[Array, "examples classes"] | None = None,
) -> Evaluation:
    """Every measure of `Evaluation`; the last two where the teacher's logits are given."""
    answers = jnp.argmax(logits, axis=-1).astype(labels.dtype)
    correct = jnp.sum(answers == labels)
    errors = jnp.sum(answers != labels)
    # Not len(labels): XLA multiplies by the inverse of a constant, which makes 0.91249996 of 9125 / 10,000.
    count = (correct + errors).astype(logits.dtype)
    agreement = distance = None
    if teacher_logits is not None:
        agreeing = jnp.sum(answers == jnp.argmax(teacher_logits, axis=-1).astype(labels.dtype))
        agreement = agreeing.astype(logits.dtype) / count
        distance = jnp.mean(kl_divergence(logits, teacher_logits))
    return Evaluation(
        correct,
        errors,
        correct.astype(logits.dtype) / count,
        jnp.mean(cross_entropy(logits, labels)),
        calibration_error(logits, labels),
        agreement,
        distance,
    )


def calibration_error(
    logits: Float[Array, "examples classes"], labels: Int[Array, " examples"], *, bins: int = _ECE_BINS
) -> Float[Array, ""]:
    r"""Expected calibration error: $\sum_b \frac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|$, a fraction.

    The confidence is the largest probability; bin b of `bins` holds those in (b/bins, (b+1)/bins].
    Guo, Pleiss, Sun and Weinberger (2017), equation 3, with their 15 bins.
    """
    answers = jnp.argmax(logits, axis=-1)
    top = answers[:, None] == jnp.arange(logits.shape[-1])[None]
    odds = exp(difference(logits, jnp.max(logits, axis=-1, keepdims=True)))
    others = jnp.sum(jnp.where(top, 0, odds), axis=-1)
    # 1 - confidence, which a difference would round away where a network is nearly certain.
    confidence, doubt = 1 / (1 + others), others / (1 + others)
    bin_of = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    surplus = jnp.where(answers.astype(labels.dtype) == labels, doubt, -confidence)
    # In many short sums, as a long one rounds at every term.
    part = jnp.arange(len(labels), dtype=jnp.int32) % _PARTS
    parts = jax.ops.segment_sum(surplus, bin_of * _PARTS + part, num_segments=bins * _PARTS)
    return jnp.sum(jnp.abs(jnp.sum(parts.reshape(bins, _PARTS), axis=-1))) / len(labels)
