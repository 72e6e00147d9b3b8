"""Methods of one pair of feature maps through learned convolutions: FSP, FT, AB, OFD, MGD, ICKD, VkD, WKD-F, CAT-KD."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError
from kd_jax.methods import blocks
from kd_jax.methods.base import Method, Parts, Terms, Values, static
from kd_jax.methods.bounds import Bounds, Finite, Share, Temperature, Weight
from kd_jax.methods.logits import require_teacher
from kd_jax.methods.relations import FeatureMethod, check_positions, example_weights, position_weights
from kd_jax.models import Output


class ConnectedMethod(FeatureMethod):
    """The base of methods with a 1 × 1 convolution and batch normalisation of the student's map.

    The normalisation is by the batch, whose examples it couples: the whole one, whatever the devices.
    """

    couples_batch: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """The connector."""
        ours, theirs = self.pair(student, teacher)
        return Parts(blocks.connector(key, ours.shape[-1], theirs.shape[-1], space=ours.ndim - 2))

    def connected(self, connected: Any, teacher: Any, batch: Batch) -> Values:
        """What the connected map and the teacher's are apart."""
        raise MethodError(f"{type(self).__name__} compares nothing: define connected(connected, teacher, batch)")

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, by the method's name in small letters."""
        check_positions(self, batch, *self.pair(student, teacher))
        ours, theirs = losses.match_space(*self.pair(student, teacher))
        connected = blocks.connect(parts.learned, ours, example_weights(batch))
        return {type(self).__name__.lower(): self.connected(connected, theirs, batch)}


