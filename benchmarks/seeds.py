"""Section `seeds`: distilled students a second, when more and more of them are trained together."""

import jax
from tqdm import tqdm

import kd_jax
from benchmarks import kd_jax_ways
from benchmarks.measure import Contestant, Figures, Setting, Table, take_turns, with_best
from benchmarks.steps import NO_TORCH, ROWS, TUNED, count, has_torch
from kd_jax.train import memory

SEEDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
STACKED = "PyTorch, stacked"


def seeds(setting: Setting) -> list[Table]:
    """Students a second, from the time of some steps of all of them."""
    whole = kd_jax.make_config().epochs * (len(setting.data.train_labels) // 32)
    rounds = max(2, setting.rounds // 3)
    figures: Figures = {}
    notes = [
        f"{rounds} rounds. Extrapolated: the time of some steps of all students (at least 20 each), taken {whole:,} "
        f"times as a whole {ROWS['distilled']} takes; compilation, initialisation, shuffling and evaluation are left "
        "out",
        "each student has its own parameters and its own order of batches of 32; the section `memory` runs whole "
        "trainings",
    ]
    if has_torch():
        notes.append(f"{STACKED}: parameters stacked, batched products, eager mode, fused Adam")
    else:
        notes.append(NO_TORCH)
    for number in tqdm((1, 16) if setting.quick else SEEDS, desc="seeds", leave=False, disable=None):
        refused = why_not(number, setting.data)
        if refused:
            notes.append(refused)
            continue
        seconds = take_turns(_contestants(number, setting.data), rounds, label=f"{number} students")
        by_column = {column: [number / (whole * value) for value in values] for column, values in seconds.items()}
        figures[str(number)] = with_best({"": by_column}, TUNED, _ways(), rate=True)[0][""]
    title = "Distilled students trained in a second, by how many train together"
    return [Table("seeds", title, "students/s", figures, tuple(notes), rate=True)]


def why_not(number: int, data: kd_jax.Dataset) -> str | None:
    """Why so many students are not tried: they would not fit into memory."""
    free = memory.available()
    network = kd_jax_ways.job("distilled", data).setup.network
    sizes = {"examples": len(data.train_labels), "test_examples": len(data.test_labels)}
    needed = number * memory.needed(network, (784, 20, 20, 10), **sizes).total(32)
    if free is None or needed <= free:
        return None
    return f"{number} students are left out: they need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _contestants(number: int, data: kd_jax.Dataset) -> dict[str, Contestant]:
    """A unit is a step of all students."""
    # So many that kernels which are turned at both ends of a turn cost nothing, as in an epoch.
    steps = max(20, 4000 // number) if jax.default_backend() == "cpu" else 375
    group = kd_jax_ways.Group(kd_jax_ways.job("distilled", data), number)
    rows = group.orders(min(steps, group.job.per_epoch))
    found = {"kd_jax": Contestant(lambda: group.train(rows), rows.shape[1])}
    if not has_torch():
        return found
    import torch

    from benchmarks import torch_stacked, torch_ways

    stacked, own = torch_stacked.Trainer(number, data), max(2, min(50, steps))
    indices = torch.randint(len(data.train_labels), (own, number, 32), device=torch_ways.device())

    def run_stacked() -> None:
        stacked.train(indices)
        torch_ways.wait()

    found[STACKED] = Contestant(run_stacked, own)
    if number == 1:
        for way in _ways():
            train = torch_ways.Job("distilled", data).tuned(way)
            found[way] = torch_ways.contestant(train, count("distilled", way, 32, group.job.per_epoch))
    return found


def _ways() -> tuple[str, ...]:
    if not has_torch():
        return ()
    from benchmarks import torch_ways

    return tuple(way for way in torch_ways.ways() if "compile" not in way)
