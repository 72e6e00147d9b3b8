"""What every test shares: strict arithmetic, a cache of its own, and small data sets."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from kd_jax.data.dataset import Dataset, make_dataset

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The tests compile the same small programs again and again; `make test` compiles them quickly, see `tools.quick_flags`.
# A folder for each worker: JAX reads files there that another process has begun to write.
COMPILED = str(Path(__file__).parents[1] / ".pytest_cache" / "xla" / os.environ.get("PYTEST_XDIST_WORKER", "alone"))
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Of the time of tests that compile much a twentieth went into looking for garbage among all that is alive.
gc.set_threshold(20_000, 20, 100)


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """For tests of `optax.adam`, which raises a float to an integer power."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps tests away from the user's cache; compiled programs are also those of the processes that a test starts."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", COMPILED)
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module() -> Iterator[None]:
    """Programs of all modules together are more memory mappings than Linux gives a process: it ends in a segfault.

    A process has 65,530. Compiled programs are left to the next module as long as they are few: it uses many of them.
    """
    yield
    if _mappings() > 10_000:
        jax.clear_caches()
        gc.collect()


def _mappings() -> int:
    maps = Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else 2**16


@pytest.fixture(scope="module")
def quick_compiling() -> Iterator[None]:
    """For tests of what the commands do, or how trainings are grouped, whose programs are many and small.

    XLA optimises little then, in processes, too.

    Tests of losses, training and parity, and those that ask for the same bits, run the programs that users run.
    """
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(name.upper(), "1")
        jax.config.update(name, True)
        yield
        jax.config.update(name, before)


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at none: drawing them takes longer than training."""
    from kd_jax.experiments.notebook import plots
    from kd_jax.experiments.sweep import plots as sweep_plots

    for module in (plots, sweep_plots):
        monkeypatch.setattr(module, "write", lambda *arguments: [])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty when a test begins."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KD_JAX_CACHE", str(folder))
    return folder


@pytest.fixture
def shared_mnist() -> Path:
    """The gzip originals of MNIST."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "mnist"
    if not folder.is_dir():
        pytest.skip("the gzip originals of MNIST are not beside the repository")
    return folder


@pytest.fixture(scope="session")
def small_dataset() -> Dataset:
    """Three classes that a small network can learn: bright rows at different heights, with noise. Read-only."""
    rng = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 3, count)
        images = rng.integers(0, 120, (count, 6, 6))
        images[np.arange(count), 2 * labels] += 100
        return images.astype(np.uint8), labels

    dataset = make_dataset("small", *part(240), *part(60))
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        array.flags.writeable = False
    return dataset
