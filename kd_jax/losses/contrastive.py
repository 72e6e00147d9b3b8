"""Contrastive representation distillation (CRD): the loss, its memory bank and its negatives, as pure functions.

Tian, Krishnan & Isola (2020), https://arxiv.org/abs/1910.10699. What a step does: `crd_negatives` (or
`crd_negatives_of_other_classes`), `crd`, then `crd_update` with the normalisers that `crd` returned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kd_jax.errors import ShapeError
from kd_jax.losses.maps import Features, Scalar, Values, as_same
from kd_jax.losses.vectors import as_weights, unit


class CRDBank(NamedTuple):
    """What CRD carries from step to step: an embedding of each training example, and the two constants Z."""

    student: Float[Array, "examples dim"]
    teacher: Float[Array, "examples dim"]
    student_normaliser: Float[Array, ""]  # 0: not yet set; the first batch sets it.
    teacher_normaliser: Float[Array, ""]


class ClassOrder(NamedTuple):
    """The training examples in the order of their classes: negatives of other classes are all but one stretch of it."""

    order: Int[Array, " examples"]
    start: Int[Array, " examples"]  # For each example, where its class begins in `order`.
    members: Int[Array, " examples"]  # For each example, how many its class has.


def crd_bank(key: Array, examples: int, dim: int = 128) -> CRDBank:
    r"""A bank of random embeddings, uniform in $\pm 1 / \sqrt{\mathrm{dim} / 3}$, without normalisers yet."""
    bound = (dim / 3) ** -0.5
    student, teacher = (
        jax.random.uniform(k, (examples, dim), minval=-bound, maxval=bound) for k in jax.random.split(key)
    )
    return CRDBank(student, teacher, jnp.zeros((), student.dtype), jnp.zeros((), teacher.dtype))


def crd_negatives(
    key: Array, indices: Int[Array, " batch"], *, examples: int, negatives: int
) -> Int[Array, "batch negatives"]:
    """Rows of the bank to hold against each example: drawn uniformly, with replacement, from all but its own.

    Public code without labels draws its own row, too. indices: of the batch in [0, examples), examples at least 2.
    """
    if examples < 2:
        raise ShapeError(f"a bank of {examples} example has no negatives: give at least 2")
    indices = _wide(indices)
    drawn = jax.random.randint(key, (*indices.shape, negatives), 0, examples - 1, indices.dtype)
    return drawn + (drawn >= indices[:, None]).astype(indices.dtype)


def class_order(labels: Int[Array, " examples"]) -> ClassOrder:
    """The order that `crd_negatives_of_other_classes` draws from, made once for a training set."""
    order = jnp.argsort(labels)
    ordered = labels[order]
    start, end = (jnp.searchsorted(ordered, labels, side=side) for side in ("left", "right"))
    return ClassOrder(order, start, end - start)


def crd_negatives_of_other_classes(
    key: Array, indices: Int[Array, " batch"], classes: ClassOrder, *, negatives: int
) -> Int[Array, "batch negatives"]:
    """Rows of other classes than an example's own, uniform with replacement: the policy of CRD's published numbers.

    RepDistiller draws without replacement where a class leaves enough. classes: `class_order` of the whole training
    set's labels, which needs two classes or more; with one alone, every row is -1, and `crd` gives NaN.
    """
    indices = _wide(indices)
    others = classes.order.shape[0] - classes.members[indices][:, None]
    drawn = jax.random.randint(key, (*indices.shape, negatives), 0, jnp.maximum(others, 1), classes.order.dtype)
    beyond = drawn >= classes.start[indices][:, None]
    place = drawn + jnp.where(beyond, classes.members[indices][:, None], 0).astype(drawn.dtype)
    return jnp.where(others > 0, jnp.take(classes.order, place, mode="clip"), -1).astype(indices.dtype)


def crd(
    student: Features,
    teacher: Features,
    bank: CRDBank,
    indices: Int[Array, " batch"],
    negatives: Int[Array, "batch negatives"],
    *,
    temperature: Scalar = 0.07,
    weights: Features | None = None,
) -> tuple[Values, CRDBank]:
    r"""CRD's NCE both ways: $-\log \frac{P_0}{P_0 + c} - \sum_k \log \frac{K/N}{P_k + c}$, $c = K/N + 10^{-7}$.

    $P = e^{u \cdot v / \tau} / Z$: u is the student's embedding and v the teacher's in the bank, of the example itself
    (0) and K negatives; plus the same with the two exchanged. N: rows of the bank. Z is N times
    the mean of $e^{u \cdot v / \tau}$ over the first batch, then fixed, and takes no gradient: this couples the batch
    (see `relations`: global batch, weights). RepDistiller and torchdistill have the same, in exponentials.

    student, teacher: embeddings `[batch, dim]` of learned linear layers; they are divided by their length here. bank:
    `crd_bank`. indices: the examples' rows. negatives: theirs: a row outside the bank gives NaN.
    Returns the values `[batch]` and the bank with both normalisers set; its rows change by `crd_update` alone.
    """
    student, teacher = as_same(student, teacher, "embed both in the same number of dimensions")
    _fits(student, bank, indices, negatives)
    indices = _wide(indices)
    weighting = as_weights(weights, student)
    rows = jnp.concatenate([indices[:, None], negatives], axis=1)
    values, normalisers = jnp.zeros_like(student[:, 0]), []
    sides = ((student, bank.teacher, bank.student_normaliser), (teacher, bank.student, bank.teacher_normaliser))
    for embeddings, memory, normaliser in sides:
        embeddings = unit(weighting.only(embeddings))
        memory = jax.lax.stop_gradient(_rows(memory, rows).astype(embeddings.dtype))
        scores = jnp.einsum("bd,bkd->bk", embeddings, memory, precision=jax.lax.Precision.HIGHEST)
        scores = weighting.only(scores) / jnp.asarray(temperature, scores.dtype)
        log_mean = jax.nn.logsumexp(scores, axis=1) - jnp.log(scores.dtype.type(scores.shape[1]))
        # Of the present examples alone.
        relative = weighting.relative / weighting.present_count
        first = len(bank.student) * jnp.exp(jax.nn.logsumexp(log_mean, b=relative))
        known = normaliser.astype(scores.dtype)
        z = jax.lax.stop_gradient(jnp.where(known > 0, known, first))
        normalisers.append(z.astype(normaliser.dtype))
        values += _nce(scores - jnp.log(jnp.where(z > 0, z, 1)), len(bank.student))
    updated = bank._replace(student_normaliser=normalisers[0], teacher_normaliser=normalisers[1])
    return weighting.only(values), updated


def crd_update(
    bank: CRDBank,
    indices: Int[Array, " batch"],
    student: Features,
    teacher: Features,
    *,
    momentum: Scalar = 0.5,
    weights: Features | None = None,
) -> CRDBank:
    r"""The bank with its rows moved to $v / \|v\|_2$, $v = m \cdot \mathrm{old} + (1 - m) \, u$. No gradient.

    student, teacher: the embeddings that `crd` was given; u is the same divided by its length. indices: their rows; a
    row that occurs twice gets one of the two. momentum: m. weights: an example of weight 0 changes no row.
    """
    student, teacher = as_same(student, teacher, "embed both in the same number of dimensions")
    _fits(student, bank, indices, indices[:, None])
    indices = _wide(indices)
    weighting = as_weights(weights, student)
    size = len(bank.student)
    # A row beyond the bank is dropped.
    target = jnp.where(weighting.present & (indices >= 0), indices, size)

    def moved(memory: Array, embeddings: Array) -> Array:
        embeddings = jax.lax.stop_gradient(unit(weighting.only(embeddings))).astype(memory.dtype)
        m = jnp.asarray(momentum, memory.dtype)
        rows = unit(m * jnp.take(memory, target, axis=0, mode="fill", fill_value=0) + (1 - m) * embeddings)
        return memory.at[target].set(rows, mode="drop")

    return bank._replace(student=moved(bank.student, student), teacher=moved(bank.teacher, teacher))


def _nce(scores: Array, examples: int) -> Array:
    """Noise contrastive estimation of log P, the first against the others: `[batch]`."""
    noise = np.float64((scores.shape[1] - 1) / examples)
    together = jnp.logaddexp(scores, scores.dtype.type(np.log(noise + 1e-7)))
    others = together[:, 1:] - scores.dtype.type(np.log(noise))
    return together[:, 0] - scores[:, 0] + jnp.sum(others, axis=1)


def _wide(indices: Array) -> Array:
    """In 32 bits at least, which can hold the number of any row."""
    indices = jnp.asarray(indices)
    return indices if indices.dtype.itemsize >= 4 else indices.astype(jnp.int32)


def _rows(memory: Array, rows: Array) -> Array:
    """Rows of the bank, and NaN for one outside it."""
    return jnp.take(memory, jnp.where(rows < 0, memory.shape[0], rows), axis=0, mode="fill", fill_value=jnp.nan)


def _fits(embeddings: Array, bank: CRDBank, indices: Array, negatives: Array) -> None:
    """Refuses a bank or rows of other shapes."""
    batch, dim = embeddings.shape[0], embeddings.shape[-1]
    if embeddings.ndim != 2 or {bank.student.shape[1:], bank.teacher.shape[1:]} != {(dim,)}:
        raise ShapeError(
            f"embeddings {list(embeddings.shape)} do not fit a bank {list(bank.student.shape)}: "
            "give [batch, dim] with the bank's dim"
        )
    if indices.shape != (batch,) or negatives.ndim != 2 or len(negatives) != batch or negatives.shape[1] < 1:
        raise ShapeError(
            f"indices {list(indices.shape)} and negatives {list(negatives.shape)} do not fit {batch} examples: "
            f"give [{batch}] and [{batch}, at least 1]"
        )
