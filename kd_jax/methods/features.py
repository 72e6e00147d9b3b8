"""Methods that compare features through a learned projector: FitNet, hidden states, VID, CC, SRD."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError
from kd_jax.methods.base import Method, Parts, Terms, Values, static
from kd_jax.methods.blocks import project, projector
from kd_jax.methods.bounds import Bounds
from kd_jax.methods.logits import require_teacher
from kd_jax.methods.relations import FeatureMethod, check_positions, example_weights, position_weights
from kd_jax.models import Output


@dataclass(frozen=True)
class FitNet(Method):
    """Hints: Romero et al. (2015), https://arxiv.org/abs/1412.6550. Mean squared error after a learned projector.

    hint: path of the student's feature. guided: path of the teacher's, the hint's own where it is None.

    The projector is linear over the channels (a 1 × 1 convolution), made from the shapes and trained with the student.
    Maps of other sizes are resized to the teacher's, bilinearly. Usual weight: 100, as `100 * FitNet(...)`.
    """

    hint: str
    guided: str | None = None
    compares_logits: ClassVar[bool] = False

    @property
    def student_features(self) -> tuple[str, ...]:
        """The hint."""
        return (self.hint,)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """The guided layer."""
        return (self.guided or self.hint,)

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """The projector."""
        ours, theirs = student.features[self.hint], require_teacher(self, teacher).features[self.teacher_features[0]]
        return Parts(projector(key, ours.shape[-1], theirs.shape[-1]))

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `fitnet`: the mean over all but the examples, and the positions where these have weights."""
        hint = student.features[self.hint].astype(jnp.float32)
        target = require_teacher(self, teacher).features[self.teacher_features[0]].astype(jnp.float32)
        weights = batch.weights
        if weights is not None and jnp.ndim(weights) > 1 and hint.shape[:-1] == target.shape[:-1] == weights.shape:
            absent = (weights == 0)[..., None]
            hint, target = (jnp.where(absent, jnp.zeros_like(maps), maps) for maps in (hint, target))
            return {"fitnet": losses.hidden_states(project(parts.learned, hint), target)}
        check_positions(self, batch, hint, target)
        return {"fitnet": losses.fitnet(project(parts.learned, _resized(hint, target.shape, self)), target)}


class ProjectedMethod(FeatureMethod):
    """The base of methods with a linear projector of the student's feature to the teacher's channels."""

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """The projector."""
        ours, theirs = self.pair(student, teacher)
        return Parts(projector(key, ours.shape[-1], theirs.shape[-1]))

    def projected(self, projected: Any, teacher: Any, batch: Batch) -> Values:
        """What the projected feature and the teacher's are apart."""
        raise MethodError(f"{type(self).__name__} compares nothing: define projected(projected, teacher, batch)")

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, by the method's name in small letters."""
        ours, theirs = self.pair(student, teacher)
        return {type(self).__name__.lower(): self.projected(project(parts.learned, ours), theirs, batch)}


@dataclass(frozen=True)
class HiddenStates(ProjectedMethod):
    """Hidden states `[batch, *positions, width]` after a learned projection: TinyBERT, Jiao et al. (2020),
    https://arxiv.org/abs/1909.10351.
    """

    feature: str
    teacher_feature: str | None = None

    def projected(self, projected: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.hidden_states`, at each position."""
        return losses.hidden_states(projected, teacher)


@dataclass(frozen=True)
class SRD(ProjectedMethod):
    """The simple recipe: Miles and Mikolajczyk (2024), https://arxiv.org/abs/2303.11098, on features `[batch, dim]`.

    It couples the examples of a batch: the whole one, whatever the devices.
    """

    feature: str
    teacher_feature: str | None = None
    couples_batch: ClassVar[bool] = True

    def projected(self, projected: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.srd`."""
        return losses.srd(projected, teacher, weights=example_weights(batch))


@dataclass(frozen=True)
class VID(FeatureMethod):
    """Variational information distillation: Ahn et al. (2019), https://arxiv.org/abs/1904.05835. Usual weight: 1.

    The mean is a linear map over the channels, and the variance one number a channel; both are learned. A value at each
    position where both features have those of the batch's weights.
    """

    feature: str
    teacher_feature: str | None = None

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """The map of the mean, and the variances, which start at 5."""
        ours, theirs = self.pair(student, teacher)
        mean = projector(key, ours.shape[-1], theirs.shape[-1])
        return Parts({"mean": mean, "variance": losses.vid_variance(theirs.shape[-1])})

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `vid`."""
        ours, theirs = self.pair(student, teacher)
        weights = position_weights(self, batch, ours, theirs)
        if weights is not None:
            # Each position as an example.
            ours, theirs = (one.reshape(-1, one.shape[-1]) for one in (ours, theirs))
        mean = project(parts.learned["mean"], _resized(ours.astype(jnp.float32), theirs.shape, self))
        values = losses.vid(mean, theirs, parts.learned["variance"])
        return {"vid": values if weights is None else values.reshape(weights.shape)}


@dataclass(frozen=True)
class CC(FeatureMethod):
    """Correlation congruence: Peng et al. (2019), https://arxiv.org/abs/1904.01802. Usual weight: 0.02.

    width: of the two learned linear embeddings. It couples neighbours in a batch.
    """

    feature: str
    teacher_feature: str | None = None
    width: Annotated[int, Bounds(1)] = static(128)
    couples_batch: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """Both embeddings."""
        ours, theirs = (math.prod(one.shape[1:]) for one in self.pair(student, teacher))
        first, second = jax.random.split(key)
        return Parts({"student": projector(first, ours, self.width), "teacher": projector(second, theirs, self.width)})

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `cc`."""
        flat = (one.reshape(one.shape[0], -1) for one in self.pair(student, teacher))
        ours, theirs = (project(parts.learned[who], one) for who, one in zip(("student", "teacher"), flat, strict=True))
        return {"cc": losses.cc(ours, theirs, weights=example_weights(batch))}


def _resized(maps: Float[Array, "..."], shape: tuple[int, ...], method: Method) -> Float[Array, "..."]:
    """The maps in the size of others `[batch, *space, channels]`. Raises `MethodError` for another rank."""
    if maps.ndim != len(shape):
        raise MethodError(
            f"{type(method).__name__}: the student's feature has the shape {maps.shape} and the teacher's {shape}: "
            "choose two with the same number of axes"
        )
    if maps.shape[1:-1] == shape[1:-1]:
        return maps
    return jax.image.resize(maps, (maps.shape[0], *shape[1:-1], maps.shape[-1]), "bilinear")
