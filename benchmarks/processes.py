"""Runs a command as a process of its own: how long it took, when it first spoke, and how much memory it had."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_LOOK_EVERY_S = 0.05


class ProcessError(RuntimeError):
    """A process that failed; the last line that it wrote."""


class Finished(NamedTuple):
    """seconds: from the start to the end, the interpreter's included. marked_s: to the first line with the mark.

    peak_bytes: largest resident memory, None where the system has no /proc. output: its lines.
    """

    seconds: float
    marked_s: float | None
    peak_bytes: int | None
    output: list[str]


def run(command: Sequence[str], *, mark: str, environment: Mapping[str, str] | None = None) -> Finished:
    """Runs `python command` to its end. Raises `ProcessError` where it does not end well."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        env=_environment(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    lines, marked = [], None
    watcher = _Watcher(process.pid)
    watcher.start()
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if marked is None and mark in line:
                marked = time.perf_counter() - started
            lines.append(line.rstrip("\n"))
    process.wait()
    seconds = time.perf_counter() - started
    watcher.join()
    if process.returncode != 0:
        said = next((line for line in reversed(lines) if line.strip()), "nothing was said")
        raise ProcessError(f"{' '.join(command)} ended with {process.returncode}: {said[:300]}")
    return Finished(seconds, marked, watcher.peak_bytes, lines)


class _Watcher(threading.Thread):
    """Reads the high-water mark of a process until it ends.

    `ru_maxrss` would not do: a process begins with that of the process which started it.
    """

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.path = Path(f"/proc/{process}/status")
        self.peak_bytes: int | None = None

    def run(self) -> None:
        """Looks again and again; a mark is missed only if it rises in the last moment."""
        while True:
            try:
                lines = self.path.read_text().splitlines()
            except OSError:
                return
            found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
            if not found:
                return
            self.peak_bytes = 1024 * found[0]
            time.sleep(_LOOK_EVERY_S)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's, without a compilation cache of the user's, so that a cold start is one."""
    own = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return own | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)} | dict(more)
