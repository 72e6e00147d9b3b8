"""Contrastive representation distillation, with its memory bank."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError
from kd_jax.methods import blocks
from kd_jax.methods.base import Method, Parts, PyTree, Terms, static
from kd_jax.methods.bounds import Bounds, Share, Temperature, walk
from kd_jax.methods.relations import FeatureMethod, example_weights
from kd_jax.models import Output


@dataclass(frozen=True)
class CRD(FeatureMethod):
    """CRD: Tian, Krishnan and Isola (2020), https://arxiv.org/abs/1910.10699. Usual weight: 0.8.

    feature, teacher_feature: of any shape, flattened and embedded by linear maps of `width`. examples: how many the
    training set has: the memory bank is carried, 2 · examples · width numbers. The batch must tell which rows its
    examples are: `kd.Batch(inputs, labels, indices=np.arange(examples))`. negatives: for each example and step, drawn
    with replacement from all others; with `labels`, those of the whole training set, from other classes alone, as for
    CRD's published numbers. The two constants Z are those of the first batch. It couples that batch: the whole one,
    whatever the devices.
    """

    feature: str
    teacher_feature: str | None = None
    examples: int = static(0)
    width: Annotated[int, Bounds(1)] = static(128)
    negatives: Annotated[int, Bounds(1)] = static(16384)
    temperature: Temperature = 0.07
    momentum: Share = 0.5
    labels: Any = None
    couples_batch: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """Both embeddings; the bank, the key of the negatives and the order of the classes are carried."""
        if self.examples < 2:
            raise MethodError(
                f"CRD has a memory of {self.examples} examples: give examples=, the number of all, at least 2"
            )
        ours, theirs = (math.prod(one.shape[1:]) for one in self.pair(student, teacher))
        keys = jax.random.split(key, 4)
        learned = {
            "student": blocks.projector(keys[0], ours, self.width),
            "teacher": blocks.projector(keys[1], theirs, self.width),
        }
        order = None if self.labels is None else losses.class_order(jnp.asarray(self.labels, jnp.int32))
        bank = losses.crd_bank(keys[2], self.examples, self.width)
        return Parts(learned, {"bank": bank, "key": blocks.stored_key(keys[3]), "order": order})

    def loss(  # type: ignore[override]
        self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Terms, PyTree]:
        """One term, `crd`, and the bank after it."""
        if batch.indices is None:
            raise MethodError(
                "CRD needs the rows of the examples, and the batch has none: give kd.Batch(inputs, labels, "
                f"indices=np.arange({self.examples}))"
            )
        rows, weights = jnp.asarray(batch.indices).astype(jnp.int32), example_weights(batch)
        flat = (one.reshape(one.shape[0], -1) for one in self.pair(student, teacher))
        ours, theirs = (
            blocks.project(parts.learned[who], one) for who, one in zip(("student", "teacher"), flat, strict=True)
        )
        bank, order = parts.carried["bank"], parts.carried["order"]
        key = blocks.step_key(parts.carried["key"], step)
        if order is None:
            negatives = losses.crd_negatives(key, rows, examples=self.examples, negatives=self.negatives)
        else:
            negatives = losses.crd_negatives_of_other_classes(key, rows, order, negatives=self.negatives)
        values, bank = losses.crd(ours, theirs, bank, rows, negatives, temperature=self.temperature, weights=weights)
        bank = losses.crd_update(bank, rows, ours, theirs, momentum=self.momentum, weights=weights)
        return {"crd": values}, {**parts.carried, "bank": bank}


def check_memory(method: Method, batch: Batch) -> None:
    """Raises `MethodError` for an index that CRD's memory has no row of; nothing that is traced is looked at."""
    if batch.indices is None or isinstance(batch.indices, jax.core.Tracer):
        return
    indices = np.asarray(batch.indices)
    if batch.weights is not None and not isinstance(batch.weights, jax.core.Tracer):
        weights = np.asarray(batch.weights, np.float32)
        indices = indices[weights.reshape(len(weights), -1).any(axis=1)]
    for one in walk(method):
        if not isinstance(one, CRD) or not indices.size or 0 <= indices.min() <= indices.max() < one.examples:
            continue
        wrong = indices.max() if indices.min() >= 0 else indices.min()
        remedy = f"give examples={wrong + 1}, or more" if wrong > 0 else "number the rows from 0"
        raise MethodError(f"the batch has the index {wrong} and CRD's memory {one.examples} examples: {remedy}")
