"""Training as pure functions: `TrainState`, `train_step`, `train_epoch` (one `lax.scan`) and `fit`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, UInt8

from kd_jax.data import shifts as augment
from kd_jax.losses import cross_entropy
from kd_jax.methods.logits import CROSS_ENTROPY, Method
from kd_jax.models.network import Network, Output, Params, State, count_parameters
from kd_jax.optimizers import adam
from kd_jax.train import transpose as layout

PyTree = Any

# Several steps in each turn of the loop let XLA avoid copies of the carried parameters: two save 12 to 23 % on a CPU.
# Four save another 10 to 20 % with small networks, and cost as much with large ones (results/throughput/findings.md).
# Small networks are those that gain by `layout`, too.
_UNROLL, _UNROLL_SMALL, _SMALL = 2, 4, 100_000


class Examples(NamedTuple):
    """What is trained on, all of it on the device.

    images: bytes, scaled to [0, 1] inside the step. labels: in [0, classes).
    teacher: the teacher's `Output` for every example, looked up by the same index as the image; None without a teacher.
        Where the images are shifted, `[views, examples, ...]`, in the order of `augment.all_views`.
    """

    images: UInt8[Array, "examples height width channels"]
    labels: Int[Array, " examples"]
    teacher: Output | None = None


class Hyperparameters(NamedTuple):
    """Numbers that a training depends on, as arrays, so that a grid of them is a `vmap` without compiling again.

    learning_rate: of the optimiser. weights: the method's own (`KDWeights`, say).
    """

    learning_rate: float | Float[Array, ""]
    weights: PyTree = ()


class Recipe(NamedTuple):
    """What is compiled into a training.

    optimizer: `optimizer(learning_rate) -> optax.GradientTransformation`, for example `optax.sgd`.
    dtype: of the scaled images, and so of what is computed with parameters of the same type.
    schedule: `schedule(steps done) -> factor` of the learning rate, as optax has them; None for a constant one.
    shift: images are moved by up to so many pixels, anew in every step, and the teacher's outputs are of that view.
    shift_share: the probability, above 0, that an image's view is drawn in a step, all views being equally likely, its
        own place included; the others stay where they are.
    """

    network: Network
    method: Method = CROSS_ENTROPY
    optimizer: Callable[..., optax.GradientTransformation] = adam
    batch_size: int = 32
    dtype: Any = jnp.float32
    schedule: Callable[[Float[Array, ""]], Float[Array, ""]] | None = None
    shift: int = 0
    shift_share: float = 1.0


class TrainState(NamedTuple):
    """What a step changes. params: the network's. learned: the method's. state: batch statistics. step: steps done."""

    params: Params
    learned: PyTree
    state: State
    optimizer_state: PyTree
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """Of the batches of some steps, in training mode, before each update: means over the steps, or one for each.

    loss: the minimised loss. cross_entropy: the hard loss alone, in nats. accuracy: fraction of right answers.
    """

    loss: Float[Array, "*steps"]
    cross_entropy: Float[Array, "*steps"]
    accuracy: Float[Array, "*steps"]


def init(key: Key[Array, ""], hyperparameters: Hyperparameters, *, recipe: Recipe) -> TrainState:
    """The state before the first step. The network's initial parameters depend on `key` alone, not on the method."""
    network_key, method_key = jax.random.split(jax.random.fold_in(key, _INIT))
    params, state = recipe.network.init(network_key)
    learned = recipe.method.init(method_key)
    optimizer_state = recipe.optimizer(hyperparameters.learning_rate).init((params, learned))
    return TrainState(params, learned, state, optimizer_state, jnp.zeros((), jnp.int32))


