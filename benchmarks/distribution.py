"""The notebook's three models in PyTorch and in kd_jax, over many seeds: do the counts of correct images agree?

Each framework uses its own initialisation, shuffling, dropout and teachers. PyTorch runs the tuned loop of
`benchmarks.torch_reference`: the notebook's mathematics with tensors in memory, fused Adam and the teacher's logits
computed once. Student i is distilled from teacher i modulo their number, in both frameworks alike. Finished counts are
kept, so that a killed run goes on where it was: `python -m benchmarks.distribution --out results/distribution`.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from tqdm import tqdm

import kd_jax
from benchmarks import torch_reference as reference
from kd_jax import Batch, CrossEntropy, KDWithoutTSquared, Method, Network, Output
from kd_jax.experiments import images as of_images
from kd_jax.experiments.notebook import recipes
from kd_jax.experiments.notebook.methods import KDAsWritten
from kd_jax.optimizers import adam
from kd_jax.teacher import CachedTeacher

# Row -> what the notebook counted. The correct KL is what the notebook meant: it has no count of its own.
ROWS = {"teacher": 9812, "student": 9322, "kd-without-t2": None, "kd-as-written": 9332}
TITLES = {
    "teacher": "teacher",
    "student": "student alone",
    "kd-without-t2": "distilled, correct KL without T²",
    "kd-as-written": "distilled, as written",
}
SOFT_LOSSES = {
    "student": None,
    "kd-without-t2": reference.kl_without_t_squared,
    "kd-as-written": reference.as_written,
}

# Students of kd_jax that are trained in one call: enough to pay for it, few enough to be lost in a killed run.
_CHUNK = 12

Logits = Float[np.ndarray, "examples classes"]


class Framework(NamedTuple):
    """How one framework trains. Both give the number of correct test images.

    teacher: `teacher(seed) -> (count, logits of the training images)`.
    students: `students(row, seeds, teacher logits) -> counts`, in the order of the seeds. chunk: seeds in one call.
    """

    teacher: Callable[[int], tuple[int, Logits]]
    students: Callable[[str, list[int], Logits], list[int]]
    chunk: int


def in_torch(data: kd_jax.Dataset, epochs: int) -> Framework:
    """The notebook in PyTorch, each model seeded by `torch.manual_seed`."""
    images, labels = reference.as_tensors(data.train_images, data.train_labels)
    test_images, test_labels = reference.as_tensors(data.test_images, data.test_labels)
    # A student's matrices are too small to share among threads, and a teacher's threads that wait for a core in use by
    # another program cost more than they bring: 174 ms a step in place of 12.
    torch.set_num_threads(1)

    def teacher(seed: int) -> tuple[int, Logits]:
        torch.manual_seed(_own_seed(seed, "teacher"))
        model = reference.Teacher()
        reference.fit(model, images, labels, epochs=epochs)
        return reference.count_correct(model, test_images, test_labels), reference.predict(model, images).numpy()

    def students(row: str, seeds: list[int], teacher_logits: Logits) -> list[int]:
        counts = []
        for seed in seeds:
            torch.manual_seed(_own_seed(seed, "student"))
            model, soft = reference.Student(), SOFT_LOSSES[row]
            taught = None if soft is None else torch.from_numpy(teacher_logits)
            reference.fit(model, images, labels, epochs=epochs, soft=soft, teacher_logits=taught)
            counts.append(reference.count_correct(model, test_images, test_labels))
        return counts

    return Framework(teacher, students, chunk=1)


def in_kd_jax(data: kd_jax.Dataset, epochs: int) -> Framework:
    """The same models by `kd_jax.fit`, students of one teacher as a `vmap` over their keys."""
    config = kd_jax.make_config()
    teacher_network, student_network = recipes.networks(config, data)
    seen = Batch(jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
    test_images, test_labels = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)
    rate, numbers = jnp.float32(reference.LEARNING_RATE), (reference.ALPHA, reference.TEMPERATURE)
    methods: dict[str, Method] = {
        "student": CrossEntropy(),
        "kd-without-t2": KDWithoutTSquared(*map(jnp.float32, numbers)),
        "kd-as-written": KDAsWritten(*map(jnp.float32, numbers)),
    }

    def fit(
        key: Any, seen: Batch, method: Method, taught: CachedTeacher | None, *, network: Network
    ) -> tuple[Any, Any]:
        state, _ = kd_jax.fit(
            key, seen, network, method=method, teacher=taught, optimizer=adam(rate), epochs=epochs,
            batch_size=reference.BATCH_SIZE, prepare=of_images.prepare,
        )  # fmt: skip
        logits = of_images.predict(state.variables, test_images, network=network)
        return state, jnp.sum(jnp.argmax(logits, axis=-1) == test_labels)

    fit_one = jax.jit(fit, static_argnames="network")

    @partial(jax.jit, static_argnames="network")
    def fit_many(keys: Any, seen: Batch, method: Method, taught: CachedTeacher | None, *, network: Network) -> Any:
        return jax.vmap(lambda key: fit(key, seen, method, taught, network=network)[1])(keys)

    def teacher(seed: int) -> tuple[int, Logits]:
        key = jax.random.key(_own_seed(seed, "teacher"))
        state, count = fit_one(key, seen, CrossEntropy(), None, network=teacher_network)
        return int(count), np.asarray(of_images.predict(state.variables, seen.inputs, network=teacher_network))

    def students(row: str, seeds: list[int], teacher_logits: Logits) -> list[int]:
        keys = jnp.stack([jax.random.key(_own_seed(seed, "student")) for seed in seeds])
        taught = None if row == "student" else CachedTeacher(Output(jnp.asarray(teacher_logits)))
        return [int(count) for count in fit_many(keys, seen, methods[row], taught, network=student_network)]

    return Framework(teacher, students, chunk=_CHUNK)


def difference(ours: list[float], theirs: list[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean of `ours` minus mean of `theirs`, and its 95 % interval by Welch's t; None where either has one value."""
    mean = float(np.mean(ours) - np.mean(theirs))
    if min(len(ours), len(theirs)) < 2 or np.ptp(ours) + np.ptp(theirs) == 0:
        return mean, None
    low, high = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return mean, (float(low), float(high))


