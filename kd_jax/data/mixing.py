"""Mixup and CutMix: examples of a batch are mixed in pairs, and their labels with them, inside the compiled step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kd_jax.data.batch import Batch, take
from kd_jax.errors import ConfigError, ShapeError

PyTree = Any
Scalar = float | int
Share = Float[Array, ""]
Rows = Int[Array, " batch"]


class Mixed(NamedTuple):
    """Labels of mixed examples, until the number of classes is known: own share + other (1 − share)."""

    own: PyTree
    other: PyTree
    share: Float[Array, " batch"]

    def soft(self, fit: Callable[[PyTree], PyTree], logits: Array) -> Array:
        """As floats: `[batch, ..., classes]` of whole numbers. fit: labels of one kind as they fit the logits."""
        own, other = (_as_floats(one, fit, logits) for one in (self.own, self.other))
        share = _broadened(self.share, own.ndim).astype(own.dtype)
        # A label of another that does not count may be anything.
        return jnp.where(share == 1, own, own * share + other * (1 - share))


def mixup(alpha: Scalar = 0.2) -> "_Mixing":
    r"""Mixup: $\tilde x = \lambda x_i + (1 - \lambda) x_j$, and labels likewise; $\lambda \sim Beta(\alpha, \alpha)$.

    Zhang, Cissé, Dauphin and Lopez-Paz (2018), https://arxiv.org/abs/1710.09412. For `prepare=`, behind
    `kd.augment.normalise` in a `kd.augment.chain`. As in the authors' code a step has one λ, and i's partner j is
    drawn from the same batch, whose shuffled rows they are.

    Inputs are floats of any shape, or several arrays of them. The teacher sees what the student sees. Whole numbers
    as labels become soft labels `[batch, ..., classes]`; labels that are floats are mixed as they are; without labels
    there are none. An example counts λ w_i + (1 − λ) w_j, and its labels have their parts of that: with cross entropy
    the loss is the weighted sum of both labels' losses. What has the weight 0 is mixed with nothing. In evaluation
    nothing is mixed.

    alpha: of the Beta distribution, above 0: λ is near 0 or 1 where it is small. Raises `ConfigError`.
    """
    return _Mixing(_checked_alpha(alpha), 1.0, cut=False)


def cutmix(alpha: Scalar = 1.0, probability: Scalar = 1.0) -> "_Mixing":
    r"""CutMix: a box of another image is put into each, and labels are mixed by the area: λ is the part that stays.

    Yun, Han, Oh, Chun, Choe and Yoo (2019), https://arxiv.org/abs/1905.04899, algorithm A1: $\lambda \sim Beta(\alpha,
    \alpha)$; the box is $\sqrt{1 - \lambda}$ of the image wide and high around a place that is drawn evenly; what lies
    outside of the image is cut off, edges are rounded to pixels, and λ becomes 1 − box / image. A step has one box.

    Of images `[batch, height, width, channels]` of any type. All else is as with `kd.augment.mixup`.

    alpha: of the Beta distribution, above 0. probability: of a step to have a box at all, 0 to 1 (the authors took 0.5
    for CIFAR). Raises `ConfigError`.
    """
    return _Mixing(_checked_alpha(alpha), checked_probability(probability), cut=True)


def prepared(prepare: Any, batch: Batch, key: Key[Array, ""]) -> Batch:
    """A batch as a training step sees it. prepare: None, or a function of the inputs, or what has an `of_batch`."""
    if prepare is None:
        return batch
    if hasattr(prepare, "of_batch"):
        return prepare.of_batch(key, batch)
    return batch._replace(inputs=prepare(key, batch.inputs, True))


def mixes(prepare: Any) -> bool:
    """Whether examples are mixed, so that what is known of one of them says nothing of the batch."""
    return bool(getattr(prepare, "mixes", False))


@dataclass(frozen=True)
class _Mixing:
    """Equal by value. cut: whether boxes are mixed in place of pixels."""

    alpha: float
    probability: float
    cut: bool

    mixes = True

    def __call__(self, key: Any, inputs: Any, train: bool) -> Any:
        """In evaluation the inputs themselves."""
        if train:
            raise ConfigError(
                f"{self._name} changes labels, too, which a prepare of your own does not have: chain it after that, "
                f"prepare=kd.augment.chain(yours, kd.augment.{self._name}(…))"
            )
        return inputs

    def of_batch(self, key: Key[Array, ""], batch: Batch) -> Batch:
        """The mixed batch, with `Mixed` labels. Raises `ShapeError` or `ConfigError` for what cannot be mixed."""
        _check_labels(batch.labels, self)
        batch = jax.tree.map(jnp.asarray, batch)
        count = jax.tree.leaves(batch.inputs)[0].shape[0]
        if batch.indices is not None:
            raise ConfigError(
                f"the batch has indices, and a mixed example is none of the rows: leave out these or {self._name}"
            )
        share_key, pair_key, place_key, whether_key = jax.random.split(key, 4)
        partners = jax.random.permutation(pair_key, count)
        share = jax.random.beta(share_key, self.alpha, self.alpha, dtype=jnp.float32)
        if self.cut:
            whether = jax.random.bernoulli(whether_key, jnp.float32(self.probability))
            images = _checked_images(batch.inputs)
            box = _box(place_key, share, images.shape[1:3]) & whether[None, None]
            share = 1 - jnp.mean(box.astype(jnp.float32))
        weights, paired, shares = _shared(batch.weights, partners, share)

        def mixed(leaf: Array) -> Array:
            if self.cut:
                return jnp.where(_broadened(paired, leaf.ndim) & box[None, :, :, None], leaf[partners], leaf)
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ConfigError(
                    f"inputs of the type {leaf.dtype} cannot be mixed: make floats of them before mixup, by "
                    "kd.augment.normalise in a kd.augment.chain"
                )
            both = leaf * share.astype(leaf.dtype) + leaf[partners] * (1 - share).astype(leaf.dtype)
            return jnp.where(_broadened(paired, leaf.ndim), both, leaf)

        labels = batch.labels
        if labels is not None:
            labels = Mixed(labels, take(labels, partners), shares)
        return Batch(jax.tree.map(mixed, batch.inputs), labels, weights)

    @property
    def _name(self) -> str:
        return "cutmix" if self.cut else "mixup"


def _box(key: Key[Array, ""], share: Share, shape: tuple[int, ...]) -> Array:
    """`[height, width]`, True in a box of the area 1 − share around a place that is drawn evenly."""
    inside = []
    for length, own in zip(shape, jax.random.split(key), strict=True):
        middle, extent = jax.random.uniform(own, dtype=jnp.float32) * length, jnp.sqrt(1 - share) * length
        first, last = (jnp.round(jnp.clip(middle + side * extent / 2, 0, length)) for side in (-1, 1))
        places = jnp.arange(length, dtype=jnp.float32)
        inside.append((places >= first) & (places < last))
    return inside[0][:, None] & inside[1][None]


def _shared(weights: Any, partners: Rows, share: Share) -> tuple[Any, Array, Array]:
    """The weights of mixed examples; which of them are mixed; and the part of each example's own label."""
    if weights is None:
        return None, jnp.ones(partners.shape, bool), jnp.broadcast_to(share[None], partners.shape)
    own = weights
    if own.ndim != 1:
        raise ShapeError(f"the weights have the shape {own.shape}: mixed examples have one for each example, (batch,)")
    own = own if jnp.issubdtype(own.dtype, jnp.floating) else own.astype(jnp.float32)
    share = share.astype(own.dtype)
    other = own[partners]
    paired = (own != 0) & (other != 0)
    total = jnp.where(paired, own * share + other * (1 - share), own)
    return total, paired, jnp.where(paired, own * share / jnp.where(paired, total, 1), 1)


