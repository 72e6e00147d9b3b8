"""One phase of an experiment: several trainings of one recipe side by side, compiled, in chunks, with checkpoints."""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from kd_jax.experiments.shell.signals import Interrupt
from kd_jax.methods.logits import KDWeights
from kd_jax.models.network import count_parameters
from kd_jax.train import step as train
from kd_jax.train.checkpoint import Checkpoint, CheckpointError, Store, named_arrays, restore_tree
from kd_jax.train.step import Examples, Hyperparameters, Metrics, Recipe, TrainState

# About this many times an epoch a phase tells how far it is; more would cost time, fewer would leave the user waiting.
_REPORTS_PER_EPOCH = 25

# Parameters of a network from which on a CPU trains its seeds in turn.
_LARGE = 100_000

TITLES = {"teacher": "teacher", "student": "student alone", "distilled": "distilled student"}
"""What a person calls the three kinds of model, in the order of their training."""


def title(name: str) -> str:
    """What a person calls the model of a phase; those of a group have a number, or what else tells them apart."""
    return TITLES.get(name.partition("-")[0], name)


class RunError(RuntimeError):
    """A run that failed; one sentence that says where, and what to change."""


class NotFiniteError(RunError):
    """A number of a training that is not finite: what it is, with which seeds, when it was found, and at which T."""

    def __init__(self, message: str, *, what: str, seeds: str, when: str, temperature: float | None) -> None:
        super().__init__(message)
        self.what, self.seeds, self.when, self.temperature = what, seeds, when, temperature


@runtime_checkable
class Progress(Protocol):
    """Who is told how far the experiment is."""

    def compiled(self, seconds: float, estimate: float) -> None:
        """Every program is compiled; training will take about `estimate` seconds."""

    def start(self, phase: str, *, epochs: int, steps: int, done: int) -> None:
        """A phase of `epochs` epochs of `steps` steps begins, `done` of all of them from a checkpoint."""

    def advance(self, *, epoch: int, steps: int, metrics: Metrics, seconds: float) -> None:
        """`steps` more steps of `epoch` (from 0) took `seconds`; `metrics` of them are arrays `[seeds]`."""

    def finish(self) -> None:
        """The phase ended, well or not."""


class Keeping(NamedTuple):
    """How a phase keeps what it has done.

    store: where checkpoints go; None for none. every: steps of an epoch between two places for one; None for its end
    alone. interrupt: asked after every chunk whether to save and leave. pause: seconds from one checkpoint to the next
    at least, but for a phase's first, its last and one before leaving, and none while one is being written: where
    epochs are short, writing may take longer than training. 0 for a checkpoint at every place.
    """

    store: Store | None = None
    every: int | None = None
    interrupt: Interrupt = Interrupt()
    pause: float = 0.0


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


class Phase(NamedTuple):
    """What a phase runs, compiled: for each of the seeds (and its key) one training, or as many with other settings.

    hyperparameters: every leaf `[trainings]`, all those of the first seed first.
    """

    name: str
    recipe: Recipe
    hyperparameters: Hyperparameters
    seeds: tuple[int, ...]
    keys: Key[Array, " seeds"]
    chunks: tuple[Chunk, ...]
    init: Callable[..., TrainState]
    order: Callable[..., Int[Array, "seeds steps batch"]]
    programs: Mapping[int, Callable[..., tuple[TrainState, Metrics, Check]]]
    compile_s: float

    @property
    def trained_seeds(self) -> tuple[int, ...]:
        """The seed of every training."""
        settings = len(jax.tree.leaves(self.hyperparameters)[0]) // len(self.seeds)
        return tuple(seed for seed in self.seeds for _ in range(settings))

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return sum(chunk.length for chunk in self.chunks if chunk.epoch == 0)

    @property
    def epochs(self) -> int:
        """Epochs of the whole phase."""
        return self.chunks[-1].epoch + 1


class Course(NamedTuple):
    """A phase after its last step. history: `Metrics` of arrays `[seeds, reports]`, `moments` of each in epochs.

    train_s: seconds, those before an interruption included.
    """

    states: TrainState
    history: Metrics
    moments: Float[np.ndarray, " reports"]
    train_s: float