def compare(results: Mapping[str, Any], row: str) -> tuple[float, tuple[float, float] | None]:
    """`difference` of kd_jax and PyTorch in a row; where it is distilled, of the means over each teacher's students."""
    teachers = results["settings"]["teachers"] if row not in ("teacher", "student") else None
    ours, theirs = (_independent(results["counts"][name][row], teachers) for name in ("kd_jax", "torch"))
    return difference(ours, theirs)


def _independent(counts: Mapping[str, int], teachers: int | None) -> list[float]:
    """Values that do not depend on one another: students of one teacher share its luck, so that their mean is one."""
    if teachers is None:
        return [float(count) for count in counts.values()]
    groups = [[count for seed, count in counts.items() if int(seed) % teachers == i] for i in range(teachers)]
    return [float(np.mean(group)) for group in groups if group]


def teacher_sd(counts: Mapping[str, int], teachers: int) -> float | None:
    """Standard deviation of what the teachers add to their students' counts, by a one-way analysis of variance."""
    groups = [[count for seed, count in counts.items() if int(seed) % teachers == i] for i in range(teachers)]
    size = min(map(len, groups))
    if teachers < 2 or size < 2:
        return None
    within = float(np.mean([np.var(group, ddof=1) for group in groups]))
    between = float(np.var([np.mean(group) for group in groups], ddof=1))
    return max(0.0, between - within / float(np.mean([len(group) for group in groups]))) ** 0.5


