import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax.data.dataset import Dataset
from kd_jax.errors import CheckpointError, RunError
from kd_jax.experiments import stage as stages
from kd_jax.experiments import stage_loop
from kd_jax.experiments.images import Images, Settings, Setup
from kd_jax.experiments.notebook import experiment
from kd_jax.experiments.notebook.config import make_config
from kd_jax.experiments.shell.progress import Silent, StageName
from kd_jax.experiments.stage import Role, Stage
from kd_jax.experiments.stage_loop import train_stage
from kd_jax.methods import KD, CrossEntropy
from kd_jax.models import mlp
from kd_jax.train.checkpoint import CheckpointPolicy, Store

pytestmark = pytest.mark.usefixtures("standard_promotion")


def prepared(
    dataset: Dataset, rates: list[float], *, every: int | None = None, dropout: float = 0.0, units: int = 4
) -> tuple[Stage, Images]:
    labels = jnp.asarray(dataset.train_labels)
    data = Images(jnp.asarray(dataset.train_images), labels, 4 * jax.nn.one_hot(labels, 3))
    many = len(rates)
    settings = Settings(jnp.array(rates), KD(jnp.full(many, 0.5), jnp.full(many, 4.0)))
    setup = Setup(mlp([36, units, 3], dropout=dropout).network, batch_size=8)
    seeds = tuple(range(10, 10 + many))
    name = StageName("distilled", "distilled student")
    return stages.prepare(name, Role.STUDENT, setup, settings, seeds, data, epochs=2, every=every), data


def test_every_training_has_its_own_settings(small_dataset: Dataset) -> None:
    together = train_stage(*prepared(small_dataset, [0.01, 0.001]), Silent(), CheckpointPolicy())
    slow = train_stage(*prepared(small_dataset, [0.01, 0.01]), Silent(), CheckpointPolicy())
    np.testing.assert_array_equal(together.metrics.loss[0], slow.metrics.loss[0])
    assert together.metrics.loss[1, -1] > 1.5 * slow.metrics.loss[1, -1]


def test_the_training_whose_numbers_are_not_finite_is_named(small_dataset: Dataset) -> None:
    with pytest.raises(
        RunError, match=r"distilled student with seed 11 is not finite at step 2 at a learning rate of 1e\+30 and"
    ):
        train_stage(*prepared(small_dataset, [0.01, 1e30, 0.01], units=8), Silent(), CheckpointPolicy())
    with pytest.raises(RunError, match="with the seeds 10, 12 is not finite at step 2"):
        train_stage(*prepared(small_dataset, [1e30, 0.01, 1e30], units=8), Silent(), CheckpointPolicy())


def test_what_is_not_finite_is_never_saved(small_dataset: Dataset, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.start({})
    with pytest.raises(RunError):
        train_stage(*prepared(small_dataset, [1e30], every=1), Silent(), CheckpointPolicy(store, 1))
    assert store.close() is None
    last = store.newest("distilled")
    assert last is not None
    assert last.step == 1
    assert all(np.isfinite(array).all() for array in last.arrays.values())


def test_a_parameter_that_is_not_finite_is_found_where_no_loss_shows_it(small_dataset: Dataset) -> None:
    """The only step overflows."""
    data = Images(jnp.asarray(small_dataset.train_images), jnp.asarray(small_dataset.train_labels))
    setup = Setup(
        mlp([36, 8, 3]).network,
        optimizer=lambda rate: optax.chain(optax.sgd(rate), optax.scale(3e38)),
        batch_size=240,
    )
    rates = Settings(jnp.array([1e-38, 1e30]), CrossEntropy())
    only = stages.prepare(StageName("student", "student alone"), Role.STUDENT, setup, rates, (3, 4), data, epochs=1)
    with pytest.raises(
        RunError,
        match="a moment of the optimiser of the student alone with seed 4 is not finite after step 1 at",
    ):
        train_stage(only, data, Silent(), CheckpointPolicy())


def after(chunks: int) -> Callable[[], bool]:
    """Asks to stop once so many chunks have ended."""
    left = iter(range(chunks - 1, -1, -1))
    return lambda: next(left, 0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 29, 30, 31, 47, 60])
