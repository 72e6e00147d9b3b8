"""Telling a person how far an experiment is: a bar on a terminal, a line an epoch elsewhere, or nothing."""

import shutil
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from kd_jax.experiments.images import Metrics
from kd_jax.experiments.shell.text import say


class StageName(NamedTuple):
    """Which stage this is, of those that an experiment has.

    trials: of what trainings. title: what a person calls the model. number: of the block, where they train in several.
    """

    trials: str
    title: str
    number: int | None = None

    @property
    def folder(self) -> str:
        """Where its checkpoints are."""
        return self.trials if self.number is None else f"{self.trials}-{self.number}"


@runtime_checkable
class Progress(Protocol):
    """Who is told how far the experiment is."""

    def compiled(self, seconds: float, estimate: float) -> None:
        """Every program is compiled; training will take about `estimate` seconds."""

    def start(self, stage: StageName, *, epochs: int, steps: int, done: int = 0) -> None:
        """A stage of `epochs` epochs of `steps` steps begins, `done` of all of them from a checkpoint."""

    def advance(self, *, epoch: int, steps: int, metrics: Metrics, seconds: float) -> None:
        """`steps` more steps of `epoch` (from 0) took `seconds`; `metrics` of them are arrays `[trainings]`."""

    def finish(self) -> None:
        """The stage ended, well or not."""


class _Epoch:
    """Sums over the chunks of an epoch, for means over it and over the seeds."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.loss, self.right, self.seeds = 0, 0.0, 0.0, 0.0, 1

    def add(self, steps: int, metrics: Metrics, seconds: float) -> None:
        self.steps += steps
        self.seconds += seconds
        self.seeds = np.size(metrics.loss)
        self.loss += steps * float(np.mean(metrics.loss))
        self.right += steps * float(np.mean(metrics.accuracy))

    @property
    def speed(self) -> str:
        return f"{self.seeds * self.steps / self.seconds:,.0f} steps/s"

    def brief(self) -> str:
        return f"loss {self.loss / self.steps:.4f}  {self.speed}"

    def full(self) -> str:
        return f"loss {self.loss / self.steps:.4f}  training accuracy {self.right / self.steps:.2%}  {self.speed}"


class Lines:
    """One plain line for each epoch; for files, pipes and logs."""

    def compiled(self, seconds: float, estimate: float) -> None:
        """Says what compiling took and what training will take."""
        self._write(f"Compiled in {seconds:.1f} s; training will take {duration(estimate)}.")

    def start(self, stage: StageName, *, epochs: int, steps: int, done: int = 0) -> None:
        """Begins a stage; tells where a checkpoint has brought it."""
        if done:
            self._write(f"{stage.folder:<9}  {done:,} of {epochs * steps:,} steps from a checkpoint")
        self.stage, self.epochs, self.per_epoch, self.done, self.epoch = stage.folder, epochs, steps, done, _Epoch()

    def advance(self, *, epoch: int, steps: int, metrics: Metrics, seconds: float) -> None:
        """Counts a chunk, and writes a line at the end of an epoch."""
        self.epoch.add(steps, metrics, seconds)
        self.done += steps
        if self.done % self.per_epoch == 0:
            self._write(f"{self.stage:<9}  epoch {epoch + 1}/{self.epochs}  {self.epoch.full()}")
            self.epoch = _Epoch()

    def finish(self) -> None:
        """Ends a stage; every line is written already."""

    def _write(self, line: str) -> None:
        say(line)


class Bars(Lines):
    """A progress bar for each stage, for terminals."""

    def start(self, stage: StageName, *, epochs: int, steps: int, done: int = 0) -> None:
        """Begins a stage with its bar."""
        super().start(stage, epochs=epochs, steps=steps, done=done)
        shape = "{desc} |{bar}| {elapsed}<{remaining}{postfix}"
        # Falls back to 80 where the terminal does not tell its width, and then tqdm would draw nothing.
        width = min(shutil.get_terminal_size().columns, 110)
        self.bar = tqdm(
            total=epochs * steps, initial=done, desc=f"{self.stage:<9}", bar_format=shape, file=sys.stdout, ncols=width,
            nrows=20,
        )  # fmt: skip

    def advance(self, *, epoch: int, steps: int, metrics: Metrics, seconds: float) -> None:
        """Moves the bar; the loss and the speed are those of the epoch so far."""
        self.epoch.add(steps, metrics, seconds)
        self.bar.set_postfix_str(f"epoch {epoch + 1}/{self.epochs}  {self.epoch.brief()}", refresh=False)
        self.bar.update(steps)
        self.done += steps
        if self.done % self.per_epoch == 0:
            self.epoch = _Epoch()

    def finish(self) -> None:
        """Leaves the bar as it stands."""
        self.bar.close()


# The share of all work after which what is left is told.
_TOLD_FROM = 0.1


class Overall(Lines):
    """One bar for many stages; where there is no terminal a line at the end of each.

    costs: of one step of a stage, by its trials, in any unit. total: of everything. words: for the trials.
    """

    def __init__(self, costs: Mapping[str, float], total: float, words: Mapping[str, str], *, bar: bool) -> None:
        self.costs, self.total, self.spent, self.new = costs, total, 0.0, 0.0
        self.words = words
        # Compiling and measuring take their time as well.
        self.began = time.monotonic()
        width = min(shutil.get_terminal_size().columns, 110)
        shape = "{desc} |{bar}| {percentage:3.0f} % {elapsed}<{remaining}"
        self.bar = (
            tqdm(total=total, desc="compiling", bar_format=shape, file=sys.stdout, ncols=width, nrows=20)
            if bar
            else None
        )

    def start(self, stage: StageName, *, epochs: int, steps: int, done: int = 0) -> None:
        """Begins a stage; what a checkpoint has done of it counts, and not for the speed."""
        self.stage, self.cost = self.words[stage.trials], self.costs[stage.trials]
        if self.bar is not None:
            self.bar.set_description_str(self.stage)
        self._move(done * self.cost)

    def advance(self, *, epoch: int, steps: int, metrics: Metrics, seconds: float) -> None:
        """Moves the bar."""
        self._move(steps * self.cost)
        self.new += steps * self.cost

    def finish(self) -> None:
        """Ends a stage, with a line where there is no bar."""
        if self.bar is None and self.new:
            share = self.spent / self.total
            left = max(0.0, self.total - self.spent) * (time.monotonic() - self.began) / self.new
            # Of little work most of the time was compiling.
            told = self.new >= _TOLD_FROM * self.total and share < 0.995
            self._write(f"{self.stage:<26} {share:4.0%} of all" + (f", {duration(left)} left" if told else ""))

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self.bar is not None:
            self.bar.close()

    def _move(self, cost: float) -> None:
        # What is chosen in the end may cost more than was thought.
        cost = min(cost, self.total - self.spent)
        self.spent += cost
        if self.bar is not None:
            self.bar.update(cost)


class Silent(Lines):
    """Says nothing."""

    def _write(self, line: str) -> None:
        """Writes nothing."""


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"