def scale(images: UInt8[Array, "*shape"], dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """Bytes as numbers in [0, 1]. Raises `ValueError` for what are no bytes, which may be scaled already."""
    if images.dtype != jnp.uint8:
        raise ValueError(f"images are of type {images.dtype}: give bytes (uint8), which kd_jax itself divides by 255")
    return images.astype(dtype) / 255


def train_step(
    train_state: TrainState,
    key: Key[Array, ""],
    examples: Examples,
    rows: Int[Array, " batch"],
    hyperparameters: Hyperparameters,
    *,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """One update by the mean loss of the examples `rows`. `key` is the training's; the step derives its own from it.

    With `recipe.shift`, `examples.images` are padded (`augment.pad`).
    """
    images, teacher = _looked_up(train_state, key, examples, rows, recipe)
    labels = examples.labels[rows]
    step_key = jax.random.fold_in(jax.random.fold_in(key, _STEP), train_state.step)

    def mean_loss(trained: tuple[Params, PyTree]) -> tuple[Array, tuple[State, Metrics]]:
        params, learned = trained
        output, state = recipe.network.apply(params, train_state.state, images, train=True, key=step_key)
        loss = jnp.mean(recipe.method.loss(hyperparameters.weights, learned, output, teacher, labels))
        return loss, (state, _metrics(loss, output, labels))

    trained = (train_state.params, train_state.learned)
    gradients, (state, metrics) = jax.grad(mean_loss, has_aux=True)(trained)
    optimizer = recipe.optimizer(_learning_rate(hyperparameters, train_state.step, recipe))
    updates, optimizer_state = optimizer.update(gradients, train_state.optimizer_state, trained)
    params, learned = optax.apply_updates(trained, updates)
    return TrainState(params, learned, state, optimizer_state, train_state.step + 1), metrics


def epoch_order(
    key: Key[Array, ""], epoch: int | Int[Array, ""], *, examples: int, batch_size: int
) -> Int[Array, "steps batch"]:
    """The rows of every batch of an epoch: a fresh shuffle of all examples, without the last, incomplete batch.

    Raises `ValueError` where there is no whole batch.
    """
    if batch_size > examples:
        raise ValueError(f"batch_size is {batch_size}: it must be at most the {examples} examples")
    order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, _ORDER), epoch), examples)
    steps = examples // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def scan_steps(
    train_state: TrainState,
    key: Key[Array, ""],
    examples: Examples,
    order: Int[Array, "steps batch"],
    hyperparameters: Hyperparameters,
    *,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """One step for each row of `order`, as one `lax.scan`; the metrics have a leading axis of steps.

    Raises `ValueError` where `examples` do not fit together, or the recipe's `shift_share` is none.
    """
    _check(examples, recipe)
    small = count_parameters(train_state.params) < _SMALL
    turn = None
    if small and layout.pays(recipe.optimizer):
        turn, recipe = _turned(train_state, hyperparameters, recipe)

    def step(state: TrainState, rows: Int[Array, " batch"]) -> tuple[TrainState, Metrics]:
        return train_step(state, key, examples, rows, hyperparameters, recipe=recipe)

    first = turn(train_state) if turn else train_state
    last, metrics = jax.lax.scan(step, first, order, unroll=_UNROLL_SMALL if small else _UNROLL)
    return turn(last) if turn else last, metrics


def train_steps(
    train_state: TrainState,
    key: Key[Array, ""],
    examples: Examples,
    order: Int[Array, "steps batch"],
    hyperparameters: Hyperparameters,
    *,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """`scan_steps`, with the means of the metrics over the steps."""
    train_state, metrics = scan_steps(train_state, key, examples, order, hyperparameters, recipe=recipe)
    return train_state, jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)


