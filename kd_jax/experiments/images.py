"""How the experiments train on images: bytes and shifts, with a rate and a method that may be a grid."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, UInt8

from kd_jax.convolution import canonical
from kd_jax.data import shifts
from kd_jax.data.batch import Batch
from kd_jax.data.mixing import mixes
from kd_jax.errors import ConfigError, ShapeError
from kd_jax.losses import cross_entropy
from kd_jax.methods import Method
from kd_jax.models import Network, Output
from kd_jax.models.predict import outputs_in_batches
from kd_jax.optimizers import adam
from kd_jax.teacher import CachedTeacher, LiveTeacher, Teacher
from kd_jax.train import fit
from kd_jax.train import step as core
from kd_jax.train.measures import accuracy
from kd_jax.train.step import Training, TrainState

PyTree = Any


class Images(NamedTuple):
    """What is trained on, all of it on the device.

    images: bytes, scaled to [0, 1] inside the step. labels: in [0, classes).
    logits: the teacher's, looked up by the same index as the image; None without a teacher. Where the images are
        shifted, `[views, examples, classes]`, in the order of `shifts.all_views`, and the images are padded.
    teacher: in the place of its logits one that answers inside the step, for methods that compare features.
    places: where each example is among the images, which are some of all then; None where they are all, in their order.
    """

    images: UInt8[Array, "images height width channels"]
    labels: Int[Array, " examples"]
    logits: Float[Array, "..."] | None = None
    teacher: LiveTeacher | None = None
    places: Int[Array, " examples"] | None = None


class Settings(NamedTuple):
    """The numbers of a training, as arrays: a grid of them is a `vmap`, without compiling again.

    learning_rate: of the optimiser. method: its numbers are leaves.
    """

    learning_rate: float | Float[Array, "..."]
    method: Method


class Setup(NamedTuple):
    """What is compiled into a training.

    optimizer: `optimizer(learning_rate) -> optax.GradientTransformation`; it is given a number or a schedule.
    dtype: of the scaled images, and so of what is computed with parameters of the same type.
    schedule: `schedule(steps done) -> factor` of the learning rate; None for a constant one.
    shift: images are moved by up to so many pixels, anew in every step, and the teacher's logits are of that view.
    shift_share: the probability, above 0, that an image's view is drawn in a step, all views being equally likely, its
        own place included; the others stay where they are.
    prepare: of the scaled images, inside the step, before student and teacher see them; the teacher is then a live one.
    """

    network: Network
    optimizer: Callable[..., optax.GradientTransformation] = adam
    batch_size: int = 32
    dtype: Any = jnp.float32
    schedule: Callable[[Float[Array, ""]], Float[Array, ""]] | None = None
    shift: int = 0
    shift_share: float = 1.0
    prepare: core.Prepare | None = None


class Metrics(NamedTuple):
    """Of the batches of some steps, in training mode, before each update: means over the steps, or one for each.

    loss: the minimised loss. cross_entropy: the hard loss alone, in nats. accuracy: fraction of right answers.
    """

    loss: Float[Array, "*steps"]
    cross_entropy: Float[Array, "*steps"]
    accuracy: Float[Array, "*steps"]


def scale(images: UInt8[Array, "*shape"], dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """Bytes as numbers in [0, 1]. Raises `ValueError` for what are no bytes, which may be scaled already."""
    if images.dtype != jnp.uint8:
        raise ValueError(f"images are of type {images.dtype}: give bytes (uint8), which are divided by 255 here")
    return images.astype(dtype) / 255


def prepare(key: Key[Array, ""], images: UInt8[Array, "*shape"], train: bool) -> Float[Array, "*shape"]:
    """`scale`, as `kd.predict` and `kd.distill` take it."""
    return scale(images)


def padded(images: Images, shift: int) -> Images:
    """The images as a training with such a shift takes them; those on the disk when they are brought."""
    if not shift or is_on_disk(images):
        return images
    return images._replace(images=shifts.pad(images.images, shift))


def is_on_disk(images: Images) -> bool:
    """Whether the images are read as they are needed."""
    return isinstance(images.images, np.memmap)


def of_steps(images: Images, rows: Int[np.ndarray, "..."], shift: int) -> Images:
    """Of images on the disk those that some steps see. Their number is that of `shapes_of_steps`."""
    own = np.unique(rows)
    pixels = np.zeros((min(rows.size, len(images.labels)), *images.images.shape[1:]), np.uint8)
    pixels[: len(own)] = images.images[own]
    places = np.zeros(len(images.labels), np.int32)
    places[own] = np.arange(len(own), dtype=np.int32)
    wide = np.pad(pixels, ((0, 0), (shift, shift), (shift, shift), (0, 0))) if shift else pixels
    return images._replace(images=jnp.asarray(wide), places=jnp.asarray(places))


def shapes_of_steps(images: Images, count: int, shift: int) -> Images:
    """The shapes of `of_steps` for `count` rows."""
    height, width, channels = images.images.shape[1:]
    some = (min(count, len(images.labels)), height + 2 * shift, width + 2 * shift, channels)
    of_some: dict[str, Any] = {
        "images": jax.ShapeDtypeStruct(some, jnp.uint8),
        "places": jax.ShapeDtypeStruct((len(images.labels),), jnp.int32),
    }
    return jax.eval_shape(lambda tree: tree, images._replace(**of_some))


@partial(jax.jit, static_argnames=("network", "batch_size", "dtype", "shift"))
def predict(
    variables: PyTree,
    images: UInt8[Array, "examples height width channels"],
    *,
    network: Network,
    batch_size: int = 1000,
    dtype: Any = jnp.float32,
    shift: int = 0,
) -> Float[Array, "examples classes"]:
    """Logits in evaluation mode (no dropout, carried statistics), `batch_size` images at a time, scaled in `dtype`.

    shift: where it is not 0, the logits are means over the (2 shift + 1)² views of an image that is moved by up to so
    many pixels, with 0 where there was none (test-time augmentation); `teacher_logits` gives those of every view.
    Raises `ValueError` where it is negative or would move an image out of sight.
    """
    smallest = min(images.shape[1:3], default=0)
    if shift and not 0 < shift < smallest:
        raise ValueError(
            f"shift is {shift}: it must be from 0 to {smallest - 1}, less than the images' {smallest} pixels"
        )
    if not shift:
        output = outputs_in_batches(
            network, variables, images, batch_size=batch_size, prepare=lambda key, batch, train: scale(batch, dtype)
        )
        return output.logits
    count = shifts.view_count(shift)

    def view(number: Array) -> Float[Array, "examples classes"]:
        return predict(
            variables, shifts.view(wide, number, shift=shift), network=network, batch_size=batch_size, dtype=dtype
        )

    wide = shifts.pad(images, shift)
    total = jax.lax.fori_loop(1, count, lambda number, total: total + view(number), view(jnp.int32(0)))
    return total / count


@partial(jax.jit, static_argnames="network")
def predict_each(
    variables: PyTree, images: UInt8[Array, "examples height width channels"], *, network: Network
) -> Float[Array, "networks examples classes"]:
    """Logits of several networks, whose variables have a leading axis."""

    def each(variables: PyTree, images: UInt8[Array, "..."]) -> Float[Array, "..."]:
        return jax.vmap(partial(predict, network=network), in_axes=(0, None))(variables, images)

    return canonical(each)(variables, images)


def teacher_logits(
    variables: PyTree, images: Any, *, network: Network,
    shift: int = 0,
) -> Float[Array, "..."]:  # fmt: skip
    """What the teacher says of every image, or, with a shift, of every view of it: `[views, examples, classes]`.

    `predict` with a shift gives the mean of them instead.
    """
    if isinstance(images, np.memmap):
        blocks = (jnp.asarray(images[first : first + _BLOCK]) for first in range(0, len(images), _BLOCK))
        parts = [teacher_logits(variables, block, network=network, shift=shift) for block in blocks]
        return jnp.concatenate(parts, axis=-2)
    if not shift:
        return predict(variables, images, network=network)
    views = shifts.all_views(shifts.pad(images, shift), shift=shift)
    return jnp.stack([predict(variables, view, network=network) for view in views])


def init(key: Key[Array, ""], settings: Settings, *, setup: Setup, data: Images | None = None) -> TrainState:
    """The state before the first step. The network's initial parameters depend on `key` alone, not on the method.

    data: for methods that learn or carry something; shapes are enough.
    """
    training, method = _training(settings, setup), settings.method
    if data is None or type(method).init is Method.init:
        return core.init(key, training, method)
    rows = jax.ShapeDtypeStruct((setup.batch_size,), jnp.int32)
    batch, teacher = jax.eval_shape(
        lambda data, rows: _look_up(data, rows, jnp.int32(0), jax.random.key(0), setup), data, rows
    )
    return core.init(key, training, method, batch, teacher)


def train_step(
    state: TrainState,
    key: Key[Array, ""],
    data: Images,
    rows: Int[Array, " batch"],
    settings: Settings,
    *,
    setup: Setup,
) -> tuple[TrainState, Metrics]:
    """One update by the mean loss of the images `rows`. `key` is the training's; the step derives its own from it."""
    batch, teacher = _look_up(data, rows, state.step, key, setup)
    state, metrics = core.step(state, batch, teacher, key, settings.method, training=_training(settings, setup))
    return state, Metrics(*(metrics[name] for name in Metrics._fields))


