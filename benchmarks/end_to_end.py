"""Section `end-to-end`: the whole notebook as a process, from an empty compilation cache and from a warm one."""

import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

import kd_jax
from benchmarks import processes
from benchmarks.measure import Figures, Setting, Table, with_best
from benchmarks.steps import NO_TORCH, TUNED, has_torch

# Printed when every program is compiled and each has run a trial of 75 steps: no sooner than the first training step.
_KD_JAX_MARK = "Compiled in"

EMPTY, WARM = "empty cache", "warm cache"


def end_to_end(setting: Setting) -> list[Table]:
    """Seconds for everything, and to the first training step."""
    rounds = setting.whole_rounds
    epochs = 1 if setting.quick else kd_jax.make_config().epochs
    images = 3_200 if setting.quick else len(setting.data.train_labels)
    whole: Figures = {f"everything, {cache}": {} for cache in (EMPTY, WARM)}
    start: Figures = {f"to the first step, {cache}": {} for cache in (EMPTY, WARM)}
    with tempfile.TemporaryDirectory() as folder:
        data = save(setting.data, images, Path(folder) / "data.npz")
        for number in tqdm(range(rounds), desc="end to end", leave=False, disable=None):
            finished = _round(data, epochs, Path(folder) / str(number))
            for (column, cache), one in finished.items():
                whole[f"everything, {cache}"].setdefault(column, []).append(one.seconds)
                if one.marked_s is not None:
                    start[f"to the first step, {cache}"].setdefault(column, []).append(one.marked_s)
    chosen, best = with_best(whole | start, TUNED, _ways())
    size = f"{images:,} training images, {epochs} epoch{'s' if epochs > 1 else ''} of each of the three models"
    notes = [
        f"{rounds} round{'s' if rounds > 1 else ''} of {size}, 1 seed; processes: imports, reading the data, "
        "compilation, training and evaluation are in it, and for kd_jax writing its table, plots and parameters",
        "the files of Python's packages are in the operating system's cache in all runs; PyTorch compiles nothing "
        "here, so that both rows hold the same runs of it",
        "the first step of kd_jax is told when all programs are compiled and have run a trial of some steps",
        *([f"{TUNED} is the best of its ways: {best[f'everything, {WARM}']}"] if best else [NO_TORCH]),
    ]
    return [Table("end-to-end", "The whole notebook as a process", "s", chosen, tuple(notes), details=whole | start)]


def save(data: kd_jax.Dataset, images: int, path: Path) -> Path:
    """The first `images` training images and all test images as an npz file, as `npz:FILE` takes it."""
    np.savez(
        path,
        x_train=data.train_images[:images],
        y_train=data.train_labels[:images],
        x_test=data.test_images,
        y_test=data.test_labels,
    )
    return path


def kd_jax_command(data: Path, epochs: int, out: Path, *, seeds: int = 1) -> list[str]:
    """Arguments of Python for the whole experiment in kd_jax."""
    options = {"--dataset": f"npz:{data}", "--epochs": str(epochs), "--seeds": str(seeds), "--out": str(out)}
    return ["-m", "kd_jax.run", *[text for pair in options.items() for text in pair]]


def torch_command(data: Path, epochs: int, way: str) -> list[str]:
    """Arguments of Python for the whole notebook in PyTorch."""
    return ["-m", "benchmarks.torch_run", "--way", way, "--data", str(data), "--epochs", str(epochs)]


def _round(data: Path, epochs: int, folder: Path) -> dict[tuple[str, str], processes.Finished]:
    finished = {}
    for cache in (EMPTY, WARM):
        command = kd_jax_command(data, epochs, folder / cache)
        environment = {"KD_JAX_CACHE": str(folder / "cache")}
        finished["kd_jax", cache] = processes.run(command, mark=_KD_JAX_MARK, environment=environment)
    if has_torch():
        from benchmarks import torch_run

        for way in (torch_run.NOTEBOOK, *_ways()):
            one = processes.run(torch_command(data, epochs, way), mark=torch_run.FIRST_STEP)
            finished |= {(way, cache): one for cache in (EMPTY, WARM)}
    return finished


def _ways() -> tuple[str, ...]:
    """Compiling costs more than it brings in so short a run."""
    if not has_torch():
        return ()
    from benchmarks import torch_ways

    return tuple(way for way in torch_ways.ways() if "compile" not in way)
