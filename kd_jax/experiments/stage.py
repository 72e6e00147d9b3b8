"""One stage of an experiment: several trainings of one setup side by side, compiled, and cut into chunks of steps."""

import enum
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from kd_jax.convolution import compiling
from kd_jax.data.batch import epoch_order
from kd_jax.experiments import images as of_images
from kd_jax.experiments.images import Images, Metrics, Settings, Setup
from kd_jax.experiments.shell.progress import StageName
from kd_jax.models import count_parameters
from kd_jax.train import sizes
from kd_jax.train.sizes import chunk_lengths
from kd_jax.train.step import TrainState

# About this many times an epoch a stage tells how far it is; more would cost time, fewer would leave the user waiting.
_REPORTS_PER_EPOCH = 25


class Role(enum.IntEnum):
    """Folded into the seed, so that a teacher and a student of the same seed share nothing."""

    TEACHER = 0
    STUDENT = 1


class Chunk(NamedTuple):
    """`length` steps of `epoch` from `start` on. place: whether a checkpoint may follow."""

    epoch: int
    start: int
    length: int
    place: bool


class Check(NamedTuple):
    """Of a chunk of steps, for each training.

    first_bad: the first step whose loss is not finite, counted from 0; -1 for none. finite: all that it left.
    """

    first_bad: Int[Array, "*trainings"]
    finite: Bool[Array, "*trainings"]


class Stage(NamedTuple):
    """What is trained, compiled: for each of the seeds (and its key) one training, or as many with other settings.

    settings: every leaf `[trainings]`, all those of the first seed first. states: the shapes of all trainings' states.
    """

    name: StageName
    role: Role
    setup: Setup
    settings: Settings
    seeds: tuple[int, ...]
    keys: Key[Array, " seeds"]
    chunks: tuple[Chunk, ...]
    states: TrainState
    init: Callable[..., TrainState]
    order: Callable[..., Int[Array, "seeds steps batch"]]
    programs: Mapping[int, Callable[..., tuple[TrainState, Metrics, Check]]]
    compile_s: float

    @property
    def seed_of_each(self) -> tuple[int, ...]:
        """The seed of every training."""
        each = len(jax.tree.leaves(self.settings)[0]) // len(self.seeds)
        return tuple(seed for seed in self.seeds for _ in range(each))

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return sum(chunk.length for chunk in self.chunks if chunk.epoch == 0)

    @property
    def epochs(self) -> int:
        """Epochs of the whole stage."""
        return self.chunks[-1].epoch + 1


