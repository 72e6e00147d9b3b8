"""Methods of several layers at once: ReviewKD's fusion of stages, and SemCKD's attention over pairs of layers."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError
from kd_jax.losses.vectors import unit
from kd_jax.methods import blocks
from kd_jax.methods.base import Method, Parts, Terms, static
from kd_jax.methods.bounds import Bounds, Temperature
from kd_jax.methods.logits import require_teacher
from kd_jax.methods.relations import check_positions, example_weights
from kd_jax.models import Output

Paths = str | tuple[str, ...] | list[str]
"""One path, or several."""


class LayersMethod(Method):
    """The base of methods that compare several features of both networks.

    features: paths of the student's. guides: paths of the teacher's, the same where it is None.
    """

    features: Paths
    guides: Paths | None
    compares_logits: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = True

    @property
    def student_features(self) -> tuple[str, ...]:
        """The student's."""
        return _tuple(self.features)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """The teacher's."""
        return _tuple(self.features if self.guides is None else self.guides)

    def layers(self, student: Output, teacher: Output | None) -> tuple[list[Any], list[Any]]:
        """All features of both."""
        taught = require_teacher(self, teacher).features
        return [student.features[path] for path in self.student_features], [
            taught[path] for path in self.teacher_features
        ]


@dataclass(frozen=True)
class ReviewKD(LayersMethod):
    """Knowledge review: Chen et al. (2021), https://arxiv.org/abs/2104.09044. Usual weight: 1, with a warm-up.

    features, guides: paths of as many stages in both, from the first to the last: maps `[batch, *space, channels]`;
    pooled features `[batch, channels]` may come last. width: channels of the fusion, 512 at most and no more than the
    student's last stage in public code. levels: sizes to which the maps are pooled, too. Batch normalisation in
    the fusion couples the examples of a batch: the whole one, whatever the devices.
    """

    features: Paths
    guides: Paths | None = None
    width: Annotated[int, Bounds(1)] = static(64)
    levels: Annotated[tuple[int, ...], Bounds(1)] = static((4, 2, 1))

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """For each stage a convolution before and one after the fusion, and the gates of all but the last."""
        ours, theirs = self._stages(student, teacher)
        space, learned = ours[0].ndim - 2, []
        for place, (s, t) in enumerate(zip(ours, theirs, strict=True)):
            first, second, third = jax.random.split(jax.random.fold_in(key, place), 3)
            one = {
                "before": blocks.connector(first, s.shape[-1], self.width, space=space),
                "after": blocks.connector(second, self.width, t.shape[-1], size=3, space=space),
            }
            fused = place < len(ours) - 1
            learned.append(
                one | ({"gates": blocks.convolution(third, 2 * self.width, 2, space=space)} if fused else {})
            )
        return Parts(learned)

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `reviewkd`, the sum over the stages."""
        ours, theirs = self._stages(student, teacher)
        check_positions(self, batch, *ours, *theirs)
        weights = example_weights(batch)
        fused: Any = None
        total: Any = None
        for own, s, t in zip(reversed(parts.learned), reversed(ours), reversed(theirs), strict=True):
            x = blocks.connect(own["before"], s, weights)
            if fused is not None:
                upper = losses.resize_nearest(fused, x.shape[1:-1])
                gates = jax.nn.sigmoid(blocks.convolve(own["gates"], jnp.concatenate([x, upper], axis=-1)))
                x = losses.reviewkd_fuse(x, upper, gates)
            fused = losses.resize_nearest(x, t.shape[1:-1])
            value = losses.reviewkd(blocks.connect(own["after"], fused, weights), t, levels=self.levels)
            total = value if total is None else total + value
        return {"reviewkd": total}

    def _stages(self, student: Output, teacher: Output | None) -> tuple[list[Any], list[Any]]:
        """The stages of both, all with as many axes. Raises `MethodError` where their numbers differ."""
        ours, theirs = self.layers(student, teacher)
        if len(ours) != len(theirs) or not ours:
            raise MethodError(
                f"ReviewKD has {len(ours)} features and {len(theirs)} guides: give as many stages of both networks"
            )
        most = max(one.ndim for one in (*ours, *theirs))
        lifted = [[_lifted(one, most) for one in several] for several in (ours, theirs)]
        return lifted[0], lifted[1]


@dataclass(frozen=True)
class SemCKD(LayersMethod):
    """Semantic calibration: Chen et al. (2021), https://arxiv.org/abs/2012.03236. Usual weight: 400.

    features, guides: paths of layers of both, as many as wanted of each: maps `[batch, *space, channels]`. Every layer
    of the student learns from every one of the teacher, weighted by attention that is learned. width: of its queries
    and keys; the batch's size divided by 4 where it is None. They are made from similarities within the batch, so a
    training keeps one size of it; it is the whole one, whatever the devices.
    """

    features: Paths
    guides: Paths | None = None
    width: Annotated[int | None, Bounds(1)] = static(None)
    temperature: Temperature = 1.0

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """Query of each layer of the student, key of each of the teacher, and a projector for each pair."""
        ours, theirs = self.layers(student, teacher)
        batch = ours[0].shape[0]
        width = max(1, batch // 4) if self.width is None else self.width
        keys = jax.random.split(key, 3)

        def embedding(key: Key[Array, ""]) -> Any:
            first, second = jax.random.split(key)
            return [blocks.projector(first, batch, 2 * width), blocks.projector(second, 2 * width, width)]

        def of_pair(key: Key[Array, ""], s: Any, t: Any) -> Any:
            channels, space = t.shape[-1], t.ndim - 2
            first, second = jax.random.split(key)
            inner = blocks.network(first, (s.shape[-1], 2 * channels, 2 * channels), (1, 3), space=space)
            return {"inner": inner, "last": blocks.convolution(second, 2 * channels, channels, space=space)}

        pairs = jax.random.split(keys[2], (len(ours), len(theirs)))
        return Parts({
            "queries": [embedding(one) for one in jax.random.split(keys[0], len(ours))],
            "keys": [embedding(one) for one in jax.random.split(keys[1], len(theirs))],
            "projectors": [[of_pair(pairs[i, j], s, t) for j, t in enumerate(theirs)] for i, s in enumerate(ours)],
        })  # fmt: skip

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `semckd`."""
        ours, theirs = self.layers(student, teacher)
        check_positions(self, batch, *ours, *theirs)
        weights, learned = example_weights(batch), parts.learned
        known, size = learned["queries"][0][0]["kernel"].shape[0], ours[0].shape[0]
        if known != size:
            raise MethodError(
                f"SemCKD began with batches of {known} examples, and this one has {size}: its attention needs one size "
                "of the batch"
            )

        def embedded(own: list[Any], features: list[Any]) -> Array:
            each = []
            for layers, one in zip(own, features, strict=True):
                rows = losses.semckd_similarities(one, weights=weights).astype(jnp.float32)
                each.append(unit(blocks.project(layers[1], jax.nn.relu(blocks.project(layers[0], rows)))))
            return jnp.stack(each, axis=1)

        attention = losses.semckd_attention(
            embedded(learned["queries"], ours), embedded(learned["keys"], theirs), temperature=self.temperature
        )
        projected, targets = [], []
        for own, s in zip(learned["projectors"], ours, strict=True):
            matched = [losses.match_space(s, t) for t in theirs]
            projected.append([
                blocks.convolve(one["last"], blocks.through(one["inner"], pooled, weights))
                for one, (pooled, _) in zip(own, matched, strict=True)
            ])  # fmt: skip
            targets.append([target for _, target in matched])
        return {"semckd": losses.semckd(projected, targets, attention, weights=weights)}


def _tuple(paths: Paths) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths)


def _lifted(features: Any, axes: int) -> Any:
    """With space axes of 1 before the channels; shapes alone will do."""
    shape = (features.shape[0], *(1,) * (axes - features.ndim), *features.shape[1:])
    if isinstance(features, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, features.dtype)
    return features.reshape(shape)
