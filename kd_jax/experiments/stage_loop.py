"""Training a stage: chunk after chunk, with checkpoints, reports, and an end at the first number that is not finite."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from kd_jax import errors
from kd_jax.errors import CheckpointError, SeedsNotFiniteError
from kd_jax.experiments.images import Images, Metrics, is_on_disk
from kd_jax.experiments.shell.progress import Progress
from kd_jax.experiments.stage import Check, Role, Stage, brought
from kd_jax.train.checkpoint import Checkpoint, CheckpointPolicy, Store
from kd_jax.train.checkpoint_files import named_arrays, restore_tree
from kd_jax.train.step import TrainState


class StageHistory(NamedTuple):
    """A stage after its last step. metrics: arrays `[trainings, reports]`. report_epochs: when each was, in epochs.

    train_s: seconds, those before an interruption included.
    """

    states: TrainState
    metrics: Metrics
    report_epochs: Float[np.ndarray, " reports"]
    train_s: float


def train_stage(
    stage: Stage,
    data: Images,
    progress: Progress,
    policy: CheckpointPolicy,
    restored: Checkpoint | None = None,
    *,
    tolerant: bool = False,
) -> StageHistory:
    """Every step of the stage after those of `restored`.

    tolerant: a number that is not finite does not end the stage, and is in the result.

    Raises `SeedsNotFiniteError`, `CheckpointError` where a checkpoint cannot be written,
    `KeyboardInterrupt` where it was asked to stop, after a checkpoint, which may still be being written.
    """
    done, states, metrics, seconds = _begin(stage, restored)
    ahead = _Ahead(stage, data)
    # A short stage has two as well, its first and its last: one may be damaged.
    last_saved = -math.inf
    progress.start(stage.name, epochs=stage.epochs, steps=stage.steps, done=done)
    try:
        with policy.defer:
            for number, chunk in enumerate(stage.chunks):
                before = chunk.epoch * stage.steps + chunk.start
                if before < done:
                    continue
                began = time.perf_counter()
                given, order = ahead.of(number)
                states, means, check = stage.programs[chunk.length](
                    states, stage.keys, given, order, jnp.int32(chunk.start), stage.settings
                )
                means = jax.tree.map(np.asarray, means)
                if not tolerant:
                    _require_finite_steps(stage, check, before, chunk.length)
                metrics.append(means)
                lasted = time.perf_counter() - began
                seconds += lasted
                stopping = policy.should_stop()
                due = chunk is stage.chunks[-1] or (chunk.place and _rested(policy, last_saved))
                if policy.store and (due or stopping):
                    _save(stage, policy.store, before + chunk.length, states, metrics, seconds)
                    last_saved = time.monotonic()
                if stopping:
                    raise KeyboardInterrupt
                progress.advance(epoch=chunk.epoch, steps=chunk.length, metrics=means, seconds=lasted)
    finally:
        ahead.thread.shutdown(wait=False, cancel_futures=True)
        progress.finish()
    if policy.store:
        policy.store.wait()
    ends = np.asarray([chunk.epoch + (chunk.start + chunk.length) / stage.steps for chunk in stage.chunks])
    return StageHistory(states, _stacked(metrics), ends, seconds)


def require_finite(
    stage: Stage, bad: Bool[np.ndarray, " trainings"], what: str, when: str, *, first: int | None = None
) -> None:
    """Raises `SeedsNotFiniteError` unless none is `bad`. first: the training that `when` is about."""
    if not bad.any():
        return
    first = int(np.argmax(bad)) if first is None else first
    seeds = list(dict.fromkeys(str(s) for s, wrong in zip(stage.seed_of_each, bad, strict=True) if wrong))
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"the seeds {', '.join(seeds[:10])}{', …' * (len(seeds) > 10)}"
    its: Any = jax.tree.map(lambda values: float(values[first]), stage.settings)
    temperature = getattr(its.method, "temperature", None)
    temperature = temperature if isinstance(temperature, float) else None
    raise SeedsNotFiniteError(
        what,
        model=stage.name.title,
        seeds=named,
        when=when,
        learning_rate=its.learning_rate,
        temperature=temperature,
        of_teacher=stage.role is Role.TEACHER,
    )


def _rested(policy: CheckpointPolicy, last_saved: float) -> bool:
    """Whether the pause since the last checkpoint is over."""
    if not policy.pause:
        return True
    writing = policy.store is not None and policy.store.writing
    return not writing and time.monotonic() - last_saved >= policy.pause


class _Ahead:
    """The order of an epoch, and of images on the disk those of a chunk, made while what is before them trains.

    It seldom keeps all cores busy; JAX itself would do one after the other.
    """

    def __init__(self, stage: Stage, data: Images) -> None:
        self.stage, self.data, self.thread = stage, data, ThreadPoolExecutor(1)
        self.orders: dict[int, Future[Any]] = {}
        self.next: tuple[int, Future[Images]] | None = None

    def of(self, number: int) -> tuple[Images, Any]:
        """Of the chunk with that number."""
        epoch = self.stage.chunks[number].epoch
        order = self._order(epoch).result()
        self.orders.pop(epoch - 1, None)
        if epoch + 1 < self.stage.epochs:
            self._order(epoch + 1)
        if not is_on_disk(self.data):
            return self.data, order
        given = self._bring(number) if self.next is None or self.next[0] != number else self.next[1]
        self.next = (number + 1, self._bring(number + 1)) if number + 1 < len(self.stage.chunks) else None
        return given.result(), order

    def _order(self, epoch: int) -> Future[Any]:
        if epoch not in self.orders:
            self.orders[epoch] = self.thread.submit(_done, self.stage.order, self.stage.keys, jnp.int32(epoch))
        return self.orders[epoch]

    def _bring(self, number: int) -> Future[Images]:
        chunk = self.stage.chunks[number]
        # Made before, in the same thread.
        order = self._order(chunk.epoch)
        return self.thread.submit(lambda: brought(self.stage, self.data, order.result(), chunk))


def _done(program: Callable[..., Any], *arguments: Any) -> Any:
    return jax.block_until_ready(program(*arguments))


def _stacked(metrics: list[Metrics]) -> Metrics:
    return jax.tree.map(lambda *values: np.stack(values, axis=-1), *metrics)


def _begin(stage: Stage, restored: Checkpoint | None) -> tuple[int, TrainState, list[Metrics], float]:
    """Steps done, states, the metrics of every chunk until now, seconds until now. Raises `CheckpointError`."""
    if restored is None:
        return 0, stage.init(stage.keys, stage.settings), [], 0.0
    ends = [chunk.epoch * stage.steps + chunk.start + chunk.length for chunk in stage.chunks]
    if restored.step not in ends:
        raise CheckpointError(
            f"the checkpoint of the {stage.name.title} was written after step {restored.step:,}, "
            "where this version writes none",
            errors.SAME_VERSION,
        )
    arrays = dict(restored.arrays)
    history: Any = [arrays.pop(f"history.{name}") for name in Metrics._fields]
    reports = [Metrics(*chunk) for chunk in zip(*(np.moveaxis(values, -1, 0) for values in history), strict=True)]
    return restored.step, restore_tree(arrays, stage.states), reports, float(restored.facts["train_s"])


def _save(stage: Stage, store: Store, step: int, states: TrainState, metrics: list[Metrics], seconds: float) -> None:
    past = {f"history.{name}": values for name, values in _stacked(metrics)._asdict().items()}
    store.save(stage.name.folder, step, named_arrays(states) | past, {"train_s": seconds})


def _require_finite_steps(stage: Stage, check: Check, done: int, length: int) -> None:
    first_bad = np.asarray(check.first_bad)
    first = int(np.argmin(np.where(first_bad >= 0, first_bad, length)))
    require_finite(stage, first_bad >= 0, "the loss", f"at step {done + 1 + first_bad[first]:,}", first=first)
    what = "a parameter or a moment of the optimiser"
    require_finite(stage, ~np.asarray(check.finite), what, f"after step {done + length:,}")
