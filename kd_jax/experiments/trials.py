"""Many trainings of one setup: settings × seeds, in blocks that fit into memory, each a stage with its checkpoints."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kd_jax import errors
from kd_jax.errors import ConfigError
from kd_jax.experiments.images import Images, Metrics, Settings, Setup
from kd_jax.experiments.shell.progress import Progress, StageName
from kd_jax.experiments.stage import Role, Stage, prepare, with_others
from kd_jax.experiments.stage_loop import train_stage
from kd_jax.train import memory
from kd_jax.train.checkpoint import CheckpointPolicy, Store

# More trainings at once save nothing on a CPU (`benchmarks.seeds`), and a checkpoint should not be far.
_MOST_ON_A_CPU = 100
_MOST = 4096


class Trials(NamedTuple):
    """Trainings that differ in seed and settings alone.

    name: of its stages, which have a number, too. settings: one `Settings` of plain numbers each. seeds: each
    setting is trained with all. role: folded into every seed's key. title: what a person calls the model, where that is
    not the name.
    """

    name: str
    setup: Setup
    settings: Sequence[Settings]
    seeds: tuple[int, ...]
    role: Role
    epochs: int
    title: str = ""

    def stage_name(self, number: int) -> StageName:
        """Of the block `number`."""
        return StageName(self.name, self.title or f"{self.name}-{number}", number)


class TrainedTrials(NamedTuple):
    """Trials after their last step, on the host; every leaf `[settings, seeds, ...]`.

    metrics: arrays `[settings, seeds, reports]`. report_epochs: when each report was, in epochs.
    """

    variables: Any
    metrics: Metrics
    report_epochs: Float[np.ndarray, " reports"]
    train_s: float


class Block(NamedTuple):
    """Some seeds and some settings, by their place; the programs of one fit all blocks of the same trials."""

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
    remedy: str = errors.SMALLER,
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
            f"one training needs {memory.gib(one.total(batch_size))}, and {memory.gib(free)} are free", remedy
        )
    return min(fit, most)


def train_trials(
    trials: Trials,
    data: Images,
    progress: Progress,
    policy: CheckpointPolicy,
    *,
    most: int,
    tolerant: bool = False,
) -> TrainedTrials:
    """Trains all of them, from the newest checkpoint of each block on. Raises as `train_stage` and `Store.newest` do.

    most: trainings in a block; one that is resumed has the blocks that it had, whatever fits into memory by now.
    tolerant: as `train_stage` has it.
    """
    if policy.store:
        most = _most_at_first(policy.store, trials.name, most)
    parts: dict[Block, Any] = {}
    stage: Stage | None = None
    report_epochs, seconds = np.zeros(0), 0.0
    for number, block in enumerate(blocks(len(trials.settings), len(trials.seeds), most)):
        seeds = tuple(trials.seeds[i] for i in block.seeds)
        chosen = [trials.settings[i] for i in block.settings] * len(seeds)
        values: Settings = jax.tree.map(lambda *each: jnp.asarray(each, jnp.float32), *chosen)
        name = trials.stage_name(number)
        if stage is None:
            stage = prepare(
                name, trials.role, trials.setup, values, seeds, data, epochs=trials.epochs, every=policy.every
            )
        else:
            stage = with_others(stage, name, seeds, values)
        restored = policy.store.newest(name.folder) if policy.store else None
        history = train_stage(stage, data, progress, policy, restored, tolerant=tolerant)
        report_epochs, seconds = history.report_epochs, seconds + history.train_s
        shape = (len(seeds), len(block.settings))
        parts[block] = jax.tree.map(
            lambda leaf, shape=shape: np.moveaxis(np.asarray(leaf).reshape(*shape, *leaf.shape[1:]), 0, 1),
            (history.states.variables, history.metrics),
        )
    variables, metrics = _assembled(parts, len(trials.settings), len(trials.seeds))
    return TrainedTrials(variables, metrics, report_epochs, seconds)


def _most_at_first(store: Store, name: str, most: int) -> int:
    """How many trainings the blocks were to have when they were started."""
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
