"""Seconds for one training step of the notebook's three models: the notebook in PyTorch, tuned PyTorch, and kd_jax.

`python -m benchmarks.throughput [--rounds N] [--out DIR]`. The three take turns within each round, on one machine in
one process, so that their ratios mean something where the machine is shared. Start-up and compilation are left out. A
step of the notebook has its share of the `DataLoader`; a step of kd_jax has its share of gathering and scaling, and
trains one seed.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from tabulate import tabulate
from tqdm import tqdm

import kd_jax
from benchmarks import torch_reference as reference
from kd_jax import Examples, Hyperparameters, KDWeights, Output, Recipe, train

_ROWS = {"teacher": "teacher", "student": "student", "distilled": "distilled student"}
_COLUMNS = ("notebook", "tuned PyTorch", "kd_jax")


class Contestant(NamedTuple):
    """`run()` does `steps` steps and waits for them."""

    run: Callable[[], Any]
    steps: int


def in_torch(row: str, data: kd_jax.Dataset, *, tuned: bool) -> Contestant:
    """The reference trainer, as the notebook's user runs it or tuned; batches go on from round to round."""
    torch.manual_seed(0)
    model = reference.Teacher() if row == "teacher" else reference.Student()
    teacher = reference.Teacher().eval() if row == "distilled" else None
    soft = reference.kl_without_t_squared if row == "distilled" else None
    steps = 10 if row == "teacher" else 40
    if tuned:
        images, labels = reference.as_tensors(data.train_images, data.train_labels)
        logits = None if teacher is None else reference.predict(teacher, images)
        optimizer, batches = (
            reference.tuned_adam(model),
            _forever(partial(reference.tuned_batches, images, labels, logits)),
        )
    else:
        loader = reference.NotebookBatches(data.train_images, data.train_labels)
        optimizer, batches = reference.notebook_adam(model), _forever(lambda: iter(loader))
    return Contestant(
        lambda: reference.train_epoch(model, optimizer, islice(batches, steps), soft=soft, teacher=teacher), steps
    )


def in_kd_jax(row: str, data: kd_jax.Dataset) -> Contestant:
    """kd_jax's own compiled steps."""
    network = kd_jax.mlp([784, 1200, 1200, 10], dropout=0.5) if row == "teacher" else kd_jax.mlp([784, 20, 20, 10])
    method = kd_jax.KD_WITHOUT_T_SQUARED if row == "distilled" else kd_jax.CROSS_ENTROPY
    weights = KDWeights(jnp.float32(0.5), jnp.float32(20)) if row == "distilled" else ()
    hyperparameters, recipe = Hyperparameters(jnp.float32(3e-4), weights), Recipe(network, method)
    taught = Output(jnp.zeros((len(data.train_labels), data.classes))) if row == "distilled" else None
    examples = Examples(jnp.asarray(data.train_images), jnp.asarray(data.train_labels), taught)
    key, steps = jax.random.key(0), 20 if row == "teacher" else 400
    order = train.epoch_order(key, 0, examples=len(data.train_labels), batch_size=32)[:steps]
    go = jax.jit(partial(train.train_steps, recipe=recipe), donate_argnums=0)
    state = train.init(key, hyperparameters, recipe=recipe)

    def run() -> None:
        nonlocal state
        state, _ = go(state, key, examples, order, hyperparameters)
        jax.block_until_ready(state)

    return Contestant(run, steps)


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds for a step, by row and column, one value for each round."""
    data = kd_jax.load("mnist")
    contestants = {
        (row, column): in_kd_jax(row, data) if column == "kd_jax" else in_torch(row, data, tuned=column != "notebook")
        for row in _ROWS
        for column in _COLUMNS
    }
    for contestant in contestants.values():
        contestant.run()
    times: dict[str, dict[str, list[float]]] = {row: {column: [] for column in _COLUMNS} for row in _ROWS}
    for _ in tqdm(range(rounds), desc="rounds"):
        for (row, column), contestant in contestants.items():
            started = time.perf_counter()
            contestant.run()
            times[row][column].append(1000 * (time.perf_counter() - started) / contestant.steps)
    return times


def table(times: dict[str, dict[str, list[float]]]) -> str:
    """Medians in milliseconds, and how many times faster kd_jax is, with the quartiles over the rounds."""
    rows = []
    for row, by_column in times.items():
        cells = [f"{statistics.median(by_column[column]):.3f}" for column in _COLUMNS]
        for column in _COLUMNS[:-1]:
            ratios = [a / b for a, b in zip(by_column[column], by_column["kd_jax"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
        rows.append([_ROWS[row], *cells])
    headers = ["one step, ms", *_COLUMNS, "notebook / kd_jax", "tuned / kd_jax"]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "torch")},
        "devices": [device.device_kind for device in jax.devices()],
        "torch_threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measures, prints the table and, with --out, keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="rounds to take turns in (default: 30)")
    parser.add_argument("--out", type=Path, help="folder for throughput.md and throughput.json")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: at least 2 are needed for a spread")
    times, facts = measure(options.rounds), environment()
    text = f"{table(times)}\n\nMedians and quartiles of {options.rounds} rounds, batch 32. {json.dumps(facts)}\n"
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "throughput.md").write_text(text)
        (options.out / "throughput.json").write_text(json.dumps({"environment": facts, "ms": times}, indent=1) + "\n")


def _forever(epoch: Callable[[], Iterator[reference.Batch]]) -> Iterator[reference.Batch]:
    while True:
        yield from epoch()


if __name__ == "__main__":
    main()
