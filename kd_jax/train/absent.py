"""What has the weight 0 in a training step: it reaches no value, no gradient and no batch statistics."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from kd_jax.data.batch import Batch
from kd_jax.models import Output
from kd_jax.models.heads import OF_THE_MODEL

PyTree = Any


def without_absent(batch: Batch) -> Batch:
    """Copies of the present examples, in turn, in the places of those whose weight is 0; zeros where none is present.

    Nothing that stands there (NaN, a number out of a vocabulary) reaches a gradient or batch statistics.
    """
    if batch.weights is None:
        return batch
    absent = _absent(jnp.asarray(batch.weights))
    none, places = jnp.all(absent), jnp.arange(absent.shape[0], dtype=jnp.int32)
    present = jnp.argsort(absent, stable=True)
    turn = (jnp.cumsum(absent, dtype=jnp.int32) - 1) % jnp.maximum(1, jnp.sum(~absent, dtype=jnp.int32))
    rows = jnp.where(absent, present[turn], places)

    def filled(leaf: Any) -> Array:
        taken = jnp.asarray(leaf)[rows]
        return jnp.where(none, jnp.zeros_like(taken), taken)

    return batch._replace(inputs=jax.tree.map(filled, batch.inputs))


def unless_absent(batch: Batch, after: PyTree, before: PyTree) -> PyTree:
    """The state after a step; that before where every weight is 0, which decays no weight and moves no moment."""
    if batch.weights is None:
        return after
    present = jnp.any(jnp.asarray(batch.weights) != 0)
    return jax.tree.map(lambda new, old: jnp.where(present, new, old), after, before)


def masked(output: Output, batch: Batch) -> Output:
    """Logits of 0 where the weight is 0, and features of a present example where an example has none."""
    if batch.weights is None:
        return output
    weights, logits = jnp.asarray(batch.weights), output.logits
    if weights.ndim < logits.ndim and weights.shape == logits.shape[: weights.ndim]:
        logits = jnp.where(broadened(weights == 0, logits.ndim), jnp.zeros_like(logits), logits)
    features = {
        path: feature if path in OF_THE_MODEL else masked_feature(feature, weights)
        for path, feature in output.features.items()
    }
    return Output(logits, features)


def masked_feature(feature: Array, weights: Array) -> Array:
    """That of a present example where one is absent, and 0 at a position that is."""
    if not feature.ndim or feature.shape[0] != weights.shape[0]:
        return feature
    absent = _absent(weights)
    first = jnp.where(jnp.all(absent), jnp.zeros_like(feature[:1]), feature[jnp.argmin(absent)][None])
    feature = jnp.where(broadened(absent, feature.ndim), first, feature)
    # The second axis of scores of attention is that of heads, of whom there may be as many as positions.
    scores = weights.ndim == 2 and feature.ndim == 4 and weights.shape[1] in feature.shape[2:]
    # Without an axis behind the positions they are channels, of which there may be as many.
    if weights.ndim < 2 or feature.ndim <= weights.ndim or feature.shape[: weights.ndim] != weights.shape or scores:
        return feature
    elsewhere = (weights == 0) & jnp.any(weights != 0, axis=tuple(range(1, weights.ndim)), keepdims=True)
    return jnp.where(broadened(elsewhere, feature.ndim), jnp.zeros_like(feature), feature)


def masked_labels(batch: Batch) -> Batch:
    """Labels of 0 where the weight is 0."""
    labels = batch.labels
    if batch.weights is None or labels is None or not hasattr(labels, "dtype"):
        return batch
    weights = jnp.asarray(batch.weights)
    if weights.ndim > labels.ndim or weights.shape != labels.shape[: weights.ndim]:
        return batch
    absent = broadened(weights == 0, labels.ndim)
    return batch._replace(labels=jnp.where(absent, jnp.zeros_like(labels), labels))


def broadened(array: Array, ndim: int) -> Array:
    """With axes of 1 behind its own."""
    return array.reshape(array.shape + (1,) * (ndim - array.ndim))


def _absent(weights: Array) -> Bool[Array, " examples"]:
    """Which examples have the weight 0 at every position."""
    return jnp.all((weights == 0).reshape(weights.shape[0], -1), axis=-1)
