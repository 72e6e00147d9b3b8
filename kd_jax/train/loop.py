"""The loop over the epochs of one training: validation, the best, callbacks, checkpoints, and the first bad number."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kd_jax.errors import NotFiniteError, RunError
from kd_jax.train.callbacks import Callback, Epoch, Log, says_stop, value_of
from kd_jax.train.faults import check_schedules
from kd_jax.train.measures import WATCHED, WEIGHT, of_labelled
from kd_jax.train.processes import agreed
from kd_jax.train.progress import Silent
from kd_jax.train.resume import Folder, Progress
from kd_jax.train.sources import Memory, Stream

PyTree = Any

# Seconds from one checkpoint to the next at least, but for the last: where epochs are short, writing takes longer.
_PAUSE = 10.0
# Steps of an iterator whose metrics may be on their way: looking at each would wait for each.
_BEHIND = 32
# Steps of them, or programs of more steps, that run or wait to: on a CPU each program that was called has its memory.
_CALLED = 4
# Numbers of so many steps are put together.
_TOGETHER = 256


class Plan(NamedTuple):
    """What happens beside the steps.

    examine: measures of the student's variables after each epoch. best: the measure by which the best are kept, higher:
    whether more of it is better. as_given: the student in the kind that was given. every: steps of an epoch between
    two checkpoints; None for those after epochs alone. shared: by several processes, which decide as the first does.
    """

    source: Memory | Stream
    epochs: int
    examine: Callable[[PyTree], dict[str, float]] | None
    best: str | None
    higher: bool
    callbacks: Sequence[Callback]
    as_given: Callable[[PyTree], Any]
    folder: Folder | None
    every: int | None
    bar: Silent
    shared: bool = False


def train(progress: Progress, plan: Plan) -> Progress:
    """All epochs that are left. Raises `NotFiniteError` at the first number that is not finite.

    An interrupt (`KeyboardInterrupt`) leaves a checkpoint of the steps that are done, and is raised again.
    """
    saved = -math.inf
    plan.bar.start(plan.epochs, plan.source.steps, progress.epoch, progress.start)
    try:
        while progress.epoch < plan.epochs and not progress.stopped:
            began = time.perf_counter()
            progress = _epoch(progress, plan)
            try:
                progress = _after_epoch(progress, plan, time.perf_counter() - began)
            except KeyboardInterrupt:
                _leave(progress, plan)
                raise
            last = progress.epoch >= plan.epochs or progress.stopped
            due = last or time.monotonic() - saved >= _PAUSE
            if plan.folder is not None and agreed(due, plan.shared):
                plan.folder.save(progress)
                if saved == -math.inf:
                    # Else a training that is killed after some short epochs would have nothing to go on from.
                    plan.folder.store.wait()
                saved = time.monotonic()
    finally:
        plan.bar.close()
        for callback in plan.callbacks:
            if isinstance(callback, Log):
                callback.end()
    if plan.folder is not None:
        # Here: of several processes one may go while the last checkpoint is written.
        plan.folder.store.wait()
    return progress


def _epoch(progress: Progress, plan: Plan) -> Progress:
    """The steps of one epoch that are left."""
    # By their first step.
    seen: dict[int, dict[str, Any]] = {0: progress.partial} if progress.partial else {}
    waiting: list[Any] = []
    done = progress.start
    state, position = progress.state, progress.position
    before = int(state.step) - done

    def now() -> Progress:
        return progress._replace(state=state, start=done, partial=_joined(seen, done), position=position)

    def look(but: int = 0) -> None:
        """Brings to the host what is on its way, but what ends in the last steps, and raises for what is not finite."""
        nonlocal seen
        while waiting and done - waiting[0][0] - waiting[0][1].steps >= but:
            first, some = waiting[0]
            metrics = some.on_host()
            bad = np.flatnonzero(~np.isfinite(metrics["loss"]))
            if len(bad):
                check_schedules(plan.source.method, [before + first + int(bad[0])])
            _require_finite(metrics, some.finite is None or bool(some.finite), progress.epoch, first)
            examples = np.full(some.steps, some.examples, np.int32)
            # A batch without weights may follow one with them.
            seen[first] = {WEIGHT: examples.astype(np.float32)} | metrics | {"examples": examples}
            # Not before, as an interrupt while it is waited for would lose it.
            waiting.pop(0)
            if first // _TOGETHER != (first + some.steps) // _TOGETHER:
                seen = _together(seen, first // _TOGETHER * _TOGETHER)
            plan.bar.advance(progress.epoch, some.steps, metrics)

    behind = 1 if isinstance(plan.source, Memory) else _BEHIND
    try:
        for some in plan.source.epoch(state, progress.epoch, progress.start):
            waiting.append((done, some))
            done, state, position = done + some.steps, some.state, some.position
            # Behind it: nearly all time passes here, and an interrupt keeps the steps that were called.
            called = [one for first, one in waiting if done - first - one.steps >= _CALLED]
            if called:
                called[-1].wait()
            due = plan.folder is not None and plan.every is not None and done % plan.every == 0
            if done - waiting[0][0] >= behind or due:
                look(0 if due or behind == 1 else _CALLED)
            if due and plan.folder is not None:
                plan.folder.save(now())
        look()
        if isinstance(plan.source, Stream) and not plan.source.is_finite(state):
            _require_finite({"loss": np.zeros(done)}, False, progress.epoch, 0)
    except KeyboardInterrupt:
        if plan.folder is not None and not plan.shared:
            look()
            _leave(now(), plan)
        raise
    return now()


def _leave(progress: Progress, plan: Plan) -> None:
    """Keeps what is done before an interrupt is passed on."""
    # Others may be elsewhere, and the pieces that they have cannot be asked for.
    if plan.folder is None or plan.shared:
        return
    # The interrupt may have come before the next state was known here, when the last was given away already.
    if _is_given_away(progress.state):
        return
    if int(progress.state.step) > plan.folder.last:
        plan.folder.save(progress)


def _after_epoch(progress: Progress, plan: Plan, seconds: float) -> Progress:
    """Its means and measures, the best until now, and what the callbacks say."""
    counts = progress.partial.get(WEIGHT, progress.partial["examples"]).astype(np.float64)
    total = np.sum(counts)
    means = {
        name: np.sum(values * counts) / np.where(total == 0, 1, total)
        for name, values in progress.partial.items() if name not in ("examples", WEIGHT)
    }  # fmt: skip
    metrics = {name: float(value) for name, value in of_labelled(means).items()}
    if plan.examine is not None:
        metrics |= {f"validation_{name}": value for name, value in plan.examine(progress.state.variables).items()}
    history = {name: [*progress.history.get(name, []), value] for name, value in metrics.items()}
    history["seconds"] = [*progress.history.get("seconds", []), seconds]
    number = progress.epoch + 1
    progress = progress._replace(history=history, epoch=number, start=0, partial={})
    if plan.best is not None:
        value = value_of(metrics, plan.best)
        before = progress.best_value
        if math.isnan(value):
            where = "the validation data" if plan.examine is not None else "the data"
            warnings.warn(
                f"{plan.best} is NaN after epoch {number}, which so cannot be the best: look for NaN in {where}",
                stacklevel=2,
            )
        better = not math.isnan(value) and (before is None or (value > before if plan.higher else value < before))
        # Devices of other processes may round otherwise.
        if agreed(better, plan.shared):
            # A copy: the next step may take the memory of the state.
            best = jax.tree.map(lambda leaf: leaf.copy(), progress.state.variables)
            progress = progress._replace(best=best, best_value=value, best_epoch=progress.epoch - 1)
    shown = {name: value for name, value in metrics.items() if not name.startswith(WATCHED)}
    plan.bar.epoch(shown)
    record = Epoch(
        number, plan.epochs, int(progress.state.step), seconds, shown, lambda: _model(progress, plan),
        {name: tuple(history[name]) for name in (*shown, "seconds")},
    )  # fmt: skip
    # All of them are called, whichever says stop.
    answers = [callback(record) for callback in plan.callbacks]
    return progress._replace(stopped=agreed(any(map(says_stop, answers)), plan.shared))


def _model(progress: Progress, plan: Plan) -> Any:
    """The student after an epoch. Raises `RunError` where the steps of the next have its memory already."""
    variables = progress.state.variables
    if _is_given_away(variables):
        raise RunError(
            f"the student of epoch {progress.epoch} is asked for after later steps, which took its memory: call "
            "epoch.model() in the callback, and keep what it gives"
        )
    return plan.as_given(variables)


def _is_given_away(tree: PyTree) -> bool:
    """Whether later steps have the memory of an array."""
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def _require_finite(metrics: dict[str, Any], finite: bool, epoch: int, first: int) -> None:
    bad = ~np.isfinite(metrics["loss"])
    where = f"of epoch {epoch + 1}"
    remedy = "choose a smaller learning rate, or look for inputs or labels that are not what the model expects"
    if bad.any() and epoch == first + int(bad.argmax()) == 0:
        # No step has changed a parameter yet.
        remedy = (
            "look for parameters, inputs, labels or numbers of the method that are not finite, or too large, and for "
            "images too small for a pool, which leaves nothing of them then"
        )
    if bad.any():
        raise NotFiniteError(f"the loss is not finite at step {first + int(bad.argmax()) + 1:,} {where}: {remedy}")
    if not finite:
        last = first + len(metrics["loss"])
        raise NotFiniteError(
            f"a parameter or a moment of the optimiser is not finite after step {last:,} {where}: {remedy}"
        )


def _together(parts: dict[int, dict[str, Any]], start: int) -> dict[int, dict[str, Any]]:
    """The metrics of the steps from `start` on as one part of `parts`, by their first step."""
    before = {first: part for first, part in parts.items() if first < start}
    later = {first: part for first, part in parts.items() if first >= start}
    return before | {min(later): _joined(later, None)}


def _joined(parts: dict[int, dict[str, Any]], steps: int | None) -> dict[str, np.ndarray]:
    """The metrics of the first `steps` steps of an epoch; None for all."""
    names = next(iter(parts.values()), {})
    return {name: np.concatenate([part[name] for part in parts.values()])[:steps] for name in names}