def scan_steps(
    state: TrainState, key: Key[Array, ""], data: Images, order: Int[Array, "steps batch"], settings: Settings,
    *, setup: Setup,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """One step for each row of `order`, as one compiled loop; the metrics have a leading axis of steps.

    Raises `ValueError` where the parts of `data` do not fit together, or the setup's `shift_share` is none.
    """
    _check(data, setup)
    state, metrics = fit.loop(
        state, key, lambda rows, step: _look_up(data, rows, step, key, setup), order, settings.method,
        training=_training(settings, setup),
    )  # fmt: skip
    return state, Metrics(*(metrics[name] for name in Metrics._fields))


def _training(settings: Settings, setup: Setup) -> Training:
    rate: Any = settings.learning_rate
    if setup.schedule is not None:
        factor, whole = setup.schedule, jnp.asarray(settings.learning_rate)

        def rate(count: Int[Array, ""]) -> Float[Array, ""]:
            return whole * jnp.asarray(factor(count.astype(jnp.float32)), whole.dtype)

    return Training(setup.network, setup.optimizer(rate), setup.prepare, _MEASURES)


def _check(data: Images, setup: Setup) -> None:
    """JAX itself reads the last row in place of one that is missing, and says nothing."""
    if not 0 < setup.shift_share <= 1:
        raise ConfigError(f"shift_share is {setup.shift_share}: it must be above 0 and at most 1")
    count = len(data.images if data.places is None else data.places)
    if len(data.labels) != count:
        raise ShapeError(f"there are {count} images and {len(data.labels)} labels: give one label for each image")
    if data.logits is None:
        return
    places = (shifts.view_count(setup.shift), count) if setup.shift else (count,)
    if data.logits.shape[:-1] != places:
        raise ShapeError(
            f"the teacher's logits have the shape {data.logits.shape}: images that are "
            f"{'shifted need them of every view' if setup.shift else 'not shifted need them once'}, {places}"
        )


def _look_up(
    data: Images, rows: Int[Array, " batch"], step: Int[Array, ""], key: Key[Array, ""], setup: Setup
) -> tuple[Batch, Teacher | None]:
    """The scaled images of a step, their labels, and what the teacher says of them."""
    labels, where = data.labels[rows], rows if data.places is None else data.places[rows]
    if not setup.shift:
        logits = None if data.logits is None else data.logits[rows]
        pixels = scale(data.images[where], setup.dtype)
    else:
        view_key = jax.random.fold_in(jax.random.fold_in(key, _VIEW), step)
        chosen = shifts.draw(view_key, len(rows), setup.shift)
        if setup.shift_share < 1:
            moves_key = jax.random.fold_in(jax.random.fold_in(key, _MOVES), step)
            chosen = shifts.some(moves_key, chosen, setup.shift, setup.shift_share)
        logits = None if data.logits is None else data.logits[chosen, rows]
        pixels = scale(shifts.views(data.images, where, chosen, shift=setup.shift), setup.dtype)
    # A mixed image is none of the rows.
    batch = Batch(pixels, labels, indices=None if mixes(setup.prepare) else rows)
    if data.teacher is not None:
        return batch, data.teacher
    return batch, None if logits is None else CachedTeacher(Output(logits))


def _cross_entropy(student: Output, batch: Batch, taught: tuple[Output, ...]) -> Float[Array, " batch"]:
    return cross_entropy(student.logits, batch.labels)


_MEASURES = (("cross_entropy", _cross_entropy), ("accuracy", accuracy))

# What a key is folded with for the views of a step, and for who is moved; the other numbers are in `train.step`.
_VIEW, _MOVES = 3, 4
# Images on the disk that the teacher is asked about at once.
_BLOCK = 10_000
