"""A progress bar for a training, in terminals and notebooks."""

import sys
import warnings
from typing import Any

import numpy as np


class Silent:
    """Says nothing."""

    def start(self, epochs: int, steps: int | None, epoch: int, done: int) -> None:
        """A training of `epochs` epochs of `steps` steps (None where that is not known) begins, or goes on."""

    def advance(self, epoch: int, steps: int, metrics: dict[str, Any]) -> None:
        """So many steps more are done; metrics: arrays `[steps]`."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """An epoch is over; its metrics, of the validation too."""

    def close(self) -> None:
        """The training ended, well or not."""


class Bar(Silent):
    """One bar of tqdm over all epochs, with the newest loss and the last validation behind it."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.epochs = 0
        self.validated = ""

    def start(self, epochs: int, steps: int | None, epoch: int, done: int) -> None:
        """Draws the bar."""
        total = None if steps is None else epochs * steps
        self.bar = make_bar(total=total, initial=epoch * (steps or 0) + done, unit="step")
        self.epochs = epochs

    def advance(self, epoch: int, steps: int, metrics: dict[str, Any]) -> None:
        """Moves the bar."""
        self.bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        self.bar.set_postfix_str(f"loss {np.mean(metrics['loss']):.4f}{self.validated}", refresh=False)
        self.bar.update(steps)

    def epoch(self, metrics: dict[str, float]) -> None:
        """Keeps the newest validation's first measure on the bar."""
        names = [name for name in metrics if name.startswith("validation_")]
        if names:
            self.validated = f", {names[0].replace('_', ' ')} {metrics[names[0]]:.4f}"

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def make_bar(**options: Any) -> Any:
    """A bar of tqdm; in a notebook on the standard output, as what stands on the other is red there."""
    with warnings.catch_warnings():
        # In a notebook without widgets tqdm says so; its bar of text is as good.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

        return tqdm(file=sys.stdout if _is_notebook() else sys.stderr, **options)


def is_watched() -> bool:
    """Whether somebody may see a bar: a terminal, or a notebook."""
    return _is_notebook() or bool(getattr(sys.stderr, "isatty", bool)())


def _is_notebook() -> bool:
    # One that runs this code: a process that starts others, as a tool does, has ipykernel, too.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None
