"""Methods that compare features: FitNet."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError
from kd_jax.methods.base import Method, Parts, Terms
from kd_jax.methods.logits import require_teacher
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
        """A kernel `[student's channels, teacher's channels]`, uniform in ±1/√channels, and a bias of 0."""
        ours = student.features[self.hint].shape[-1]
        theirs = require_teacher(self, teacher).features[self.teacher_features[0]].shape[-1]
        bound = 1 / math.sqrt(ours)
        kernel = jax.random.uniform(key, (ours, theirs), jnp.float32, -bound, bound)
        return Parts({"kernel": kernel, "bias": jnp.zeros(theirs, jnp.float32)})

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `fitnet`: the mean over all but the examples, and the positions where these have weights."""
        hint = student.features[self.hint].astype(jnp.float32)
        target = require_teacher(self, teacher).features[self.teacher_features[0]].astype(jnp.float32)
        positions = jnp.ndim(batch.weights) if batch.weights is not None else 1
        if positions > 1 and hint.shape[:-1] == target.shape[:-1] == batch.weights.shape:
            absent = (batch.weights == 0)[..., None]
            hint, target = (jnp.where(absent, jnp.zeros_like(maps), maps) for maps in (hint, target))
        else:
            positions = 1
        projected = _resized(hint, target.shape, self) @ parts.learned["kernel"]
        projected = projected + parts.learned["bias"].reshape((1,) * (projected.ndim - 1) + (-1,))
        return {"fitnet": jnp.mean((projected - target) ** 2, axis=tuple(range(positions, target.ndim)))}


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