def table(results: Mapping[str, Any]) -> str:
    """The counts as Markdown, beside the notebook's."""
    lines = [
        "# Correct test images of 10,000: kd_jax and PyTorch",
        "",
        "| model | notebook (1 run) | PyTorch: mean ± sd (n) | kd_jax: mean ± sd (n) | difference | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for row, notebook in ROWS.items():
        theirs, ours = (list(results["counts"][name][row].values()) for name in ("torch", "kd_jax"))
        if not (theirs and ours):
            continue
        mean, interval = compare(results, row)
        shown = "needs 2 seeds each" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}"
        cells = [TITLES[row], str(notebook or "–"), _summary(theirs), _summary(ours), f"{mean:+.1f}", shown]
        lines.append(f"| {' | '.join(cells)} |")
    environment, teachers = results["environment"], results["settings"]["teachers"]
    lines += ["", f"{verdict(results)}", ""]
    for row in ("kd-without-t2", "kd-as-written"):
        spreads = [f"{name} {_images(teacher_sd(counts[row], teachers))}" for name, counts in results["counts"].items()]
        lines.append(f"Standard deviation between the teachers, {TITLES[row]}: {', '.join(spreads)}.")
    lines += [
        "",
        f"{results['settings']['epochs']} epochs, batch 32, Adam 3e-4, alpha 0.5, T = 20; {teachers} teachers, "
        f"student i distilled from teacher i modulo {teachers}. The interval is Welch's, 95 %, of the difference of "
        "means, kd_jax minus PyTorch; for distilled students, which share the luck of their teacher, of the means over "
        "each teacher's students. PyTorch ran the notebook's mathematics with tensors in memory, fused Adam and "
        "the teacher's logits computed once.",
        "",
        f"`{results['command']}`",
        "",
        ", ".join(f"{name} {value}" for name, value in environment.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def verdict(results: Mapping[str, Any]) -> str:
    """What the intervals show, and the largest difference of students that they do not rule out."""
    shown: list[str] = []
    bounds: list[float] = []
    for row in ROWS:
        theirs, ours = (list(results["counts"][name][row].values()) for name in ("torch", "kd_jax"))
        interval = compare(results, row)[1] if theirs and ours else None
        if interval is None:
            return "Too few seeds to tell."
        if not interval[0] <= 0 <= interval[1]:
            shown.append(TITLES[row])
        if row != "teacher":
            bounds += interval
    found = (
        f"A difference is shown of: {', '.join(shown)}." if shown else "No difference is shown: each interval has 0."
    )
    return f"{found} Students may differ by {max(bounds, key=abs):+.0f} images at most, as far as the intervals tell."


def main() -> None:
    """Trains what is missing, and writes `OUT.json` and `OUT.md`."""
    options = _options()
    out = Path(options.out)
    data, results = kd_jax.load("mnist"), _resume(out.with_suffix(".json"), options)
    kept = out.with_suffix(".teachers")
    kept.mkdir(parents=True, exist_ok=True)
    frameworks = {"torch": in_torch(data, options.epochs), "kd_jax": in_kd_jax(data, options.epochs)}
    for name, framework in frameworks.items():
        counts = results["counts"][name]
        lessons = {row: list(_missing(counts[row], options, framework.chunk)) for row in SOFT_LOSSES}
        for seed in tqdm(range(options.teachers), desc=f"{name}: teachers"):
            lost = any(lessons.values()) and not (kept / f"{name}-{seed}.npy").exists()
            if lost or str(seed) not in counts["teacher"]:
                started = time.perf_counter()
                count, logits = framework.teacher(seed)
                np.save(kept / f"{name}-{seed}.npy", logits)
                _add(results, name, "teacher", {seed: count}, time.perf_counter() - started, out)
        for row, missing in lessons.items():
            for teacher, seeds in tqdm(missing, desc=f"{name}: {row}"):
                started = time.perf_counter()
                found = framework.students(row, seeds, np.load(kept / f"{name}-{teacher}.npy"))
                _add(results, name, row, dict(zip(seeds, found, strict=True)), time.perf_counter() - started, out)
    out.with_suffix(".md").write_text(table(results), encoding="utf-8")
    print(table(results))
    # The logits are large, and of no use to a finished study.
    shutil.rmtree(kept)


def _missing(counts: Mapping[str, int], options: argparse.Namespace, chunk: int) -> Iterator[tuple[int, list[int]]]:
    """(teacher, seeds without a count) in chunks; students of one chunk have the same teacher."""
    for teacher in range(options.teachers):
        seeds = [seed for seed in range(teacher, options.students, options.teachers) if str(seed) not in counts]
        for start in range(0, len(seeds), chunk):
            yield teacher, seeds[start : start + chunk]


def _own_seed(seed: int, role: str) -> int:
    """So that a teacher and a student of the same number share nothing."""
    return seed + 1_000_000 * (role == "teacher")


def _add(results: dict[str, Any], name: str, row: str, counts: Mapping[int, int], seconds: float, out: Path) -> None:
    """Keeps the counts at once, in a file that is never half written."""
    results["counts"][name][row].update({str(seed): count for seed, count in counts.items()})
    results["seconds"][name][row] = results["seconds"][name].get(row, 0.0) + seconds
    partial_file = out.with_suffix(".json.partial")
    partial_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial_file, out.with_suffix(".json"))


def _resume(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run with the same settings and environment has found, or nothing yet."""
    settings = {"epochs": options.epochs, "teachers": options.teachers}
    command = f"python -m benchmarks.distribution {' '.join(sys.argv[1:])}".strip()
    if not path.exists():
        nothing: dict[str, Any] = {name: {row: {} for row in ROWS} for name in ("torch", "kd_jax")}
        found = {"counts": nothing, "seconds": {"torch": {}, "kd_jax": {}}}
        return {"command": command, "settings": settings, "environment": _environment(), **found}
    results = json.loads(path.read_text(encoding="utf-8"))
    for what, now in (("settings", settings), ("environment", _environment())):
        if results[what] != now:
            sys.exit(f"{path} was made with other {what} ({results[what]}, now {now}): choose another --out")
    return {**results, "command": command}


def _environment() -> dict[str, Any]:
    packages = {name: version(name) for name in ("jax", "flax", "optax", "torch", "numpy")}
    return {
        "Python": platform.python_version(), **packages, "platform": platform.platform(), "CPUs": os.cpu_count() or 1,
        "JAX device": jax.devices()[0].device_kind,
    }  # fmt: skip


def _summary(counts: list[int]) -> str:
    spread = f" ± {np.std(counts, ddof=1):.1f}" if len(counts) > 1 else ""
    return f"{np.mean(counts):.1f}{spread} ({len(counts)})"


def _images(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} images"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distribution", description=__doc__)
    parser.add_argument("--students", type=int, default=60, help="seeds of each kind of student (default: %(default)s)")
    parser.add_argument("--teachers", type=int, default=5, help="seeds of the teacher (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=reference.EPOCHS, help="default: %(default)s, the notebook's")
    parser.add_argument(
        "--out", default="results/distribution", help="OUT.json and OUT.md are written (default: %(default)s)"
    )
    options = parser.parse_args()
    for name in ("students", "teachers", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: it must be at least 1")
    return options


if __name__ == "__main__":
    main()
