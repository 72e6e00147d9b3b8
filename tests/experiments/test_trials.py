from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_jax.data.batch import Batch
from kd_jax.data.dataset import Dataset
from kd_jax.errors import ConfigError
from kd_jax.experiments import images as of_images
from kd_jax.experiments import trials
from kd_jax.experiments.images import Images, Settings, Setup
from kd_jax.experiments.shell.progress import Silent
from kd_jax.experiments.stage import Role
from kd_jax.experiments.trials import Trials, blocks
from kd_jax.methods import KD
from kd_jax.models import mlp
from kd_jax.optimizers import adam
from kd_jax.train import memory, sizes
from kd_jax.train.checkpoint import CheckpointPolicy, Store
from kd_jax.train.fit import fit

pytestmark = pytest.mark.usefixtures("quick_compiling")

SETTINGS = [Settings(rate, KD(alpha, t)) for rate, alpha, t in ((0.01, 0.5, 2.0), (0.003, 0.0, 8.0), (0.02, 1.0, 1.0))]
SETUP = Setup(mlp([36, 4, 3], dropout=0.3).network, batch_size=16)


def make_images(small_dataset: Dataset) -> Images:
    logits = 3 * np.random.default_rng(1).normal(size=(240, 3)).astype(np.float32)
    images, labels = small_dataset.train_images, small_dataset.train_labels
    return Images(*map(jnp.asarray, (images, labels, logits)))


@pytest.fixture
def images(small_dataset: Dataset) -> Images:
    return make_images(small_dataset)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 200))
def test_blocks_are_of_one_shape_fit_and_leave_nothing_out(settings: int, seeds: int, most: int) -> None:
    found = blocks(settings, seeds, most)
    assert len({(len(b.seeds), len(b.settings)) for b in found}) == 1
    assert len(found[0].seeds) * len(found[0].settings) <= most
    assert {(s, k) for b in found for s in b.seeds for k in b.settings} == {
        (s, k) for s in range(seeds) for k in range(settings)
    }
    assert len(set(found)) == len(found)


@pytest.fixture(scope="module")
def each_alone(small_dataset: Dataset) -> dict[tuple[int, int], Any]:
    """The variables of every training, by the places of its setting and of its seed, in a program of one: `kd.fit`."""
    seen = make_images(small_dataset)

    @jax.jit
    def alone(key: Any, own: Settings) -> Any:
        state, _ = fit(
            key, Batch(seen.images, seen.labels), SETUP.network, method=own.method, optimizer=adam(own.learning_rate),
            epochs=2, batch_size=SETUP.batch_size, teacher=seen.logits, prepare=of_images.prepare,
        )  # fmt: skip
        return state.variables

    return {
        (i, j): alone(jax.random.fold_in(jax.random.key(seed), 1), jax.tree.map(jnp.float32, own))
        for i, own in enumerate(SETTINGS)
        for j, seed in enumerate((3, 4))
    }


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 2, 4, 100])
def test_trials_are_what_each_training_is_alone(
    images: Images, each_alone: dict[tuple[int, int], Any], most: int
) -> None:
    one = Trials("students", SETUP, SETTINGS, (3, 4), Role.STUDENT, 2)
    found = trials.train_trials(one, images, Silent(), CheckpointPolicy(), most=most)
    assert found.metrics.loss.shape[:2] == (3, 2)
    for place, alone in each_alone.items():
        jax.tree.map(
            lambda a, b, place=place: np.testing.assert_allclose(a[place], b, rtol=1e-4, atol=1e-5),
            found.variables,
            alone,
        )


@pytest.mark.slow
def test_large_networks_train_in_turn_and_find_the_same(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Trials("students", SETUP, SETTINGS, (3, 4), Role.STUDENT, 1)
    together = trials.train_trials(one, images, Silent(), CheckpointPolicy(), most=100)
    monkeypatch.setattr(sizes, "SMALL", 1)
    jax.clear_caches()
    in_turn = trials.train_trials(one, images, Silent(), CheckpointPolicy(), most=100)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), in_turn.variables, together.variables
    )
    jax.clear_caches()


def test_as_many_train_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    one = memory.Needed(1000, 10)
    monkeypatch.setattr(memory, "available", lambda: 5 * 1320 + 1)
    assert trials.trainings_at_once(one, 32, beside=0) == 5
    assert trials.trainings_at_once(one, 32, beside=2) == 4
    monkeypatch.setattr(memory, "available", lambda: 1319)
    with pytest.raises(ConfigError, match=r"one training needs .* choose a smaller batch size or smaller networks"):
        trials.trainings_at_once(one, 32, beside=0)
    monkeypatch.setattr(memory, "available", lambda: None)
    assert trials.trainings_at_once(one, 32, beside=0) == 100


def test_trials_that_were_stopped_go_on_with_their_blocks_whatever_fits_by_then(images: Images, tmp_path: Path) -> None:
    one = Trials("students", SETUP, SETTINGS, (3, 4), Role.STUDENT, 1)
    store = Store(tmp_path)
    store.start({})
    whole = trials.train_trials(one, images, Silent(), CheckpointPolicy(store), most=2)
    resumed = trials.train_trials(one, images, Silent(), CheckpointPolicy(store), most=100)
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole.variables)
    assert store.close() is None
