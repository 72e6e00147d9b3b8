"""How long a call of a model takes, in XLA and in onnxruntime: quartiles over rounds in which all take turns."""

import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from kd_jax.convolution import canonical
from kd_jax.export.program import Program
from kd_jax.models.onnx import open_session

PyTree = Any
Name = TypeVar("Name", bound=Hashable)

# A shorter one is repeated until it has taken as long, so that the clock's own time does not count.
_SHORTEST_S = 2e-3


class Quartiles(NamedTuple):
    """Seconds of a call: a quarter of the rounds took less than `first`, half less than `median`."""

    first: float
    median: float
    third: float


def in_onnxruntime(path: str | Path, inputs: PyTree) -> Callable[[], Any]:
    """A call of an ONNX file on one thread."""
    session = open_session(path, threads=1)
    arrays = jax.tree.leaves(inputs)
    return lambda: session.logits(arrays)


def in_xla(program: Program, inputs: PyTree) -> Callable[[], Any]:
    """A call of a model compiled by XLA for this device, with as many threads as XLA takes.

    program: of as many examples as `inputs` has.
    """
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    compiled = jax.jit(canonical(program.__call__)).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def operations(program: Program) -> float:
    """Floating-point operations of a program for a fixed number of examples, as XLA counts them before it compiles."""
    counted: Any = jax.jit(program.__call__).lower(*jax.tree.leaves(program.inputs)).cost_analysis()
    return float((counted or {}).get("flops", 0.0))


def interleaved(calls: Mapping[Name, Callable[[], Any]], *, rounds: int) -> dict[Name, Quartiles]:
    """The quartiles of each call over `rounds`, in each of which every call has its turn, in a new order."""
    rng = np.random.default_rng(0)
    repeats = {name: _repeats(call) for name, call in calls.items()}
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(rounds):
        for place in rng.permutation(len(names)):
            name = names[place]
            seconds[name].append(_timed(calls[name], repeats[name]))
    return {name: Quartiles(*map(float, np.percentile(each, (25, 50, 75)))) for name, each in seconds.items()}


def _repeats(call: Callable[[], Any]) -> int:
    # The first call is slower than all others.
    _timed(call, 1)
    return max(1, int(np.ceil(_SHORTEST_S / max(_timed(call, 1), 1e-7))))


def _timed(call: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats
