"""Many trainings of one recipe: settings × seeds, in blocks that fit into memory, each a phase with its checkpoints."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kd_jax.experiments import stage as phase
from kd_jax.experiments.notebook.config import ConfigError
from kd_jax.experiments.stage import Keeping, Phase, Progress
from kd_jax.train import memory
from kd_jax.train.checkpoint import Store
from kd_jax.train.step import Examples, Hyperparameters, Metrics, Recipe

# More trainings at once save nothing on a CPU (`benchmarks.seeds`), and a checkpoint should not be far.
_MOST_ON_A_CPU = 100
_MOST = 4096


class Group(NamedTuple):
    """Trainings that differ in seed and hyperparameters alone.

    name: of its phases. settings: one `Hyperparameters` of plain numbers each. seeds: each setting is trained with all.
    role: folded into every seed's key.
    """

    name: str
    recipe: Recipe
    settings: Sequence[Hyperparameters]
    seeds: tuple[int, ...]
    role: int
    epochs: int


class Trained(NamedTuple):
    """A group after its last step, on the host; every leaf `[settings, seeds, ...]`.

    history: `Metrics` of arrays `[settings, seeds, reports]`, and `moments` of the reports, in epochs.
    """

    params: Any
    state: Any
    history: Metrics
    moments: Float[np.ndarray, " reports"]
    train_s: float


class Block(NamedTuple):
    """Some seeds and some settings, by their place; the programs of one fit all blocks of a group."""

    seeds: tuple[int, ...]
    settings: tuple[int, ...]


def blocks(settings: int, seeds: int, most: int) -> list[Block]:
    """Blocks of equal shape and of at most `most` trainings, at least one; the last may repeat what is done.

    A block has all seeds of its settings where they fit, else some seeds of one setting.
    """
    each = min(seeds, most)
    of_seeds = _equal(seeds, each)
    of_settings = _equal(settings, max(1, most // len(of_seeds[0])))
    return [Block(s, k) for k in of_settings for s in of_seeds]


def trainings_at_once(
    one: memory.Needed,
    batch_size: int,
    *,
    beside: int,
    remedy: str = "choose a smaller --batch-size or smaller networks",
) -> int:
    """How many trainings are kept side by side. Raises `ConfigError`, with the remedy, where not even one fits.

    beside: bytes that all of them share, such as the teacher's outputs.
    """
    free = memory.available()
    most = _MOST_ON_A_CPU if jax.default_backend() == "cpu" else _MOST
    if free is None:
        return most
    free = max(0, free - beside)
    fit = free // one.total(batch_size)
    if fit < 1:
        raise ConfigError(
            f"one training needs {one.total(batch_size) / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: {remedy}"
        )
    return min(fit, most)


def run(
    group: Group,
    examples: Examples,
    progress: Progress,
    keeping: Keeping,
    *,
    most: int,
    tolerant: bool = False,
) -> Trained:
    """Trains the group, from the newest checkpoint of each block on. Raises what `phase.run` and `Store.newest` do.

    most: trainings in a block; one that is resumed has the blocks that it had, whatever fits into memory by now.
    tolerant: as `phase.run` has it.
    """
    if keeping.store:
        most = _kept(keeping.store, group.name, most)
    parts: dict[Block, Any] = {}
    prepared: Phase | None = None
    moments, seconds = np.zeros(0), 0.0
    for number, block in enumerate(blocks(len(group.settings), len(group.seeds), most)):
        seeds = tuple(group.seeds[i] for i in block.seeds)
        chosen = [group.settings[i] for i in block.settings] * len(seeds)
        hyperparameters: Hyperparameters = jax.tree.map(lambda *values: jnp.asarray(values, jnp.float32), *chosen)
        name = f"{group.name}-{number}"
        if prepared is None:
            prepared = phase.prepare(
                name,
                group.recipe,
                hyperparameters,
                seeds,
                group.role,
                examples,
                epochs=group.epochs,
                every=keeping.every,
            )
        else:
            prepared = phase.with_others(prepared, name, seeds, group.role, hyperparameters)
        restored = keeping.store.newest(name) if keeping.store else None
        course = phase.run(prepared, examples, progress, keeping, restored, tolerant=tolerant)
        moments, seconds = course.moments, seconds + course.train_s
        shape = (len(seeds), len(block.settings))
        parts[block] = jax.tree.map(
            lambda leaf, shape=shape: np.moveaxis(np.asarray(leaf).reshape(*shape, *leaf.shape[1:]), 0, 1),
            (course.states.params, course.states.state, course.history),
        )
    params, state, history = _assembled(parts, len(group.settings), len(group.seeds))
    return Trained(params, state, history, moments, seconds)


def _kept(store: Store, name: str, most: int) -> int:
    """How many trainings the blocks of a group were to have when it was started."""
    noted = store.notes.get("at_once", {})
    if name not in noted:
        store.note(at_once=noted | {name: most})
    return int(noted.get(name, most))


def _assembled(parts: dict[Block, Any], settings: int, seeds: int) -> Any:
    """The blocks' leaves `[settings of it, seeds of it, ...]` in one array each, `[settings, seeds, ...]`."""

    def assemble(*leaves: Any) -> Any:
        whole = np.empty((settings, seeds, *leaves[0].shape[2:]), leaves[0].dtype)
        for block, leaf in zip(parts, leaves, strict=True):
            whole[np.ix_(block.settings, block.seeds)] = leaf
        return whole

    return jax.tree.map(assemble, *parts.values())


def _equal(count: int, most: int) -> list[tuple[int, ...]]:
    """0 to `count` in as few parts of equal length as possible; the last part starts before where it would be short."""
    number = math.ceil(count / min(count, most))
    length = math.ceil(count / number)
    starts = [min(i * length, count - length) for i in range(number)]
    return [tuple(range(start, start + length)) for start in starts]
