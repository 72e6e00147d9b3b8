"""Sections `steps`, `batches` and `evaluation`: one step at batch 32, at other batches, and the test set."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
from tqdm import tqdm

import kd_jax
from benchmarks import kd_jax_ways, keras_ways, limit
from benchmarks.measure import Contestant, Figures, Setting, Table, as_figures, take_turns, with_best

ROWS = {"teacher": "teacher", "student": "student", "distilled": "distilled student"}
SIZES = {"teacher": (784, 1200, 1200, 10), "student": (784, 20, 20, 10), "distilled": (784, 20, 20, 10)}
BATCHES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NO_TORCH = "PyTorch is not installed: the notebook and tuned PyTorch are missing"
TUNED = "tuned PyTorch"

Contestants = dict[tuple[str, str], Contestant]


@cache
def has_torch(python: str | None = None) -> bool:
    """Whether PyTorch can take part: in this Python, or in another."""
    if python in (None, sys.executable):
        return importlib.util.find_spec("torch") is not None
    return bool(torch_of(python))


@cache
def torch_of(python: str) -> str:
    """The versions of another Python and its PyTorch, or nothing where it cannot run what these benchmarks time."""
    program = "import platform, torch, benchmarks.networks, benchmarks.language\n"
    program += "print(f'Python {platform.python_version()}, torch {torch.__version__}')"
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False, cwd=root)
    except OSError:
        return ""
    return (done.stdout.splitlines() or [""])[-1] if done.returncode == 0 else ""


def steps(setting: Setting) -> list[Table]:
    """One step at batch 32, by everybody."""
    contestants, notes = _kd_jax(setting.data, 32), []
    if has_torch():
        contestants |= _torch(setting.data, compiled=not setting.quick)
    else:
        notes.append(NO_TORCH)
    reason = keras_ways.why_not()
    if reason is None:
        contestants |= _keras(setting.data)
    else:
        notes.append(f"Keras is missing: {reason}")
    probes = {("probe", name): probe for name, probe in limit.probes(32, (1200, 1200)).items()}
    contestants, failed = _that_run(contestants)
    for probe in probes.values():
        probe.run()
    seconds = take_turns(contestants | probes, setting.rounds, label="steps", warm=False)
    probed = {name: seconds.pop(("probe", name)) for _, name in probes}
    figures = as_figures(seconds, lambda row, value: 1000 * value)
    chosen, best = with_best(figures, TUNED, _ways())
    rates = _add_limits(chosen, probed)
    notes += [f"{TUNED} is the best of its ways: {_listing(best)}", *failed, rates] if best else [*failed, rates]
    notes += _left_out(compiled=not setting.quick)
    by_name = {ROWS[row]: by_column for row, by_column in chosen.items()}
    details = {"all ways, ms": figures, "seconds for an operation or a byte": probed}
    return [Table("steps", "One training step, batch 32", "ms", by_name, tuple(notes), details=details)]


def batches(setting: Setting) -> list[Table]:
    """Images in a second at every batch size, in the three rows."""
    sweep = (32, 512) if setting.quick else BATCHES
    tables, sizes = [], {row: sizes for row, sizes in SIZES.items()}
    rounds = max(2, setting.rounds // 3)
    for row in sizes:
        figures: Figures = {}
        best: dict[str, str] = {}
        for batch in tqdm(sweep, desc=f"batches, {row}", leave=False, disable=None):
            contestants = {key: one for key, one in _kd_jax(setting.data, batch, only=row).items()}
            if has_torch():
                contestants |= _torch(setting.data, compiled=False, batch=batch, only=row)
            contestants, _ = _that_run(contestants)
            seconds = take_turns(contestants, rounds, label=f"{row}, batch {batch}", warm=False)
            found = as_figures(seconds, lambda _, value, batch=batch: batch / value)  # type: ignore[misc]
            chosen, way = with_best(found, TUNED, _ways(), rate=True)
            figures[str(batch)] = chosen[row]
            best[str(batch)] = way.get(row, "")
        notes = [f"{rounds} rounds; compilation and start-up are left out; torch.compile does not take part here"]
        notes += [f"{TUNED} is the best of its ways: {_listing(best)}"] if has_torch() else [NO_TORCH]
        title = f"Images trained on in a second, by batch size: {ROWS[row]}"
        tables.append(Table(f"batches-{row}", title, "images/s", figures, tuple(notes), rate=True))
    return tables


def evaluation(setting: Setting) -> list[Table]:
    """Counting the right answers of the test images."""
    contestants = {(row, "kd_jax"): kd_jax_ways.evaluation(row, setting.data) for row in ("teacher", "student")}
    if has_torch():
        from benchmarks import torch_reference, torch_ways

        for row, model in (("teacher", torch_reference.Teacher), ("student", torch_reference.Student)):
            contestants[row, "notebook"] = torch_ways.evaluation(model(), setting.data, tuned=False)
            contestants[row, TUNED] = torch_ways.evaluation(model(), setting.data, tuned=True)
    rounds = max(2, setting.rounds // 3)
    seconds = take_turns(contestants, rounds, label="evaluation")
    notes = [
        f"{rounds} rounds; counts of right answers alone; images are in memory, scaled beforehand for tuned PyTorch, "
        "as bytes for kd_jax, image by image from the DataLoader for the notebook; compilation is left out"
    ]
    title = f"Evaluation of {len(setting.data.test_labels):,} test images"
    figures = as_figures(seconds, lambda _, value: 1000 * value)
    return [Table("evaluation", title, "ms", figures, tuple(notes if has_torch() else [*notes, NO_TORCH]))]


def count(row: str, column: str, batch: int, per_epoch: int) -> int:
    """Steps in a turn: enough to be timed well, a whole epoch for the quickest.

    A teacher's first steps of a turn meet caches full of what the others left, which no long training does; of 60
    they are few.
    """
    large = row == "teacher"
    if jax.default_backend() != "cpu":
        at_32 = {"kd_jax": 1875, "CUDA graphs": 1875, "CUDA graphs, compiled": 1875}.get(column, 200)
        wanted = at_32
    else:
        at_32 = {"kd_jax": 60 if large else 1875, "notebook": 20 if large else 40, "Keras 3": 60 if large else 200}.get(
            column, 60 if large else 200
        )
        wanted = max(2, at_32 * 32 // batch)
    return min(wanted, per_epoch)


def _kd_jax(data: kd_jax.Dataset, batch: int, only: str | None = None) -> Contestants:
    found = {}
    for row in [only] if only else ROWS:
        job = kd_jax_ways.job(row, data, batch)
        steps = count(row, "kd_jax", batch, job.per_epoch)
        found[row, "kd_jax"] = kd_jax_ways.contestant(kd_jax_ways.Trainer(job), steps)
    return found


def _torch(data: kd_jax.Dataset, *, compiled: bool, batch: int = 32, only: str | None = None) -> Contestants:
    from benchmarks import torch_ways

    torch_ways.torch.manual_seed(0)
    found, per_epoch = {}, len(data.train_labels) // batch
    for row in [only] if only else ROWS:
        if only is None:
            train = torch_ways.Job(row, data).notebook()
            found[row, "notebook"] = torch_ways.contestant(train, count(row, "notebook", batch, per_epoch))
        for way in _ways():
            if compiled or "compile" not in way:
                train = _Later(partial(_tuned, row, data, way, batch))
                found[row, way] = torch_ways.contestant(train, count(row, way, batch, per_epoch))
    return found


def _tuned(row: str, data: kd_jax.Dataset, way: str, batch: int) -> Callable[[int], None]:
    from benchmarks import torch_ways

    return torch_ways.Job(row, data).tuned(way, batch)


class _Later:
    """Makes what it calls at its first call, so that a way that fails does so alone."""

    def __init__(self, make: Callable[[], Callable[[int], None]]) -> None:
        self.make = make
        self.train: Callable[[int], None] | None = None

    def __call__(self, steps: int) -> None:
        self.train = self.train or self.make()
        self.train(steps)


def _keras(data: kd_jax.Dataset) -> Contestants:
    found = {}
    for row in ROWS:
        steps = count(row, "Keras 3", 32, len(data.train_labels) // 32)
        found[row, "Keras 3"] = Contestant(keras_ways.trainer(row, data, steps), steps)
    return found


def _ways() -> tuple[str, ...]:
    if not has_torch():
        return ()
    from benchmarks import torch_ways

    return torch_ways.ways()


def _that_run(contestants: Contestants) -> tuple[Contestants, list[str]]:
    """Those that run here, and a note on each of the compiled or captured ways that does not."""
    running, notes = {}, []
    for (row, column), contestant in contestants.items():
        try:
            contestant.run()
        except Exception as error:
            # What a compiler or a driver can raise has no common type; kd_jax itself must not fail.
            if column in ("kd_jax", "notebook", "eager"):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            notes.append(f"{column} does not run here, {ROWS[row]}: {reason}")
            continue
        running[row, column] = contestant
    return running, notes


def _add_limits(figures: Figures, probed: dict[str, list[float]]) -> str:
    """Adds the column `limit` in milliseconds, and tells the rates that it follows from."""
    product, copy = limit.best(probed, "product"), limit.best(probed, "copy")
    for row, by_column in figures.items():
        pairs = zip(probed[product], probed[copy], strict=True)
        by_column["limit"] = [1000 * limit.seconds(SIZES[row], 32, *pair) for pair in pairs]
    middle = {name: sorted(probed[name])[len(probed[name]) // 2] for name in (product, copy)}
    parts = [
        f"{ROWS[row]} {limit.operations(sizes, 32) / 1e6:,.1f} million operations "
        f"({1e3 * limit.operations(sizes, 32) * middle[product]:.3g} ms) and {limit.traffic(sizes, 32) / 1e6:,.2f} MB "
        f"({1e3 * limit.traffic(sizes, 32) * middle[copy]:.3g} ms)"
        for row, sizes in SIZES.items()
        if row != "distilled"
    ]
    return (
        f"limit = {limit.FORMULA}: {1e-9 / middle[product]:,.0f} GFLOP/s ({product}) and "
        f"{1e-9 / middle[copy]:,.1f} GB/s ({copy}), both ends of a copy counted; {'; '.join(parts)}; the distilled "
        "student as the student; parameters, gradient and both means of Adam are read and written once each"
    )


def _left_out(*, compiled: bool) -> list[str]:
    return [
        "start-up and compilation are left out of every figure",
        "the notebook has its share of the DataLoader, tuned PyTorch and kd_jax theirs of gathering the batch; kd_jax "
        "has its share of the shuffle where a turn is an epoch (on a CPU, the students)",
        "Keras 3 runs on JAX by `fit`, 20 steps in a call, images in memory; its Distiller runs the teacher each step",
        *([] if compiled else ["torch.compile is left out of the quick mode"]),
    ]


def _listing(best: dict[str, str]) -> str:
    return ", ".join(f"{ROWS.get(row, row)} {way}" for row, way in best.items())