def prepare(
    name: str,
    recipe: Recipe,
    hyperparameters: Hyperparameters,
    seeds: tuple[int, ...],
    role: int,
    examples: Examples,
    *,
    epochs: int,
    every: int | None = None,
) -> Phase:
    """Compiles a phase. hyperparameters: every leaf `[trainings]`, as `Phase` has them. role: folded into every key."""
    started = time.perf_counter()
    keys = _keys(seeds, role)
    count, batch_size = len(examples.labels), recipe.batch_size
    init = _init.lower(keys, hyperparameters, recipe=recipe).compile()
    order = _order.lower(keys, jnp.int32(0), examples=count, batch_size=batch_size).compile()
    states = jax.eval_shape(partial(_init, recipe=recipe), keys, hyperparameters)
    orders = jax.ShapeDtypeStruct((len(seeds), count // batch_size, batch_size), jnp.int32)
    chunks = plan(count // batch_size, epochs, every)
    programs = {
        steps: _train_chunk.lower(
            states, keys, examples, orders, jnp.int32(0), hyperparameters, recipe=recipe, steps=steps
        ).compile()
        for steps in sorted({chunk.length for chunk in chunks})
    }
    seconds = time.perf_counter() - started
    return Phase(name, recipe, hyperparameters, seeds, keys, chunks, init, order, programs, seconds)


def with_others(phase: Phase, name: str, seeds: tuple[int, ...], role: int, hyperparameters: Hyperparameters) -> Phase:
    """The same programs for other seeds and hyperparameters, as many of them."""
    return phase._replace(name=name, seeds=seeds, keys=_keys(seeds, role), hyperparameters=hyperparameters)


def _keys(seeds: tuple[int, ...], role: int) -> Key[Array, " seeds"]:
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), role))(jnp.asarray(seeds))


