"""Contestants in processes of their own, so that the threads of one library leave those of another alone.

`python -m benchmarks.apart` is such a process: pickled orders come in, pickled answers go out. It may be another
Python than the one that asks, with other packages.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Contestant

# Two Pythons of different versions understand it.
_PROTOCOL = 4


class Apart(ExitStack):
    """Where the processes live: they end with the `with`. python: the one to start, else this one."""

    def __init__(self, python: str | None = None) -> None:
        super().__init__()
        self.python = python or sys.executable

    def contestant(self, make: Callable[..., Contestant], *arguments: Any) -> Contestant:
        """What `make(*arguments)` makes, made and run in a new process. `make` can be pickled."""
        command = [self.python, "-m", "benchmarks.apart"]
        root = Path(__file__).parents[1]
        # When the `with` ends, its input is closed, which ends it.
        process = self.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root))
        return Contestant(partial(_ask, process, None), _ask(process, (make, arguments)))


def _ask(process: "subprocess.Popen[bytes]", order: Any) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(pickle.dumps(order, protocol=_PROTOCOL))
        process.stdin.flush()
        return pickle.load(process.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        with suppress(BrokenPipeError):
            process.stdin.close()
        raise RuntimeError(f"{process.args!r} ended with {process.wait()} before it answered") from None


def _main() -> None:
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What a library prints is no answer, and what a process of its own reads no order.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    made: Any = None
    while True:
        try:
            order = pickle.load(orders)
        except EOFError:
            return
        if order is None:
            result = made.run()
            answer = float(result) if isinstance(result, float) else 0.0
        else:
            make, arguments = order
            made = make(*arguments)
            answer = int(made.units)
        answers.write(pickle.dumps(answer, protocol=_PROTOCOL))
        answers.flush()


if __name__ == "__main__":
    _main()
