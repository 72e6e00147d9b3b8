"""Losses of transformers' inner states: one value for each position, so that padding is a weight of 0.

Axes before the last ones are free: `[batch, positions, ...]`. A mean over valid positions of the whole batch, as most
public code has it, is the weighted mean of these values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kd_jax.errors import ShapeError
from kd_jax.losses.maps import Features, as_pair, as_same, both
from kd_jax.losses.vectors import dot, unit

PositionValues = Float[Array, "..."]
"""`[batch, *positions]`."""


def hidden_states(student: Features, teacher: Features) -> PositionValues:
    r"""The mean over the width of $(W h_s - h_t)^2$ at each position, `[batch, *positions]`.

    TinyBERT: Jiao et al. (2020), https://arxiv.org/abs/1909.10351, for hidden states and embeddings.

    student: projected, $W h_s$. teacher: $h_t$. Both of one shape `[batch, *positions, width]`, else ShapeError.
    """
    student, teacher = as_same(student, teacher, "project the student's to the teacher's width")
    return jnp.mean(jnp.square(student - teacher), axis=-1)


def cosine(student: Features, teacher: Features) -> PositionValues:
    r"""One minus the cosine of $h_s$ and $h_t$ at each position, `[batch, *positions]`.

    DistilBERT: Sanh et al. (2019), https://arxiv.org/abs/1910.01108. BERT-PKD's squared distance of states
    of length 1 is twice this. A state of zeros has the cosine 0 with all and no gradient.

    student, teacher: of one shape `[batch, *positions, width]`, else ShapeError.
    """
    student, teacher = as_same(student, teacher, "project the student's to the teacher's width")
    # Half the squared distance of the directions is 1 - cosine, and keeps its digits where they are close.
    s, t = unit(student), unit(teacher)
    missing = jnp.all(student == 0, axis=-1) | jnp.all(teacher == 0, axis=-1)
    return jnp.where(missing, 1, jnp.sum(jnp.square(s - t), axis=-1) / 2)


def attention_maps(
    student: Features, teacher: Features, *, mask: Features | None = None, segments: Features | None = None
) -> PositionValues:
    r"""The mean over heads and keys of $(A_s - A_t)^2$ for each query, `[batch, queries]`.

    TinyBERT: Jiao et al. (2020), https://arxiv.org/abs/1909.10351: of scores before the softmax, where
    masked keys must be told by `mask`; public code puts 0 in place of very negative scores. TextBrewer weighs each pair
    of positions of a batch the same, so longer examples more; the two agree without padding.

    student, teacher: of one shape `[batch, heads, queries, keys]`, else ShapeError. mask: `[batch, keys]`, True or 1
    for a key that counts; others may hold anything, -inf too. What both rule out by -inf, as causal scores do, is left
    out. segments: `[batch, keys]`, of as many queries: the packed sequence that each position belongs to; a query has
    the keys of its own alone. A row without keys has the value 0.
    """
    student, teacher = as_same(student, teacher, "choose layers of as many heads, or average both over their heads")
    if student.ndim != 4:
        raise ShapeError(f"attention maps {list(student.shape)} need [batch, heads, queries, keys]: reshape both")
    valid = _valid(mask, student.shape[0], student.shape[3], student)[:, None, None]
    if segments is not None and student.shape[2] != student.shape[3]:
        raise ShapeError(
            f"attention maps {list(student.shape)} have other queries than keys, and segments are of one sequence: "
            "leave segments out"
        )
    valid &= _together(segments, student.shape[0], student.shape[3], student)[:, None]
    valid &= ~(jnp.isneginf(student) & jnp.isneginf(teacher))
    gap = jnp.where(valid, student, 0) - jnp.where(valid, teacher, 0)
    squares = jnp.sum(jnp.square(gap), axis=(1, 3))
    return squares / jnp.maximum(jnp.sum(valid, axis=(1, 3)), 1).astype(squares.dtype)


def minilm_relations(
    student: Features,
    teacher: Features,
    *,
    heads: int,
    student_keys: Features | None = None,
    teacher_keys: Features | None = None,
    mask: Features | None = None,
    segments: Features | None = None,
) -> PositionValues:
    r"""MiniLM: the heads' mean of $\mathrm{KL}(R_t \| R_s)$ at a position. $R = \mathrm{softmax}(A B^T / \sqrt{d})$.

    MiniLMv2: Wang et al. (2021), https://arxiv.org/abs/2012.15828: A = B are a layer's queries, keys
    or values, all heads side by side and split anew in `heads` relation heads of d dimensions. With keys given, A
    are queries and B keys: with `heads` those of the model, MiniLM's attention transfer (https://arxiv.org/abs/2002.10957).

    student, teacher: `[batch, positions, width]`, or `[batch, positions, heads, width of a head]` as Flax has queries;
    widths may differ; `heads` must divide both, else ShapeError.
    student_keys, teacher_keys: B, of the shapes of A. mask: `[batch, positions]`, True or 1 for a position that
    counts; the others are left out of every softmax, have the value 0 and may hold anything. segments:
    `[batch, positions]`, the packed sequence that each position belongs to; its relations are with that alone. In
    nats, `[batch, positions]`.
    """
    if (student_keys is None) != (teacher_keys is None):
        raise ShapeError("keys of one network alone were given: give both student_keys and teacher_keys, or neither")
    student, teacher = map(_side_by_side, as_pair(student, teacher))
    student_keys, teacher_keys = (
        None if keys is None else _side_by_side(keys) for keys in (student_keys, teacher_keys)
    )
    if not student.ndim == teacher.ndim == 3:
        raise ShapeError(f"{both(student, teacher)} have other axes: give both [batch, positions, width]")
    if student.shape[:2] != teacher.shape[:2]:
        raise ShapeError(
            f"{both(student, teacher)} differ in positions: give both [batch, positions, width] of one text"
        )
    valid = _valid(mask, student.shape[0], student.shape[1], student)
    related = valid[:, None] & _together(segments, student.shape[0], student.shape[1], student)
    logs = [
        _log_relation(a, a if b is None else jnp.asarray(b).astype(a.dtype), heads, valid, related)
        for a, b in ((student, student_keys), (teacher, teacher_keys))
    ]
    terms = jnp.exp(logs[1]) * (logs[1] - logs[0])
    divergence = jnp.mean(jnp.sum(jnp.where(related[:, None], terms, 0), axis=-1), axis=1)
    return jnp.where(valid, divergence, 0)


def _log_relation(queries: Array, keys: Array, heads: int, valid: Array, related: Array) -> Array:
    """Logarithms of the softmax over related keys, `[batch, heads, positions, positions]`; 0 for the others."""
    if keys.shape != queries.shape:
        raise ShapeError(
            f"keys {list(keys.shape)} and queries {list(queries.shape)} differ in shape: give those of one layer"
        )
    if heads < 1 or queries.shape[-1] % heads:
        raise ShapeError(
            f"{heads} heads do not divide the width of {list(queries.shape)}: choose a divisor of the width"
        )
    split = [_split(jnp.where(valid[..., None], states, 0), heads) for states in (queries, keys)]
    scores = dot(*split) / queries.dtype.type((queries.shape[-1] // heads) ** 0.5)
    here = related[:, None]
    # A row without valid keys would be a softmax of nothing.
    lowest = jnp.finfo(scores.dtype).min
    logs = jax.nn.log_softmax(jnp.where(here, scores, lowest), axis=-1)
    return jnp.where(here, logs, 0)


def _side_by_side(states: Features) -> Array:
    """All heads in one axis."""
    states = jnp.asarray(states)
    return states.reshape(*states.shape[:2], -1) if states.ndim == 4 else states


def _split(states: Array, heads: int) -> Array:
    """`[batch, heads, positions, width / heads]`."""
    return jnp.swapaxes(states.reshape(*states.shape[:2], heads, -1), 1, 2)


def _valid(mask: Features | None, batch: int, positions: int, features: Array) -> Array:
    """Whether a position counts, `[batch, positions]`."""
    if mask is None:
        return jnp.ones((batch, positions), bool)
    mask = jnp.asarray(mask)
    if mask.shape != (batch, positions):
        raise ShapeError(
            f"a mask {list(mask.shape)} does not fit features {list(features.shape)}: give [{batch}, {positions}]"
        )
    return mask.astype(bool)


def _together(segments: Features | None, batch: int, positions: int, features: Array) -> Array:
    """Whether two positions belong to one sequence, `[batch, positions, positions]`, or True for all."""
    if segments is None:
        return jnp.ones((1, 1, 1), bool)
    segments = jnp.asarray(segments)
    if segments.shape != (batch, positions):
        raise ShapeError(
            f"segments {list(segments.shape)} do not fit features {list(features.shape)}: give [{batch}, {positions}]"
        )
    return segments[:, :, None] == segments[:, None, :]
