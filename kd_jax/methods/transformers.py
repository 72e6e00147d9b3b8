"""Methods of transformers' inner states: attention maps, and MiniLM's relations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.methods.base import Method, Parts, Terms, Values, static
from kd_jax.methods.bounds import Bounds
from kd_jax.methods.logits import require_teacher
from kd_jax.methods.relations import FeatureMethod
from kd_jax.models import Output


@dataclass(frozen=True)
class AttentionMaps(FeatureMethod):
    """Attention scores: TinyBERT, Jiao et al. (2020), https://arxiv.org/abs/1909.10351. The mean squared difference.

    feature, teacher_feature: scores before the softmax, `[batch, heads, queries, keys]`, with as many heads. Where the
    batch has a weight for each position, keys of weight 0 are left out, and may hold -inf; public code puts 0 in place
    of very negative scores instead. In rows of packed sequences (`segments` of the inputs, of
    as many positions) a query has the keys of its own sequence.
    """

    feature: str
    teacher_feature: str | None = None

    def compare(self, student: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.attention_maps`, at each query."""
        own = segments(batch, student.shape[2:])
        return losses.attention_maps(student, teacher, mask=position_mask(batch), segments=own)


@dataclass(frozen=True)
class MiniLM(Method):
    """MiniLM's relations: Wang et al. (2021), https://arxiv.org/abs/2012.15828. KL of softmax(A Bᵀ / √d), A = B.

    feature, teacher_feature: a layer's queries, keys or values, `[batch, positions, width]`, all heads side by side;
    widths may differ. Add three of these for queries, keys and values. heads: relation heads, a divisor of both widths.
    keys, teacher_keys: paths of B where it is not A: with queries as A and the model's heads that is MiniLM's attention
    transfer (2020), https://arxiv.org/abs/2002.10957. Positions of weight 0 are left out of every softmax,
    and in rows of packed sequences those of other sequences.
    """

    feature: str
    teacher_feature: str | None = None
    heads: Annotated[int, Bounds(1)] = static(12)
    keys: str | None = None
    teacher_keys: str | None = None
    compares_logits: ClassVar[bool] = False

    @property
    def student_features(self) -> tuple[str, ...]:
        """One, or queries and keys."""
        return (self.feature,) if self.keys is None else (self.feature, self.keys)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """As many of the teacher."""
        first = self.teacher_feature or self.feature
        return (first,) if self.keys is None else (first, self.teacher_keys or self.keys)

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `minilm`, at each position."""
        taught = require_teacher(self, teacher).features
        ours, theirs = [student.features[p] for p in self.student_features], [taught[p] for p in self.teacher_features]
        both = {} if self.keys is None else {"student_keys": ours[1], "teacher_keys": theirs[1]}
        which: dict[str, Any] = {"mask": position_mask(batch), "segments": segments(batch, ours[0].shape[1:2])}
        return {"minilm": losses.minilm_relations(ours[0], theirs[0], heads=self.heads, **which, **both)}


def position_mask(batch: Batch) -> Array | None:
    """Which positions count, `[batch, positions]`; None where the batch has no weight for each."""
    if batch.weights is None or jnp.ndim(batch.weights) != 2:
        return None
    return jnp.asarray(batch.weights) != 0


def segments(batch: Batch, positions: tuple[int, ...]) -> Array | None:
    """The packed sequence that each position belongs to, `[batch, positions]`, as in `kd.token_batch`, or None.

    None where a feature has other positions, as that of an image beside a text has.
    """
    inputs = batch.inputs
    found = inputs.get("segments") if isinstance(inputs, Mapping) else None
    fits = found is not None and jnp.ndim(found) == 2 and all(found.shape[1] == count for count in positions)
    return jnp.asarray(found) if fits else None
