"""Methods that compare features as they are: attention maps, and relations between the examples of a batch."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError, ShapeError
from kd_jax.methods.base import Method, Parts, Terms, Values
from kd_jax.methods.bounds import Temperature, Weight
from kd_jax.methods.logits import require_teacher
from kd_jax.models import Output


class FeatureMethod(Method):
    """The base of methods that compare one feature of the student with one of the teacher.

    feature: path of the student's. teacher_feature: path of the teacher's, the same where it is None.
    """

    feature: str
    teacher_feature: str | None
    compares_logits: ClassVar[bool] = False

    @property
    def student_features(self) -> tuple[str, ...]:
        """The feature."""
        return (self.feature,)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """The teacher's feature."""
        return (self.teacher_feature or self.feature,)

    def pair(self, student: Output, teacher: Output | None) -> tuple[Any, Any]:
        """Both features."""
        taught = require_teacher(self, teacher)
        return student.features[self.feature], taught.features[self.teacher_features[0]]

    def compare(self, student: Any, teacher: Any, batch: Batch) -> Values:
        """What two features are apart, `[batch]`."""
        raise MethodError(f"{type(self).__name__} compares nothing: define compare(student, teacher, batch)")

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, by the method's name in small letters."""
        return {type(self).__name__.lower(): self.compare(*self.pair(student, teacher), batch)}


def example_weights(batch: Batch) -> Any:
    """One weight for each example, for losses that couple a batch; those of positions are summed. None without."""
    if batch.weights is None:
        return None
    weights = jnp.asarray(batch.weights, jnp.float32)
    return jnp.sum(weights.reshape(weights.shape[0], -1), axis=-1)


def position_weights(method: Method, batch: Batch, *features: Any) -> Array | None:
    """The batch's weights of the positions that features `[batch, *positions, channels]` have in common, else None.

    Raises `MethodError` for sequences that have others: padding would count.
    """
    if batch.weights is None or jnp.ndim(batch.weights) < 2:
        return None
    weights = jnp.asarray(batch.weights, jnp.float32)
    if all(feature.shape[:-1] == weights.shape for feature in features):
        return weights
    check_positions(method, batch, *features)
    return None


def check_positions(method: Method, batch: Batch, *features: Any) -> None:
    """Raises `MethodError` where a batch has weights of positions and a feature is a sequence: padding would count."""
    for feature in features if batch.weights is not None and jnp.ndim(batch.weights) == 2 else ():
        if feature.ndim == 3 and feature.shape[1] > 1:
            raise MethodError(
                f"the batch has weights of the shape {list(jnp.shape(batch.weights))}, and {type(method).__name__} "
                f"would count the padding of the feature {list(feature.shape)}: give one weight for each example, or "
                "take kd.HiddenStates"
            )


@dataclass(frozen=True)
class AT(FeatureMethod):
    """Attention transfer: Zagoruyko and Komodakis (2017), https://arxiv.org/abs/1612.03928. Usual weight: 1000.

    feature, teacher_feature: maps `[batch, *space, channels]`, by their paths; the larger is pooled to the smaller.
    Positions of weight 0 are left out where both have those of the batch's weights.
    """

    feature: str
    teacher_feature: str | None = None
    exponent: Temperature = 2.0

    def compare(self, student: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.at`."""
        student, teacher = _maps(self, student, teacher)
        weights = position_weights(self, batch, student, teacher)
        if weights is None:
            return losses.at(student, teacher, exponent=self.exponent)
        present = weights != 0
        ours, theirs = (jnp.where(present[..., None], one, jnp.zeros_like(one)) for one in (student, teacher))
        axes = tuple(range(1, weights.ndim))
        count = jnp.maximum(jnp.sum(present.astype(jnp.float32), axis=axes), 1)
        return losses.at(ours, theirs, exponent=self.exponent) * (math.prod(weights.shape[1:]) / count)


@dataclass(frozen=True)
class NST(FeatureMethod):
    """Neuron selectivity transfer: Huang and Wang (2017), https://arxiv.org/abs/1707.01219. Usual weight: 50."""

    feature: str
    teacher_feature: str | None = None

    def compare(self, student: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.nst`."""
        return losses.nst(*_maps(self, student, teacher))


def _maps(method: FeatureMethod, student: Any, teacher: Any) -> tuple[Any, Any]:
    """Both features, which must have positions: over a single one, all that is compared is a constant."""
    for path, feature in ((method.feature, student), (method.teacher_features[0], teacher)):
        if feature.ndim < 3:
            raise ShapeError(
                f"the feature {path!r} has the shape {feature.shape}, and {type(method).__name__} compares maps: name "
                "one of the shape [batch, *space, channels]"
            )
    return student, teacher


@dataclass(frozen=True)
class SP(FeatureMethod):
    """Similarity preserving: Tung and Mori (2019), https://arxiv.org/abs/1907.09682. Usual weight: 3000.

    It couples the examples of a batch: the whole one, whatever the devices.
    """

    feature: str
    teacher_feature: str | None = None
    couples_batch: ClassVar[bool] = True

    def compare(self, student: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.sp`."""
        return losses.sp(student, teacher, weights=example_weights(batch))


@dataclass(frozen=True)
class PKT(FeatureMethod):
    """Probabilistic knowledge transfer: Passalis and Tefas (2018), https://arxiv.org/abs/1803.10837.

    Usual weight: 30000. It couples the examples of a batch: the whole one, whatever the devices.
    """

    feature: str
    teacher_feature: str | None = None
    couples_batch: ClassVar[bool] = True

    def compare(self, student: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.pkt`."""
        return losses.pkt(student, teacher, weights=example_weights(batch))


@dataclass(frozen=True)
class RKD(FeatureMethod):
    """Relational KD: Park et al. (2019), https://arxiv.org/abs/1904.05068.

    distance, angle: weights of the two terms, `distance` and `angle`. They couple the examples of a batch: the whole
    one, whatever the devices.
    """

    feature: str
    teacher_feature: str | None = None
    distance: Weight = 25.0
    angle: Weight = 50.0
    couples_batch: ClassVar[bool] = True

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """The two terms with their weights."""
        ours, theirs = self.pair(student, teacher)
        weights = example_weights(batch)
        return {
            "distance": jnp.asarray(self.distance) * losses.rkd_distance(ours, theirs, weights=weights),
            "angle": jnp.asarray(self.angle) * losses.rkd_angle(ours, theirs, weights=weights),
        }


@dataclass(frozen=True)
class Cosine(FeatureMethod):
    """DistilBERT's loss of hidden states: Sanh et al. (2019), https://arxiv.org/abs/1910.01108. One minus the cosine.

    feature, teacher_feature: `[batch, *positions, width]`, of the same width; a value at each position.
    """

    feature: str
    teacher_feature: str | None = None

    def compare(self, student: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.cosine`."""
        return losses.cosine(student, teacher)