def test_a_training_goes_on_in_the_middle_of_an_epoch_bit_for_bit(
    small_dataset: Dataset, tmp_path: Path, chunks: int
) -> None:
    """30 steps and as many chunks in an epoch; dropout and two seeds."""
    start = partial(prepared, small_dataset, [0.01, 0.02], dropout=0.5)
    whole = train_stage(*start(), Silent(), CheckpointPolicy())
    store = Store(tmp_path)
    store.start({})
    with pytest.raises(KeyboardInterrupt):
        train_stage(*start(), Silent(), CheckpointPolicy(store, should_stop=after(chunks)))
    assert store.close() is None
    restored = Store(tmp_path).newest("distilled")
    assert restored is not None
    assert restored.step == chunks
    resumed = train_stage(*start(), Silent(), CheckpointPolicy(), restored)
    for a, b in zip(jax.tree.leaves(whole[:3]), jax.tree.leaves(resumed[:3]), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert resumed.train_s >= restored.facts["train_s"] > 0
    with pytest.raises(CheckpointError, match=f"distilled student was written after step {chunks + 61}, where this"):
        train_stage(*start(), Silent(), CheckpointPolicy(), restored._replace(step=chunks + 61))


class Clock(Silent):
    """A second for each chunk, in place of `stage_loop.time`; told of chunks as `Progress`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.perf_counter = time.perf_counter

    def monotonic(self) -> float:
        """The seconds until now."""
        return self.now

    def advance(self, **chunk: Any) -> None:
        """One chunk more."""
        self.now += 1


@pytest.mark.parametrize(
    ("pause", "stopped_after", "saved"),
    [(0, None, [*range(1, 61)]), (7, None, [*range(1, 60, 7), 60]), (7, 20, [1, 8, 15, 20]), (1e9, None, [1, 60])],
)
@pytest.mark.parametrize("slow_disk", [False, True])
def test_checkpoints_keep_a_pause_but_for_the_first_and_the_last(
    pause: float,
    stopped_after: int | None,
    saved: list[int],
    slow_disk: bool,
    small_dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[int] = []

    class Noted(Store):
        def save(self, phase: str, step: int, arrays: Any, facts: Any) -> None:
            steps.append(step)

        @property
        def writing(self) -> bool:
            return slow_disk and bool(steps)

    clock = Clock()
    monkeypatch.setattr(stage_loop, "time", clock)
    asked = after(stopped_after) if stopped_after else lambda: False
    policy = CheckpointPolicy(Noted(Path()), should_stop=asked, pause=pause)
    with pytest.raises(KeyboardInterrupt) if stopped_after else contextlib.nullcontext():
        train_stage(*prepared(small_dataset, [0.01], every=1), clock, policy)
    # Nobody waits for a checkpoint that nobody asked for.
    assert steps == ([saved[0], saved[-1]] if slow_disk and pause else saved)


@pytest.mark.parametrize("chunks", [5, 75, 150])
def test_an_experiment_goes_on_from_any_stage_bit_for_bit(small_dataset: Dataset, tmp_path: Path, chunks: int) -> None:
    config = make_config(teacher_hidden=(16,), student_hidden=(4,), epochs=2, batch_size=8, seeds=2, learning_rate=0.01)
    whole = experiment.run_experiment(config, small_dataset, Silent())
    store = Store(tmp_path)
    store.start({})
    with pytest.raises(KeyboardInterrupt):
        experiment.run_experiment(config, small_dataset, Silent(), CheckpointPolicy(store, should_stop=after(chunks)))
    assert store.close() is None
    resumed = experiment.run_experiment(config, small_dataset, Silent(), CheckpointPolicy(Store(tmp_path)))

    def without_timing(result: experiment.Result) -> Any:
        models = [trained._replace(timing=None) for trained in experiment.models(result).values()]
        return jax.tree.leaves((models, result.comparison))

    for a, b in zip(without_timing(whole), without_timing(resumed), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
