"""Contestants in processes of their own, so that the threads of one library leave those of another alone."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks.measure import Contestant

_made: Any = None


class Apart(ExitStack):
    """Where the processes live: they end with the `with`."""

    def contestant(self, make: Callable[..., Contestant], *arguments: Any) -> Contestant:
        """What `make(*arguments)` makes, made and run in a new process. `make` can be pickled."""
        process = self.enter_context(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")))
        units = process.submit(_make, make, arguments).result()
        return Contestant(partial(_run_in, process), units)


def _run_in(process: ProcessPoolExecutor) -> object:
    return process.submit(_run).result()


def _make(make: Callable[..., Contestant], arguments: tuple[Any, ...]) -> int:
    global _made
    _made = make(*arguments)
    return int(_made.units)


def _run() -> float:
    result = _made.run()
    return result if isinstance(result, float) else 0.0