def plan(steps: int, epochs: int, every: int | None = None) -> tuple[Chunk, ...]:
    """The chunks of `epochs` epochs of `steps` steps; checkpoints may follow each and every `every` steps of it."""
    every = min(every or steps, steps)
    of_epoch = []
    for first in range(0, steps, every):
        start, last = first, min(first + every, steps)
        for length in chunk_lengths(last - first, -(-_REPORTS_PER_EPOCH * (last - first) // steps)):
            of_epoch.append(Chunk(0, start, length, start + length == last))
            start += length
    return tuple(chunk._replace(epoch=epoch) for epoch in range(epochs) for chunk in of_epoch)


def chunk_lengths(steps: int, reports: int = _REPORTS_PER_EPOCH) -> list[int]:
    """`steps` steps in about `reports` chunks; equal ones where they divide them, else the last is shorter.

    Each distinct length is a program to compile, so there are at most two.
    """
    fewest = -(-steps // max(1, steps // reports))
    for chunks in range(min(fewest, steps), min(2 * reports, steps) + 1):
        if steps % chunks == 0:
            return [steps // chunks] * chunks
    length = -(-steps // reports)
    return [length] * (steps // length) + [steps % length] * (steps % length > 0)


def trial(phase: Phase, examples: Examples) -> float:
    """Seconds that an epoch would take, from a chunk of it that is thrown away."""
    states, order = phase.init(phase.keys, phase.hyperparameters), phase.order(phase.keys, jnp.int32(0))
    length = max(phase.programs)
    jax.block_until_ready((states, order))
    started = time.perf_counter()
    jax.block_until_ready(
        phase.programs[length](states, phase.keys, examples, order, jnp.int32(0), phase.hyperparameters)
    )
    return (time.perf_counter() - started) * phase.steps / length


def run(
    phase: Phase,
    examples: Examples,
    progress: Progress,
    keeping: Keeping,
    restored: Checkpoint | None = None,
    *,
    tolerant: bool = False,
) -> Course:
    """Every step of the phase after those of `restored`.

    tolerant: a number that is not finite does not end the phase, and is in the result.

    Raises `NotFiniteError`, `CheckpointError` where a checkpoint cannot be written,
    `KeyboardInterrupt` where it was asked to stop, after a checkpoint, which may still be being written.
    """
    done, states, history, seconds = _begin(phase, restored)
    order, upcoming, other_thread = None, None, ThreadPoolExecutor(1)
    # A short phase has two as well, its first and its last: one may be damaged.
    last_saved = -math.inf
    progress.start(phase.name, epochs=phase.epochs, steps=phase.steps, done=done)
    try:
        with keeping.interrupt:
            for chunk in phase.chunks:
                before = chunk.epoch * phase.steps + chunk.start
                if before < done:
                    continue
                began = time.perf_counter()
                if order is None or chunk.start == 0:
                    order = phase.order(phase.keys, jnp.int32(chunk.epoch)) if upcoming is None else upcoming.result()
                    upcoming = None
                if upcoming is None and chunk.epoch + 1 < phase.epochs:
                    # Shuffled while this epoch trains, which seldom keeps all cores busy; JAX itself would do one after
                    # the other.
                    upcoming = other_thread.submit(_done, phase.order, phase.keys, jnp.int32(chunk.epoch + 1))
                states, metrics, check = phase.programs[chunk.length](
                    states, phase.keys, examples, order, jnp.int32(chunk.start), phase.hyperparameters
                )
                metrics = jax.tree.map(np.asarray, metrics)
                if not tolerant:
                    _require_finite_steps(phase, check, before, chunk.length)
                history.append(metrics)
                lasted = time.perf_counter() - began
                seconds += lasted
                stopping = keeping.interrupt.requested
                due = chunk is phase.chunks[-1] or (chunk.place and _rested(keeping, last_saved))
                if keeping.store and (due or stopping):
                    _save(phase, keeping.store, before + chunk.length, states, history, seconds)
                    last_saved = time.monotonic()
                if stopping:
                    raise KeyboardInterrupt
                progress.advance(epoch=chunk.epoch, steps=chunk.length, metrics=metrics, seconds=lasted)
    finally:
        other_thread.shutdown(wait=False, cancel_futures=True)
        progress.finish()
    if keeping.store:
        keeping.store.wait()
    moments = np.asarray([chunk.epoch + (chunk.start + chunk.length) / phase.steps for chunk in phase.chunks])
    return Course(states, _stacked(history), moments, seconds)


def _rested(keeping: Keeping, last_saved: float) -> bool:
    """Whether the pause since the last checkpoint is over."""
    if not keeping.pause:
        return True
    writing = keeping.store is not None and keeping.store.writing
    return not writing and time.monotonic() - last_saved >= keeping.pause


def _done(program: Callable[..., Any], *arguments: Any) -> Any:
    return jax.block_until_ready(program(*arguments))


def _stacked(history: list[Metrics]) -> Metrics:
    return jax.tree.map(lambda *values: np.stack(values, axis=-1), *history)


def _begin(phase: Phase, restored: Checkpoint | None) -> tuple[int, TrainState, list[Metrics], float]:
    """Steps done, states, the metrics of every chunk until now, seconds until now. Raises `CheckpointError`."""
    if restored is None:
        return 0, phase.init(phase.keys, phase.hyperparameters), [], 0.0
    ends = [chunk.epoch * phase.steps + chunk.start + chunk.length for chunk in phase.chunks]
    if restored.step not in ends:
        raise CheckpointError(
            f"the checkpoint of the {title(phase.name)} was written after step {restored.step:,}, "
            "where this version writes none: go on with the version that wrote it, or start again with --overwrite"
        )
    like = jax.eval_shape(partial(_init, recipe=phase.recipe), phase.keys, phase.hyperparameters)
    arrays = dict(restored.arrays)
    history: Any = [arrays.pop(f"history.{name}") for name in Metrics._fields]
    reports = [Metrics(*chunk) for chunk in zip(*(np.moveaxis(values, -1, 0) for values in history), strict=True)]
    return restored.step, restore_tree(arrays, like), reports, float(restored.facts["train_s"])


def _save(phase: Phase, store: Store, step: int, states: TrainState, history: list[Metrics], seconds: float) -> None:
    past = {f"history.{name}": values for name, values in _stacked(history)._asdict().items()}
    store.save(phase.name, step, named_arrays(states) | past, {"train_s": seconds})


@partial(jax.jit, static_argnames="recipe")
def _init(keys: Key[Array, " seeds"], hyperparameters: Hyperparameters, *, recipe: Recipe) -> TrainState:
    settings = len(jax.tree.leaves(hyperparameters)[0]) // len(keys)
    return jax.vmap(lambda key, own: train.init(key, own, recipe=recipe))(jnp.repeat(keys, settings), hyperparameters)


@partial(jax.jit, static_argnames=("examples", "batch_size"))
def _order(
    keys: Key[Array, " seeds"], epoch: Int[Array, ""], *, examples: int, batch_size: int
) -> Int[Array, "seeds steps batch"]:
    return jax.vmap(lambda key: train.epoch_order(key, epoch, examples=examples, batch_size=batch_size))(keys)


@partial(jax.jit, static_argnames=("recipe", "steps"), donate_argnums=0)
def _train_chunk(
    states: TrainState,
    keys: Key[Array, " seeds"],
    examples: Examples,
    order: Int[Array, "seeds all_steps batch"],
    start: Int[Array, ""],
    hyperparameters: Hyperparameters,
    *,
    recipe: Recipe,
    steps: int,
) -> tuple[TrainState, Metrics, Check]:
    """`steps` steps of an epoch from `start` on, of all trainings together: settings side by side within each seed."""
    rows = jax.lax.dynamic_slice_in_dim(order, start, steps, axis=1)

    def one_training(
        state: TrainState, key: Key[Array, ""], rows: Array, own: Hyperparameters
    ) -> tuple[TrainState, Metrics, Check]:
        state, metrics = train.scan_steps(state, key, examples, rows, own, recipe=recipe)
        bad = ~jnp.isfinite(metrics.loss)
        first_bad = jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
        metrics = jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((state, metrics))]))
        return state, metrics, Check(first_bad, finite)

    # Trainings of one seed see the same batches: their images are gathered once, and meet all their first layers in
    # one product.
    seeds = len(keys)
    settings = len(states.step) // seeds
    states, own = jax.tree.map(lambda leaf: leaf.reshape(seeds, settings, *leaf.shape[1:]), (states, hyperparameters))

    def one_key(states: TrainState, key: Key[Array, ""], rows: Array, own: Hyperparameters) -> Any:
        return side_by_side(lambda state, given: one_training(state, key, rows, given))(states, own)

    side_by_side = _in_turn if _large(states, seeds * settings) else _together
    trained = side_by_side(one_key)(states, keys, rows, own)
    return jax.tree.map(lambda leaf: leaf.reshape(seeds * settings, *leaf.shape[2:]), trained)


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


def _large(states: TrainState, trainings: int) -> bool:
    """Whether trainings are done in turn: on a CPU, and with networks that keep all of its cores busy one at a time."""
    return jax.default_backend() == "cpu" and count_parameters(states.params) // trainings >= _LARGE


def require_finite(
    phase: Phase, bad: Bool[np.ndarray, " trainings"], what: str, when: str, *, first: int | None = None
) -> None:
    """Raises `NotFiniteError` unless none is `bad`. first: the training that `when` is about."""
    if not bad.any():
        return
    first = int(np.argmax(bad)) if first is None else first
    seeds = list(dict.fromkeys(str(s) for s, wrong in zip(phase.trained_seeds, bad, strict=True) if wrong))
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"the seeds {', '.join(seeds[:10])}{', …' * (len(seeds) > 10)}"
    own = jax.tree.map(lambda values: float(values[first]), phase.hyperparameters)
    temperature = float(own.weights.temperature) if isinstance(own.weights, KDWeights) else None
    soft = "" if temperature is None else f" and --temperature {temperature:g}"
    rate = "--teacher-learning-rate" if phase.name.startswith("teacher") else "--learning-rate"
    raise NotFiniteError(
        f"{what} of the {title(phase.name)} with {named} is not finite {when} at {rate} {own.learning_rate:g}{soft}: "
        f"choose a smaller learning rate{' or another temperature' if soft else ''}",
        what=what,
        seeds=named,
        when=when,
        temperature=temperature,
    )


def _require_finite_steps(phase: Phase, check: Check, done: int, length: int) -> None:
    first_bad = np.asarray(check.first_bad)
    first = int(np.argmin(np.where(first_bad >= 0, first_bad, length)))
    require_finite(phase, first_bad >= 0, "the loss", f"at step {done + 1 + first_bad[first]:,}", first=first)
    what = "a parameter or a moment of the optimiser"
    require_finite(phase, ~np.asarray(check.finite), what, f"after step {done + length:,}")