@dataclass(frozen=True)
class AB(ConnectedMethod):
    """Activation boundaries: Heo et al. (2019), https://arxiv.org/abs/1811.03233, of values before the ReLU.

    feature, teacher_feature: maps `[batch, *space, channels]`; the larger is average-pooled. The sum over an example's
    elements: RepDistiller's weight is 3/1000, for stage i of n times 2^(i − n). The paper trains by this alone, and by
    labels after it: give it to one training, and its student to the next.
    """

    feature: str
    teacher_feature: str | None = None
    margin: Finite = 1.0

    def connected(self, connected: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.ab`."""
        return losses.ab(connected, teacher, margin=self.margin)


@dataclass(frozen=True)
class ICKD(ConnectedMethod):
    """Inter-channel correlation (ICKD-C): Liu et al. (2021), https://arxiv.org/abs/2202.03680. Usual weight: 2.5.

    feature, teacher_feature: maps `[batch, *space, channels]`; the larger is average-pooled. torchdistill divides by
    the batch once more, and so weighs it less by that factor.
    """

    feature: str
    teacher_feature: str | None = None

    def connected(self, connected: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.ickd`."""
        return losses.ickd(connected, teacher, weights=example_weights(batch))


@dataclass(frozen=True)
class WKDF(ConnectedMethod):
    """WKD-F: Lv et al. (2024), https://arxiv.org/abs/2412.08139. Gaussians of the channels. Usual weight: 0.02.

    feature, teacher_feature: maps `[batch, *space, channels]`. ratio: the weight of the means beside the deviations.
    grid: cells along each axis; each needs two positions.
    """

    feature: str
    teacher_feature: str | None = None
    ratio: Weight = 2.0
    grid: Annotated[int, Bounds(1)] = static(1)

    def connected(self, connected: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.wkd_f`."""
        return losses.wkd_f(connected, teacher, ratio=self.ratio, grid=self.grid)


@dataclass(frozen=True)
class OFD(FeatureMethod):
    """The overhaul of feature distillation: Heo et al. (2019), https://arxiv.org/abs/1904.01866. Usual weight: 1e-3.

    feature, teacher_feature: maps `[batch, *space, channels]` after batch normalisation and before the ReLU; the larger
    is average-pooled. margin: `[channels]`, by `kd.losses.ofd_margin` from the teacher's normalisation; where it is
    None, the mean of the negative values of each channel in the batch, as the paper has it. The sum over an example's
    elements; stage i of n counts 2^(i − n) in the authors' code.
    """

    feature: str
    teacher_feature: str | None = None
    margin: Any = None
    couples_batch: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """The connector, a 1 × 1 convolution with batch normalisation."""
        ours, theirs = self.pair(student, teacher)
        return Parts(blocks.connector(key, ours.shape[-1], theirs.shape[-1], space=ours.ndim - 2))

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `ofd`."""
        check_positions(self, batch, *self.pair(student, teacher))
        weights = example_weights(batch)
        ours, theirs = losses.match_space(*self.pair(student, teacher))
        margin = _mean_of_negatives(theirs, weights) if self.margin is None else jnp.asarray(self.margin)
        return {"ofd": losses.ofd(blocks.connect(parts.learned, ours, weights), theirs, margin)}


@dataclass(frozen=True)
class FSP(Method):
    """Flow of solution procedure: Yim et al. (2017), CVPR, A gift from knowledge distillation. Usual weight: 50.

    first, last: paths of a stage's first and last map of the student. teacher_first, teacher_last: of the teacher,
    the same where they are None. Channels must be the same in both; several stages add up. pool: "max" or "average",
    where sizes differ.
    """

    first: str
    last: str
    teacher_first: str | None = None
    teacher_last: str | None = None
    pool: str = "max"
    compares_logits: ClassVar[bool] = False

    @property
    def student_features(self) -> tuple[str, ...]:
        """Both maps."""
        return (self.first, self.last)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """Both of the teacher."""
        return (self.teacher_first or self.first, self.teacher_last or self.last)

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `fsp`."""
        pools = {"max": losses.max_pool, "average": losses.average_pool}
        if self.pool not in pools:
            raise MethodError(f'pool is {self.pool!r}: use "max" or "average"')
        taught = require_teacher(self, teacher).features
        maps = [student.features[path] for path in self.student_features]
        maps += [taught[path] for path in self.teacher_features]
        check_positions(self, batch, *maps)
        return {"fsp": losses.fsp(*maps, pool=pools[self.pool])}


@dataclass(frozen=True)
class FT(FeatureMethod):
    """Factor transfer: Kim et al. (2018), https://arxiv.org/abs/1802.04977. Usual weight: 200.

    feature, teacher_feature: maps `[batch, *space, channels]`; the larger is average-pooled. rate: the factors' share
    of the teacher's channels. exponent: of the distance. The paraphraser, an autoencoder of the teacher's map, is
    learned by the term `reconstruction` alone, from the first step on; the paper trains it before the student. The term
    `ft` begins after `warmup` steps.
    """

    feature: str
    teacher_feature: str | None = None
    rate: Annotated[float, Bounds(0, 1)] = static(0.5)
    exponent: Temperature = 1.0
    warmup: Weight = 0
    couples_batch: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """Translator, paraphraser, and what makes the map of its factors again."""
        ours, theirs = self.pair(student, teacher)
        channels, space = theirs.shape[-1], theirs.ndim - 2
        factors = max(1, round(channels * self.rate))
        kernels, keys = (3, 3, 3), jax.random.split(key, 3)
        return Parts({
            "translator": blocks.network(keys[0], (ours.shape[-1], *(factors,) * 3), kernels, space=space),
            "paraphraser": blocks.network(keys[1], (channels, channels, factors, factors), kernels, space=space),
            "decoder": blocks.network(keys[2], (factors, factors, channels, channels), kernels, space=space),
        })  # fmt: skip

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `ft` and `reconstruction`."""
        check_positions(self, batch, *self.pair(student, teacher))
        weights = example_weights(batch)

        def through(name: str, maps: Any) -> Any:
            return blocks.through(parts.learned[name], maps, weights, activation=_leaky)

        ours, theirs = losses.match_space(*self.pair(student, teacher))
        factor = through("paraphraser", theirs)
        again = losses.fitnet(through("decoder", factor), theirs)
        apart = losses.ft(through("translator", ours), jax.lax.stop_gradient(factor), exponent=self.exponent)
        begun = step >= jnp.asarray(self.warmup, step.dtype)
        return {"ft": jnp.where(begun, apart, jnp.zeros_like(apart)), "reconstruction": again}


@dataclass(frozen=True)
class MGD(FeatureMethod):
    """Masked generative distillation: Yang et al. (2022), https://arxiv.org/abs/2205.01529. Usual weight: 7e-5.

    feature, teacher_feature: maps `[batch, *space, channels]`; the larger is average-pooled. ratio: the share of
    `masked` "channels" (to classify) or "positions" (to detect, where 0.65 is usual) that is put to 0 in each step,
    before two 3 × 3 convolutions make the teacher's map. The sum over an example's elements.
    """

    feature: str
    teacher_feature: str | None = None
    ratio: Share = 0.15
    masked: str = "channels"

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """A 1 × 1 convolution to the teacher's channels, the two that generate; the key of the masks is carried."""
        ours, theirs = self.pair(student, teacher)
        keys, channels, space = jax.random.split(key, 4), theirs.shape[-1], theirs.ndim - 2
        learned = {"align": blocks.convolution(keys[0], ours.shape[-1], channels, space=space)} | {
            name: blocks.convolution(one, channels, channels, size=3, space=space)
            for name, one in zip(("first", "second"), keys[1:], strict=False)
        }
        return Parts(learned, blocks.stored_key(keys[3]))

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `mgd`."""
        masks = {"channels": losses.mask_channels, "positions": losses.mask_positions}
        if self.masked not in masks:
            raise MethodError(f'masked is {self.masked!r}: use "channels" or "positions"')
        check_positions(self, batch, *self.pair(student, teacher))
        ours, theirs = losses.match_space(*self.pair(student, teacher))
        aligned = blocks.convolve(parts.learned["align"], ours)
        seen = masks[self.masked](blocks.step_key(parts.carried, step), aligned, ratio=self.ratio)
        inner = jax.nn.relu(blocks.convolve(parts.learned["first"], seen))
        return {"mgd": losses.mgd(blocks.convolve(parts.learned["second"], inner), theirs)}


@dataclass(frozen=True)
class VkD(FeatureMethod):
    """VkD: Miles et al. (2024), https://arxiv.org/abs/2403.06213. An orthogonal projector, and a normalised teacher.

    feature, teacher_feature: `[batch, *positions, channels]`; both are averaged over the positions, by their weights
    where the batch has some. parametrisation: "exponential" of a skew matrix, or "cayley".
    """

    feature: str
    teacher_feature: str | None = None
    parametrisation: str = "exponential"

    def init(self, key: Key[Array, ""], student: Output, teacher: Output | None) -> Parts:
        """The free numbers of the projector."""
        ours, theirs = self.pair(student, teacher)
        return Parts(blocks.projector(key, ours.shape[-1], theirs.shape[-1])["kernel"])

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `vkd`."""
        makers = {"exponential": losses.orthogonal_exponential, "cayley": losses.orthogonal_cayley}
        if self.parametrisation not in makers:
            raise MethodError(f'parametrisation is {self.parametrisation!r}: use "exponential" or "cayley"')
        ours, theirs = (_pooled(one.astype(jnp.float32), self, batch) for one in self.pair(student, teacher))
        return {"vkd": losses.vkd(ours @ makers[self.parametrisation](parts.learned), theirs)}


@dataclass(frozen=True)
class CATKD(FeatureMethod):
    """CAT-KD: Guo et al. (2023), https://arxiv.org/abs/2304.12777. Class activation maps. Usual weight: 400.

    feature, teacher_feature: class activation maps `[batch, *space, classes]`. Networks that end in pooling and a
    linear layer have none: return them, `kd.Output(logits, {"cam": kd.losses.class_activation_maps(maps, kernel)})`.
    resolution: what they are pooled to. normalised: whether each class's map is divided by its length; public weights
    for some pairs (15) are without.
    """

    feature: str
    teacher_feature: str | None = None
    resolution: Annotated[int, Bounds(1)] = static(2)
    normalised: bool = True

    def compare(self, student: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.cat_kd`."""
        check_positions(self, batch, student, teacher)
        return losses.cat_kd(student, teacher, resolution=self.resolution, normalised=self.normalised)


def _leaky(maps: Array) -> Array:
    return jax.nn.leaky_relu(maps, 0.1)


def _pooled(features: Array, method: Method, batch: Batch) -> Array:
    """The mean over the positions, by their weights, `[batch, channels]`."""
    weights, axes = position_weights(method, batch, features), tuple(range(1, features.ndim - 1))
    if weights is None:
        return jnp.mean(features, axis=axes)
    weights = weights[..., None]
    total = jnp.sum(weights, axis=axes)
    return jnp.sum(jnp.where(weights == 0, 0, features) * weights, axis=axes) / jnp.where(total == 0, 1, total)


def _mean_of_negatives(maps: Array, weights: Any) -> Array:
    """The mean of the negative values of each channel, `[channels]`; 0 where there is none."""
    share = jnp.ones(maps.shape[0], maps.dtype) if weights is None else jnp.asarray(weights, maps.dtype)
    counts = jnp.where(maps < 0, share.reshape(-1, *(1,) * (maps.ndim - 1)), 0)
    axes = tuple(range(maps.ndim - 1))
    total = jnp.sum(counts, axis=axes)
    return jnp.sum(jnp.where(counts == 0, 0, counts * maps), axis=axes) / jnp.where(total == 0, 1, total)
