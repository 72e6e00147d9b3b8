"""Telling a person how far an experiment is: a bar on a terminal, a line an epoch elsewhere, or nothing."""

import sys
from typing import TextIO

import numpy as np
from tqdm import tqdm

from kd_jax.train import Metrics


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

    def describe(self) -> str:
        rate = self.seeds * self.steps / self.seconds
        return (
            f"loss {self.loss / self.steps:.4f}  training accuracy {self.right / self.steps:.2%}  {rate:,.0f} steps/s"
        )


class Lines:
    """One plain line for each epoch; for files, pipes and logs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout

    def compiled(self, seconds: float, estimate: float) -> None:
        """Says what compiling took and what training will take."""
        self._write(f"Compiled in {seconds:.1f} s; training will take {duration(estimate)}.")

    def start(self, phase: str, *, epochs: int, steps: int) -> None:
        """Begins a phase."""
        self.phase, self.epochs, self.per_epoch, self.epoch = phase, epochs, steps, _Epoch()

    def advance(self, *, epoch: int, steps: int, metrics: Metrics, seconds: float) -> None:
        """Counts a chunk, and writes a line at the end of an epoch."""
        self.epoch.add(steps, metrics, seconds)
        if self.epoch.steps == self.per_epoch:
            self._write(f"{self.phase:<9}  epoch {epoch + 1}/{self.epochs}  {self.epoch.describe()}")
            self.epoch = _Epoch()

    def finish(self) -> None:
        """Ends a phase; every line is written already."""

    def _write(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


class Bars(Lines):
    """A progress bar for each phase, for terminals."""

    def start(self, phase: str, *, epochs: int, steps: int) -> None:
        """Begins a phase with its bar."""
        super().start(phase, epochs=epochs, steps=steps)
        shape = "{desc} |{bar}| {percentage:3.0f}% {elapsed}<{remaining}  {postfix}"
        self.bar = tqdm(
            total=epochs * steps, desc=f"{phase:<9}", bar_format=shape, file=self.stream, dynamic_ncols=True
        )

    def advance(self, *, epoch: int, steps: int, metrics: Metrics, seconds: float) -> None:
        """Moves the bar; the loss and the speed are those of the epoch so far."""
        self.epoch.add(steps, metrics, seconds)
        self.bar.set_postfix_str(f"epoch {epoch + 1}/{self.epochs}  {self.epoch.describe()}", refresh=False)
        self.bar.update(steps)
        if self.epoch.steps == self.per_epoch:
            self.epoch = _Epoch()

    def finish(self) -> None:
        """Leaves the bar as it stands."""
        self.bar.close()


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