def train_epoch(
    train_state: TrainState,
    key: Key[Array, ""],
    examples: Examples,
    epoch: int | Int[Array, ""],
    hyperparameters: Hyperparameters,
    *,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """Every example once (but for an incomplete last batch), in the order of `epoch`."""
    order = epoch_order(key, epoch, examples=len(examples.labels), batch_size=recipe.batch_size)
    return train_steps(train_state, key, examples, order, hyperparameters, recipe=recipe)


def fit(
    key: Key[Array, ""],
    examples: Examples,
    hyperparameters: Hyperparameters,
    *,
    recipe: Recipe,
    epochs: int,
) -> tuple[TrainState, Metrics]:
    """A whole training, pure in its key: `vmap` it over keys for seeds, or over hyperparameters for a grid.

    Two trainings with the same key start from the same parameters and see the same batches, whatever their method: a
    distilled student and its baseline are paired.

    Returns the last state, and the metrics with a leading axis of epochs.
    """

    def epoch(state: TrainState, number: Int[Array, ""]) -> tuple[TrainState, Metrics]:
        return train_epoch(state, key, examples, number, hyperparameters, recipe=recipe)

    examples = jax.tree.map(jnp.asarray, examples)
    if recipe.shift:
        examples = examples._replace(images=augment.pad(examples.images, recipe.shift))
    return jax.lax.scan(epoch, init(key, hyperparameters, recipe=recipe), jnp.arange(epochs))


# What a key is folded with, so that parameters, order and dropout are independent of one another.
_INIT, _ORDER, _STEP, _VIEW, _MOVES = 0, 1, 2, 3, 4


def _turned(
    train_state: TrainState, hyperparameters: Hyperparameters, recipe: Recipe
) -> tuple[Callable[[TrainState], TrainState], Recipe]:
    """What turns a state as `layout` does, and back, and the recipe that trains a turned one."""
    which = layout.tall((train_state.params, train_state.learned))
    optimizer = recipe.optimizer(hyperparameters.learning_rate)

    def turn(state: TrainState) -> TrainState:
        params, learned = layout.turn((state.params, state.learned), which)
        moments = layout.turn_state(optimizer, state.optimizer_state, which)
        return state._replace(params=params, learned=learned, optimizer_state=moments)

    def apply(params: Params, *arguments: Any, **options: Any) -> tuple[Output, State]:
        return recipe.network.apply(layout.turn(params, which[0]), *arguments, **options)

    def loss(weights: PyTree, learned: PyTree, *arguments: Any) -> Float[Array, " batch"]:
        return recipe.method.loss(weights, layout.turn(learned, which[1]), *arguments)

    network, method = recipe.network._replace(apply=apply), recipe.method._replace(loss=loss)
    return turn, recipe._replace(network=network, method=method)


def _looked_up(
    train_state: TrainState, key: Key[Array, ""], examples: Examples, rows: Int[Array, " batch"], recipe: Recipe
) -> tuple[Float[Array, "batch height width channels"], Output | None]:
    """The scaled images of a step, and what the teacher says of them."""
    if not recipe.shift:
        teacher = jax.tree.map(lambda outputs: outputs[rows], examples.teacher)
        return scale(examples.images[rows], recipe.dtype), teacher
    view_key = jax.random.fold_in(jax.random.fold_in(key, _VIEW), train_state.step)
    chosen = augment.draw(view_key, len(rows), recipe.shift)
    if recipe.shift_share < 1:
        moves_key = jax.random.fold_in(jax.random.fold_in(key, _MOVES), train_state.step)
        chosen = augment.some(moves_key, chosen, recipe.shift, recipe.shift_share)
    images = augment.views(examples.images, rows, chosen, shift=recipe.shift)
    teacher = jax.tree.map(lambda outputs: outputs[chosen, rows], examples.teacher)
    return scale(images, recipe.dtype), teacher


def _learning_rate(hyperparameters: Hyperparameters, step: Int[Array, ""], recipe: Recipe) -> float | Float[Array, ""]:
    if recipe.schedule is None:
        return hyperparameters.learning_rate
    factor = recipe.schedule(step.astype(jnp.float32))
    return jnp.asarray(hyperparameters.learning_rate) * jnp.asarray(
        factor, jnp.asarray(hyperparameters.learning_rate).dtype
    )


def _check(examples: Examples, recipe: Recipe) -> None:
    """JAX itself reads the last row in place of one that is missing, and says nothing."""
    if not 0 < recipe.shift_share <= 1:
        raise ValueError(f"shift_share is {recipe.shift_share}: it must be above 0 and at most 1")
    count = len(examples.images)
    if len(examples.labels) != count:
        raise ValueError(f"there are {count} images and {len(examples.labels)} labels: give one label for each image")
    if examples.teacher is None:
        return
    if not isinstance(examples.teacher, Output):
        raise ValueError(f"the teacher is a {type(examples.teacher).__name__}: give its logits as Output(logits)")
    if recipe.shift:
        expected = (augment.view_count(recipe.shift), count)
        if examples.teacher.logits.shape[:2] != expected:
            raise ValueError(
                f"the teacher's logits are of the shape {examples.teacher.logits.shape}: images that are shifted need "
                f"them of every view, {expected} (kd_jax.teacher.outputs)"
            )
    elif len(examples.teacher.logits) != count:
        raise ValueError(
            f"there are {count} images and the teacher's logits of {len(examples.teacher.logits)}: give its logits of "
            "every image, in the images' order"
        )


def _metrics(loss: Array, output: Output, labels: Int[Array, " batch"]) -> Metrics:
    logits = jax.lax.stop_gradient(output.logits)
    hard = cross_entropy(logits, labels)
    right = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
    return Metrics(loss, jnp.mean(hard), jnp.mean(right, dtype=logits.dtype))
