"""What is called after every epoch of a training: plain functions of an `Epoch`, and some that are ready."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kd_jax.data.batch import check_whole
from kd_jax.errors import ConfigError
from kd_jax.evaluate import HIGHER_IS_BETTER
from kd_jax.methods.arguments import takes_one
from kd_jax.train.measures import WATCHED


class Epoch(NamedTuple):
    """What a callback is told.

    number: of the epoch, from 1. epochs: of the training. steps: done until now, of all epochs. seconds: of the epoch.
    metrics: loss, its terms and measures of the training batches, and `validation_…`, as numbers of Python.
    model: called, it gives the student as it is now, in the kind that was given.
    history: of each of the metrics, this epoch's value and those before.
    """

    number: int
    epochs: int
    steps: int
    seconds: float
    metrics: dict[str, float]
    model: Callable[[], Any]
    history: Mapping[str, Sequence[float]]


Callback = Callable[[Epoch], Any]
"""A plain function; the training ends after the epoch where it returns True."""


def early_stopping(measure: str = "validation_nll", *, patience: int = 3, higher: bool | None = None) -> Callback:
    """Ends the training once `measure` has not become better for `patience` epochs.

    higher: whether more is better; None for what is known of the measures that have a name in kd_jax.
    Raises `ConfigError` where that is not known.
    """
    if not isinstance(measure, str):
        raise ConfigError(f"the measure of early_stopping is {measure!r}: give its name, such as 'validation_nll'")
    patience, better = check_whole(patience, "patience"), is_higher_better(measure, higher)

    return EarlyStopping(measure, patience, better)


@dataclass(frozen=True)
class EarlyStopping:
    """What `early_stopping` gives: a callback that tells which measure it watches."""

    measure: str
    patience: int
    higher: bool

    def __call__(self, epoch: Epoch) -> bool:
        """Whether to stop."""
        # From the history, so that a resumed training stops where it would have stopped.
        values = np.asarray(value_of(epoch.history, self.measure), np.float64)
        known = np.where(np.isnan(values), -np.inf, values if self.higher else -values)
        return len(known) - 1 - int(known.argmax()) >= self.patience


def tensorboard(folder: Any) -> Callback:
    """Writes every metric as a scalar for TensorBoard into `folder`. Needs `tensorboardX`.

    Of several trainings, such as those of `kd.generations`, the second writes into `folder/2`, and so on.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError("kd.callbacks.tensorboard needs tensorboardX: pip install 'kd-jax[tensorboard]'") from None

    def start(count: int) -> Any:
        return SummaryWriter(str(folder) if count == 1 else str(Path(folder) / str(count)))

    def write(writer: Any, epoch: Epoch) -> None:
        for name, value in epoch.metrics.items():
            writer.add_scalar(name, value, epoch.number)
        writer.flush()

    return Log(start, write, lambda writer: writer.close(), at_end=True)


def wandb(**options: Any) -> Callback:
    """Logs every metric to Weights & Biases, `wandb.init(**options)`. Needs `wandb`.

    Of several trainings, such as those of `kd.generations`, each has a run of its own: the one before is finished, and
    an `id` or `name` among the options ends in -2, and so on. The last stays open for what you log.
    """
    try:
        import wandb as client
    except ImportError:
        raise ConfigError("kd.callbacks.wandb needs wandb: pip install wandb") from None

    def start(count: int) -> Any:
        own = {name: f"{options[name]}-{count}" for name in ("id", "name") if count > 1 and options.get(name)}
        return client.init(**options | own)

    def write(run: Any, epoch: Epoch) -> None:
        run.log(epoch.metrics, step=epoch.number)

    return Log(start, write, lambda run: run.finish(), at_end=False)


class Log:
    """A callback that writes each training into a log of its own.

    start: opens the log of the training with a number, from 1. write: an epoch into it. finish: closes it. at_end:
        whether that is done after each training, or only before the next begins.
    """

    def __init__(
        self, start: Callable[[int], Any], write: Callable[[Any, Epoch], None], finish: Callable[[Any], Any], *,
        at_end: bool,
    ) -> None:  # fmt: skip
        self._start, self._write, self._finish, self._at_end = start, write, finish, at_end
        self._open: list[Any] = []
        self._count, self._last = 1, 0

    def __call__(self, epoch: Epoch) -> None:
        """Writes it; one that is not after the last is of another training."""
        if epoch.number <= self._last:
            self._close()
            self._count += 1
        self._last = epoch.number
        if not self._open:
            self._open.append(self._start(self._count))
        self._write(self._open[0], epoch)

    def end(self) -> None:
        """Called when a training ends, also before its last epoch."""
        if self._at_end:
            self._close()

    def _close(self) -> None:
        while self._open:
            self._finish(self._open.pop())


def is_higher_better(measure: str, higher: bool | None = None) -> bool:
    """Whether more of a measure is better. Raises `ConfigError` where neither kd_jax nor the user says."""
    if higher is not None:
        return higher
    known = HIGHER_IS_BETTER.get(measure.removeprefix("validation_"))
    if known is None:
        names = ", ".join(f"validation_{name}" for name in HIGHER_IS_BETTER if name != "loss")
        raise ConfigError(
            f"it is not known whether more of {measure} is better: use {names}, or loss, and of another measure say "
            "higher=True or higher=False"
        )
    return known


def value_of(metrics: Mapping[str, Any], measure: str) -> Any:
    """The value of a measure, of the validation where there is one. Raises `ConfigError` with the names there are."""
    for name in (f"validation_{measure}", measure):
        if name in metrics:
            return metrics[name]
    names = ", ".join(name for name in metrics if not name.startswith(WATCHED))
    raise ConfigError(f"there is no measure {measure}: use one of {names}")


def as_callbacks(callbacks: Any) -> list[Callback]:
    """Callbacks as a list: one, several, or None. Raises `ConfigError` for what is none."""
    if callbacks is None:
        return []
    several = [callbacks] if callable(callbacks) or not isinstance(callbacks, Iterable) else list(callbacks)
    for one in several:
        if one in (early_stopping, tensorboard, wandb):
            raise ConfigError(f"the callback is the function {one.__name__}: call it, {one.__name__}(…)")
        if not callable(one):
            raise ConfigError(f"a callback is {one!r}: give functions of a kd.callbacks.Epoch")
        if not takes_one(one):
            name = getattr(one, "__name__", type(one).__name__)
            raise ConfigError(
                f"the callback {name} cannot be called with one argument: give a function of a kd.callbacks.Epoch alone"
            )
    return several


def says_stop(answer: Any) -> bool:
    """Whether a callback's answer is true: of Python, NumPy or JAX. Anything else, such as a number, says nothing."""
    if isinstance(answer, bool | np.bool_):
        return bool(answer)
    return isinstance(answer, np.ndarray | jax.Array) and answer.shape == () and answer.dtype == bool and bool(answer)