def _check_labels(labels: Any, mixing: _Mixing) -> None:
    if labels is None or isinstance(labels, Mixed):
        return
    if not hasattr(labels, "dtype"):
        raise ConfigError(f"the labels are a {type(labels).__name__}: {mixing._name} mixes those of one array")
    column = labels.ndim == 2 and labels.shape[-1] == 1
    if mixing.cut and jnp.issubdtype(labels.dtype, jnp.integer) and labels.ndim > 1 and not column:
        raise ShapeError(f"the labels have the shape {labels.shape}: give cutmix one label for each image")


def _as_floats(labels: PyTree, fit: Callable[[PyTree], PyTree], logits: Array) -> Array:
    """Labels `[batch, ..., classes]`; a whole number that names no class is NaN, as its loss is."""
    if isinstance(labels, Mixed):
        return labels.soft(fit, logits)
    labels, kind = fit(labels), jnp.promote_types(logits.dtype, jnp.float32)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return labels
    classes = logits.shape[-1]
    if classes == 1:
        return labels.astype(kind)[..., None]
    named = ((labels >= 0) & (labels < classes))[..., None]
    return jnp.where(named, jax.nn.one_hot(labels, classes, dtype=kind), jnp.nan)


def _checked_alpha(alpha: Any) -> float:
    if not (_is_number(alpha) and 0 < alpha < float("inf")):
        raise ConfigError(f"alpha is {alpha!r}: it must be a number above 0, and finite")
    return float(alpha)


def checked_probability(probability: Any) -> float:
    """As a number of Python. Raises `ConfigError` for one outside of 0 to 1."""
    if not (_is_number(probability) and 0 <= probability <= 1):
        raise ConfigError(f"probability is {probability!r}: it must be a number from 0 to 1")
    return float(probability)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.ndarray | jax.Array) and np.ndim(value) == 0


def _checked_images(inputs: PyTree) -> Array:
    if getattr(inputs, "ndim", None) != 4:
        shown = f"of the shape {inputs.shape}" if hasattr(inputs, "shape") else f"a {type(inputs).__name__}"
        raise ShapeError(f"the inputs are {shown}: cutmix takes images [batch, height, width, channels]")
    return inputs


def _broadened(array: Array, ndim: int) -> Array:
    """With axes of 1 behind its own."""
    return array.reshape(array.shape + (1,) * (ndim - array.ndim))
