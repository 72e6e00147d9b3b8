"""Features of several layers at once: SemCKD's attention over pairs of layers, and ReviewKD's fusion of stages."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kd_jax.errors import ShapeError
from kd_jax.losses.maps import Features, Scalar, Values, as_features, as_pair, as_same, resize_nearest
from kd_jax.losses.vectors import as_weights, dot


def semckd_similarities(features: Features, *, weights: Features | None = None) -> Array:
    r"""The batch's inner products $F F^T$, `[batch, batch]`: what SemCKD embeds, row by row, as queries and keys.

    Couples the batch: give the global one. Its size is that of the embeddings' inputs, so batches must keep it; an
    example of weight 0 has a row and a column of zeros.

    features: `[batch, ...]`. weights: `[batch]`.
    """
    features = as_features(features)
    features = as_weights(weights, features).only(features).reshape(features.shape[0], -1)
    return dot(features, features)


def semckd_attention(queries: Features, keys: Features, *, temperature: Scalar = 1.0) -> Array:
    r"""SemCKD's weights of pairs of layers: softmax over the teacher's layers of $q_i \cdot k_j / T$.

    queries: `[batch, student layers, dim]`, made of the student's `semckd_similarities`. keys: the same of the teacher's.
    Returns `[batch, student layers, teacher layers]`; each row adds up to 1. Raises ShapeError.
    """
    queries, keys = as_pair(queries, keys)
    if queries.ndim != 3 or keys.ndim != 3 or queries.shape[-1] != keys.shape[-1]:
        raise ShapeError(
            f"queries {list(queries.shape)} and keys {list(keys.shape)} differ in dim: give [batch, layers, dim] each"
        )
    return jax.nn.softmax(dot(queries, keys) / jnp.asarray(temperature, queries.dtype), axis=-1)


def semckd(
    student: Sequence[Sequence[Features]],
    teacher: Sequence[Sequence[Features]],
    attention: Features,
    *,
    weights: Features | None = None,
) -> Values:
    r"""SemCKD: $\frac{1}{S} \sum_{i,j} \alpha_{ij} \, \mathrm{mse}(s_{ij}, t_{ij})$ of an example, `[batch]`.

    Over S layers of the student and all layers of the teacher. Chen et al. (2021), https://arxiv.org/abs/2012.03236,
    whose code divides by S as here. The attention is from similarities within the batch (see
    `semckd_similarities`), so values depend on the global batch. Usual weight: 400 on CIFAR-100.

    student: `student[i][j]`, the student's layer i projected to the teacher's layer j, after `match_space`.
    teacher: `teacher[i][j]`, layer j as `match_space` left it beside layer i. attention: `semckd_attention`,
    `[batch, S, teacher layers]`. weights: `[batch]`; at weight 0 the value is 0. Raises ShapeError.
    """
    if not student or len({len(row) for row in (*student, *teacher)}) != 1 or len(student) != len(teacher):
        raise ShapeError(
            f"the student's pairs {[len(row) for row in student]} and the teacher's {[len(row) for row in teacher]} "
            "differ: give one list for each student layer, of one entry for each teacher layer"
        )
    remedy = "apply match_space, then a projector, to the student's"
    pairs = [[as_same(s, t, remedy) for s, t in zip(*rows, strict=True)] for rows in zip(student, teacher, strict=True)]
    first = pairs[0][0][0]
    attention = jnp.asarray(attention).astype(first.dtype)
    shape = (first.shape[0], len(student), len(student[0]))
    if attention.shape != shape:
        raise ShapeError(f"an attention {list(attention.shape)} does not fit the pairs of layers: give {list(shape)}")
    weighting = as_weights(weights, first)
    attention, value = weighting.only(attention), jnp.zeros_like(attention[:, 0, 0])
    for i, row in enumerate(pairs):
        for j, (s, t) in enumerate(row):
            gap = weighting.only(s - t)
            value += attention[:, i, j] * jnp.mean(jnp.square(gap), axis=range(1, gap.ndim))
    return value / len(student)


def reviewkd_fuse(lower: Features, upper: Features, gates: Features) -> Array:
    r"""ReviewKD's attention based fusion: $g_0 x + g_1 y$, y being `upper` resized to x's space by nearest positions.

    Chen et al. (2021), https://arxiv.org/abs/2104.09044. The convolutions before and after are learned.

    lower: x, a student stage after its 1x1 convolution, `[batch, *space, channels]`. upper: the fused features of the
    stages above. gates: g, in (0, 1): a sigmoid of a 1x1 convolution of both side by side, `[batch, *space, 2]`.
    """
    lower, upper = as_pair(lower, upper)
    lower, upper = as_same(lower, resize_nearest(upper, lower.shape[1:-1]), "give both stages the same channels")
    gates = jnp.asarray(gates).astype(lower.dtype)
    if gates.shape != (*lower.shape[:-1], 2):
        raise ShapeError(
            f"gates {list(gates.shape)} do not fit features {list(lower.shape)}: give two for each position"
        )
    return gates[..., :1] * lower + gates[..., 1:] * upper
