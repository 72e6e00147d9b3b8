"""Runs a command as a process of its own: how long it took, when it first spoke, and how much memory it had."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_KIB = 1 if sys.platform == "darwin" else 1024


class ProcessError(RuntimeError):
    """A process that failed; the last line that it wrote."""


class Finished(NamedTuple):
    """seconds: from the start to the end, the interpreter's included. marked_s: to the first line with the mark.

    peak_bytes: largest resident memory of the process or one that it started. output: its lines.
    """

    seconds: float
    marked_s: float | None
    peak_bytes: int
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
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if marked is None and mark in line:
                marked = time.perf_counter() - started
            lines.append(line.rstrip("\n"))
    # Not Popen.wait, which keeps the resources that this one process used to itself.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        said = next((line for line in reversed(lines) if line.strip()), "nothing was said")
        raise ProcessError(f"{' '.join(command)} ended with {process.returncode}: {said[:300]}")
    return Finished(seconds, marked, usage.ru_maxrss * _KIB, lines)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's, without a compilation cache of the user's, so that a cold start is one."""
    own = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return own | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)} | dict(more)