def prepare(
    name: StageName,
    role: Role,
    setup: Setup,
    settings: Settings,
    seeds: tuple[int, ...],
    data: Images,
    *,
    epochs: int,
    every: int | None = None,
) -> Stage:
    """Compiles a stage. settings: every leaf `[trainings]`, as `Stage` has them. every: see `plan_chunks`."""
    started = time.perf_counter()
    keys = _keys(seeds, role)
    count, batch_size = len(data.labels), setup.batch_size
    given = of_chunk(data, setup, len(seeds), 1)
    first = partial(_init, setup=setup, data=jax.eval_shape(lambda data: data, given))
    init, states = jax.jit(first).lower(keys, settings).compile(), jax.eval_shape(first, keys, settings)
    order = _order.lower(keys, jnp.int32(0), examples=count, batch_size=batch_size).compile()
    orders = jax.ShapeDtypeStruct((len(seeds), count // batch_size, batch_size), jnp.int32)
    chunks = plan_chunks(count // batch_size, epochs, every)
    programs = {}
    for length in sorted({chunk.length for chunk in chunks}):
        given = of_chunk(data, setup, len(seeds), length)
        lowered = _train_chunk.lower(states, keys, given, orders, jnp.int32(0), settings, setup=setup, steps=length)
        programs[length] = compiling.compiled(lowered)
    seconds = time.perf_counter() - started
    return Stage(name, role, setup, settings, seeds, keys, chunks, states, init, order, programs, seconds)


def of_chunk(data: Images, setup: Setup, seeds: int, steps: int) -> Images:
    """What a program of so many steps is compiled for."""
    if not of_images.is_on_disk(data):
        return data
    return of_images.shapes_of_steps(data, seeds * steps * setup.batch_size, setup.shift)


def brought(stage: Stage, data: Images, order: Array, chunk: Chunk) -> Images:
    """The data for a chunk of steps: of images on the disk those that it sees."""
    if not of_images.is_on_disk(data):
        return data
    rows = np.asarray(order[:, chunk.start : chunk.start + chunk.length])
    return of_images.of_steps(data, rows, stage.setup.shift)


def with_others(stage: Stage, name: StageName, seeds: tuple[int, ...], settings: Settings) -> Stage:
    """The same programs for other seeds and settings, as many of them."""
    keys = _keys(seeds, stage.role)
    return stage._replace(name=name, seeds=seeds, keys=keys, settings=settings)


def plan_chunks(steps: int, epochs: int, every: int | None = None) -> tuple[Chunk, ...]:
    """The chunks of `epochs` epochs of `steps` steps; checkpoints may follow each and every `every` steps of it."""
    every = min(every or steps, steps)
    of_epoch = []
    for first in range(0, steps, every):
        start, last = first, min(first + every, steps)
        for length in chunk_lengths(last - first, -(-_REPORTS_PER_EPOCH * (last - first) // steps)):
            of_epoch.append(Chunk(0, start, length, start + length == last))
            start += length
    return tuple(chunk._replace(epoch=epoch) for epoch in range(epochs) for chunk in of_epoch)


def time_an_epoch(stage: Stage, data: Images) -> float:
    """Seconds that an epoch would take, from a chunk of it that is thrown away."""
    states, order = stage.init(stage.keys, stage.settings), stage.order(stage.keys, jnp.int32(0))
    length = max(stage.programs)
    given = brought(stage, data, order, Chunk(0, 0, length, False))
    jax.block_until_ready((states, order))
    started = time.perf_counter()
    jax.block_until_ready(stage.programs[length](states, stage.keys, given, order, jnp.int32(0), stage.settings))
    return (time.perf_counter() - started) * stage.steps / length


def _keys(seeds: tuple[int, ...], role: Role) -> Key[Array, " seeds"]:
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), int(role)))(jnp.asarray(seeds))


def _init(keys: Key[Array, " seeds"], settings: Settings, *, setup: Setup, data: Any) -> TrainState:
    each = len(jax.tree.leaves(settings)[0]) // len(keys)
    one = partial(of_images.init, setup=setup, data=data)
    return jax.vmap(lambda key, own: one(key, own))(jnp.repeat(keys, each), settings)


@partial(jax.jit, static_argnames=("examples", "batch_size"))
def _order(
    keys: Key[Array, " seeds"], epoch: Int[Array, ""], *, examples: int, batch_size: int
) -> Int[Array, "seeds steps batch"]:
    return jax.vmap(lambda key: epoch_order(key, epoch, examples=examples, batch_size=batch_size))(keys)


@partial(jax.jit, static_argnames=("setup", "steps"), donate_argnums=0)
def _train_chunk(
    states: TrainState,
    keys: Key[Array, " seeds"],
    data: Images,
    order: Int[Array, "seeds all_steps batch"],
    start: Int[Array, ""],
    settings: Settings,
    *,
    setup: Setup,
    steps: int,
) -> tuple[TrainState, Metrics, Check]:
    """`steps` steps of an epoch from `start` on, of all trainings together: settings side by side within each seed."""
    rows = jax.lax.dynamic_slice_in_dim(order, start, steps, axis=1)

    def one_training(
        state: TrainState, key: Key[Array, ""], rows: Array, own: Settings
    ) -> tuple[TrainState, Metrics, Check]:
        state, metrics = of_images.scan_steps(state, key, data, rows, own, setup=setup)
        bad = ~jnp.isfinite(metrics.loss)
        first_bad = jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
        metrics = jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((state, metrics))]))
        return state, metrics, Check(first_bad, finite)

    # Trainings of one seed see the same batches: their images are gathered once, and meet all their first layers in
    # one product.
    seeds = len(keys)
    each = len(states.step) // seeds
    states, own = jax.tree.map(lambda leaf: leaf.reshape(seeds, each, *leaf.shape[1:]), (states, settings))

    def one_key(states: TrainState, key: Key[Array, ""], rows: Array, own: Settings) -> Any:
        return side_by_side(lambda state, given: one_training(state, key, rows, given))(states, own)

    side_by_side = _in_turn if _large(setup, states, seeds * each) else _together
    trained = side_by_side(one_key)(states, keys, rows, own)
    return jax.tree.map(lambda leaf: leaf.reshape(seeds * each, *leaf.shape[2:]), trained)


def _together(f: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap`, but for a batch of one: on a CPU a batched matrix product is slower than the same product alone."""

    def mapped(*arguments: Any) -> Any:
        if len(jax.tree.leaves(arguments)[0]) > 1:
            return jax.vmap(f)(*arguments)
        return jax.tree.map(lambda leaf: leaf[None], f(*jax.tree.map(lambda leaf: leaf[0], arguments)))

    return mapped


def _in_turn(f: Callable[..., Any]) -> Callable[..., Any]:
    """One after the other, in the same program."""

    def mapped(*arguments: Any) -> Any:
        if len(jax.tree.leaves(arguments)[0]) > 1:
            return jax.lax.map(lambda one: f(*one), arguments)
        return jax.tree.map(lambda leaf: leaf[None], f(*jax.tree.map(lambda leaf: leaf[0], arguments)))

    return mapped


def _large(setup: Setup, states: TrainState, trainings: int) -> bool:
    """Whether trainings are done in turn: on a CPU, and with networks that keep all of its cores busy one at a time.

    states: every leaf `[seeds, settings, ...]`.
    """
    params, _ = setup.network.split(states.variables)
    if jax.default_backend() == "cpu" and any(leaf.ndim > 2 + 2 for leaf in jax.tree.leaves(params)):
        # Kernels of convolutions: side by side they would be grouped convolutions, which are slow on a CPU.
        return True
    return jax.default_backend() == "cpu" and count_parameters(params) // trainings >= sizes.SMALL
