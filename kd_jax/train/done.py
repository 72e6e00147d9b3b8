"""What comes out of some steps of an epoch: the state, and numbers of each step on their way to the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.train.step import Metrics, TrainState


class Position(NamedTuple):
    """Where an iterator is. state: what its `set_state` takes, where it has one. drawn: batches since it began."""

    state: Any
    drawn: int


@partial(jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("names",))
@dataclass(frozen=True)
class Packed:
    """Metrics of a step in one array of each dtype, `[names]`, or of several, `[steps, names]`.

    Each array that leaves a program costs some microseconds.

    values: such arrays, or their shapes while a function is traced. names: of the entries of each array.
    """

    values: tuple[Any, ...]
    names: tuple[tuple[str, ...], ...]


def packed(metrics: Metrics) -> Packed:
    """Numbers of one step by name."""
    dtypes = dict.fromkeys(str(jnp.asarray(value).dtype) for value in metrics.values())
    names = tuple(tuple(name for name, value in metrics.items() if value.dtype == dtype) for dtype in dtypes)
    return Packed(tuple(jnp.stack([metrics[name] for name in group]) for group in names), names)


class Done(NamedTuple):
    """Some steps. metrics: arrays `[steps]`, or `[steps or more, names]`. examples: of each step.

    finite: whether the state is; None where nobody looked. position: of the iterator behind these steps.
    """

    state: TrainState
    steps: int
    metrics: Metrics | Packed
    finite: Any
    examples: int
    position: Position | None = None

    def wait(self) -> None:
        """Until the steps are done."""
        jax.block_until_ready(self.metrics)

    def on_host(self) -> dict[str, np.ndarray]:
        """The metrics, `[steps]`. Copies: a view of an array of the CPU keeps that in memory, kilobytes for a step."""
        if isinstance(self.metrics, Mapping):
            return {name: np.array(values) for name, values in self.metrics.items()}
        arrays = [np.array(values) for values in self.metrics.values]
        groups = zip(self.metrics.names, arrays, strict=True)
        found = {name: array[: self.steps, at] for names, array in groups for at, name in enumerate(names)}
        return dict(sorted(found.items()))
