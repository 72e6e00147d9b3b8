"""Google's file-type classifier, smaller: `python examples/magika_smaller.py --magika magika-1.0.3….whl`.

magika 1.0.3 tells 214 types of files from 2,048 bytes with 784,519 parameters. Here it is rebuilt from its ONNX file as
an NNX module, and teaches students with a quarter and a sixteenth of its parameters on the files of this computer,
without a single label. Printed is how often each agrees with it, and with its own command, on files of other folders,
and what each costs in onnxruntime on one thread.

It downloads nothing: install magika==1.0.3, or name its wheel or an unpacked folder (`pip download --no-deps
magika==1.0.3`). How long it takes grows with `--files`, `--epochs` and `--seeds`; `--quick` takes two minutes, and only
shows that it runs.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tabulate import tabulate

import kd_jax as kd
from kd_jax.evaluate import calibration_error
from kd_jax.export.latency import in_onnxruntime, interleaved

BYTES, PADDING, SURE = 1024, 256, 0.9
MODEL = "models/standard_v3_3"
STUDENTS = {"a quarter": (32, 216), "a sixteenth": (16, 84)}
ROOTS = ("/usr", "/etc", "/opt", sys.prefix)


class ByteCNN(nnx.Module):
    """magika's network: bytes to vectors of `width`, four to a place, one convolution, the largest of all places."""

    def __init__(
        self, width: int = 64, channels: int = 512, classes: int = 214, *, epsilon: float = 1e-3, rngs: nnx.Rngs
    ):  # fmt: skip
        # Where most bytes are alike, magika's own 1e-6 multiplies rounding by up to a thousand: onnxruntime's
        # probabilities of a very short file differ from those of float64 by 1e-3, and these by 1e-6.
        self.epsilon = epsilon
        self.embed = nnx.Embed(257, width, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(width))
        # Over the places, not over the channels.
        self.scale, self.shift = nnx.Param(jnp.ones((512, 1))), nnx.Param(jnp.zeros((512, 1)))
        self.conv = nnx.Conv(4 * width, channels, (5,), padding="VALID", rngs=rngs)
        self.norm = nnx.LayerNorm(channels, epsilon=epsilon, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits `[batch, classes]` of tokens `[batch, 2048]`, 256 where there is no byte."""
        # GELU of 257 vectors, and not of all 2,048.
        table = nnx.gelu(self.embed.embedding[...] + self.bias[...][None])
        x = table[tokens].reshape(-1, 512, 4 * table.shape[1])
        mean = x.mean(1, keepdims=True)
        spread = ((x - mean) ** 2).mean(1, keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(spread + self.epsilon) * self.scale[...][None] + self.shift[...][None]
        return self.head(self.norm(nnx.gelu(self.conv(x)).max(1)))


def rebuilt(path: Path) -> ByteCNN:
    """The teacher, with the weights of the ONNX file."""
    import onnx

    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer}

    def array(end: str) -> Any:
        (found,) = [value for name, value in arrays.items() if name.endswith(end)]
        return jnp.asarray(found)

    teacher = ByteCNN(epsilon=1e-6, rngs=nnx.Rngs(0))
    teacher.embed.embedding[...] = array("jax2tf_get_logits_/Const:0")
    teacher.bias[...] = array("Dense_0/Reshape:0").reshape(-1)
    teacher.scale[...] = array("LayerNorm_0/Reshape_2:0")[0]
    teacher.shift[...] = array("LayerNorm_0/Reshape_3:0")[0]
    teacher.conv.kernel[...] = array("Conv_0/transpose_3:0")[..., 0].transpose(2, 1, 0)
    teacher.conv.bias[...] = array("const_fold_opt__209").reshape(-1)
    teacher.norm.scale[...] = array("LayerNorm_1/Reshape_2:0")[0]
    teacher.norm.bias[...] = array("LayerNorm_1/Reshape_3:0")[0]
    teacher.head.kernel[...] = array("Const_24:0")
    teacher.head.bias[...] = array("Dense_1/Reshape:0")[0]
    return teacher


def package(where: str | None, folder: Path) -> Path:
    """The package's folder: the installed one, or that of a wheel, which is unpacked into `folder`."""
    if where is None:
        spec = importlib.util.find_spec("magika")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("magika is not installed: install magika==1.0.3, or name its wheel with --magika")
        found = Path(spec.submodule_search_locations[0])
    elif zipfile.is_zipfile(where):
        zipfile.ZipFile(where).extractall(folder)
        found = folder / "magika"
    else:
        found = Path(where) / "magika" if (Path(where) / "magika").is_dir() else Path(where)
    if not (found / MODEL / "model.onnx").is_file():
        sys.exit(f"{where or found} has no {MODEL}/model.onnx, as magika 1.0.3 has: name a wheel of that version")
    return found


def tokens(path: Path) -> np.ndarray | None:
    """What magika sees of a file: its first and last 1,024 bytes without space around. None of a short one."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(4096).lstrip()[:BYTES]
            file.seek(max(0, size - 4096))
            last = file.read(4096).rstrip()[-BYTES:]
    except OSError:
        return None
    if len(first) < 8:
        return None
    seen = np.full(2 * BYTES, PADDING, np.int32)
    seen[: len(first)] = list(first)
    seen[2 * BYTES - len(last) :] = list(last)
    return seen


def files(roots: Any, count: int, rng: np.random.Generator) -> list[Path]:
    """Some files of this computer, rare endings as often as common ones."""
    by_ending: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    for root in roots:
        for folder, folders, names in os.walk(Path(root).resolve()):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path not in seen and path.is_file() and not path.is_symlink():
                    seen.add(path)
                    by_ending.setdefault(path.suffix.lower()[:8], []).append(path)
    for paths in by_ending.values():
        rng.shuffle(paths)  # type: ignore[arg-type]
    every = max(map(len, by_ending.values()), default=0)
    turns = (paths[turn] for turn in range(every) for paths in by_ending.values() if turn < len(paths))
    return [path for path, _ in zip(turns, range(count), strict=False)]


def read(paths: list[Path]) -> tuple[list[Path], np.ndarray]:
    """The files that are long enough, and their tokens `[files, 2048]`: the first of those that look the same."""
    kept: dict[bytes, tuple[Path, np.ndarray]] = {}
    for path in paths:
        if (seen := tokens(path)) is not None:
            kept.setdefault(hashlib.sha256(seen.tobytes()).digest(), (path, seen))
    if not kept:
        sys.exit("there is no file of 8 bytes or more: name folders that have some with --roots")
    return [path for path, _ in kept.values()], np.stack([seen for _, seen in kept.values()])


def held_out(folders: list[str], rng: np.random.Generator) -> np.ndarray:
    """Which files are in a quarter of the folders."""
    every = sorted(set(folders))
    tested = set(rng.permutation(every)[: len(every) // 4])
    if not tested:
        sys.exit(f"the files are in {len(every)} folders, of which a quarter is for the test: name more with --roots")
    return np.array([one in tested for one in folders])


def balanced(answers: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows, no type more often than needed for `count` of them."""
    order = rng.permutation(len(answers))
    turn = np.zeros(len(answers), int)
    seen: dict[int, int] = {}
    for row in order:
        turn[row] = seen[answers[row]] = seen.get(answers[row], 0) + 1
    return order[np.argsort(turn[order], kind="stable")][:count]


def of_command(command: str | None, paths: list[Path]) -> np.ndarray:
    """The types that magika's own command answers."""
    if command is None:
        return np.full(len(paths), "")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    print(f"{command} is {version or 'of an unknown version'}")
    found: list[str] = []
    for start in range(0, len(paths), 500):
        part = [str(path) for path in paths[start : start + 500]]
        # Its status is 1 where it could not read one of the files.
        done = subprocess.run([command, "--json", *part], capture_output=True, text=True, check=False)
        try:
            said = {one["path"]: one["result"].get("value", {}).get("output", {}).get("label", "")
                    for one in json.loads(done.stdout)}  # fmt: skip
            found += [said[path] for path in part]
        except (ValueError, LookupError, TypeError, AttributeError):
            sys.exit(f"{command} gave no answer for each file (status {done.returncode}): install magika==1.0.3 again")
    return np.array(found)


def main(
    count: int = 5000, *, where: str | None = None, roots: Any = ROOTS, epochs: int = 8, seeds: int = 1,
    students: Any = None, out: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains on `count` files of this computer, and prints a table of others."""
    rng = np.random.default_rng(0)
    beside = tempfile.TemporaryDirectory()
    home = package(where, Path(beside.name))
    labels = np.array(json.loads((home / MODEL / "config.min.json").read_text())["target_labels_space"])
    teacher = rebuilt(home / MODEL / "model.onnx")
    original = kd.from_onnx(home / MODEL / "model.onnx", probabilities=True)

    paths, inputs = read(files(roots, 3 * count, rng))
    sample = inputs[:256]
    mine = np.asarray(jax.nn.softmax(kd.predict(teacher, sample, batch_size=64)))
    differences = np.abs(mine - np.exp(kd.predict(original, sample, batch_size=64))).max(-1)
    error = {"median": float(np.median(differences)), "largest": float(differences.max())}
    print(
        f"the rebuilt teacher's probabilities differ from onnxruntime's by {error['median']:.1e} in the median of "
        f"{len(sample)} files, and by {error['largest']:.1e} at most"
    )
    logits = np.asarray(kd.predict(teacher, inputs, batch_size=64))
    answers, sure = logits.argmax(-1), np.asarray(jax.nn.softmax(logits)).max(-1) > SURE

    # A folder is for training or for the test; and some types no student sees.
    of_test = held_out([str(path.parent) for path in paths], rng)
    often = [kind for kind in np.unique(answers) if (answers == kind).sum() >= 10]
    unseen = set(rng.permutation(often)[: len(often) // 15])
    hidden = np.isin(answers, list(unseen))
    train = np.flatnonzero(~of_test & ~hidden)
    train = train[balanced(answers[train], count, rng)]
    test, other = np.flatnonzero(of_test & ~hidden), np.flatnonzero(hidden)
    if not len(train) or not len(test):
        sys.exit(f"{len(train)} files are left to learn from and {len(test)} for the test: name more with --roots")
    print(
        f"{len(train)} files to learn from, of {len(np.unique(answers[train]))} types; {len(test)} in other folders; "
        f"{len(other)} of types that no student sees ({', '.join(labels[sorted(unseen)]) or 'none'})"
    )
    command = shutil.which("magika") or next(map(str, home.parent.glob("magika-*.data/scripts/magika")), None)
    if command and not os.access(command, os.X_OK):
        os.chmod(command, 0o755)
    commanded = of_command(command, [paths[row] for row in test])

    methods = {
        "KD": kd.KD(alpha=0.0, temperature=2.0),
        "hard answers alone": kd.CrossEntropy(),
        "KD and FitNet": kd.KD(alpha=0.0, temperature=2.0) + kd.FitNet("norm", "norm"),
    }
    students = STUDENTS if students is None else students
    smallest = list(students)[-1]
    runs = [(size, name) for size in students for name in methods if name == "KD" or size == smallest]
    # Its outputs for all of them, once.
    taught = kd.cached(teacher, inputs[train], features=("norm",), batch_size=64)
    data = kd.Batch(inputs[train], answers[train].astype(np.int32))
    steps = epochs * max(1, len(train) // min(64, len(train)))
    held = {"other folders": test, "unseen types": other}

    def measures(given: np.ndarray) -> dict[str, float]:
        """Against the teacher."""
        found: dict[str, float] = {}
        for name, rows in held.items():
            if not len(rows):
                continue
            own = given[rows].argmax(-1) == answers[rows]
            found[f"agreement, {name}"] = own.mean()
            found[f"where sure, {name}"] = own[sure[rows]].mean() if sure[rows].any() else np.nan
        batch = jnp.asarray(given[test]), jnp.asarray(answers[test].astype(np.int32))
        found["KL"] = float(kd.losses.kl_divergence(batch[0], jnp.asarray(logits[test])).mean())
        found["calibration"] = float(calibration_error(*batch))
        own = labels[given[test].argmax(-1)]
        found["agrees with the command"] = (own == commanded).mean() if command else np.nan
        kinds = [kind for kind in np.unique(answers[test]) if sure[test][answers[test] == kind].any()]
        by_kind = [(given[test].argmax(-1) == kind)[sure[test] & (answers[test] == kind)].mean() for kind in kinds]
        found["mean over types, where sure"] = float(np.mean(by_kind)) if kinds else np.nan
        return {name: float(value) for name, value in found.items()}

    rows: dict[str, list[dict[str, float]]] = {"teacher": [measures(logits)]}
    calls = {"teacher": in_onnxruntime(home / MODEL / "model.onnx", inputs[:1])}
    sizes = {"teacher": (784519, (home / MODEL / "model.onnx").stat().st_size)}
    for size, name in runs:
        label = f"{size}, {name}"
        for seed in range(seeds):
            student = ByteCNN(*students[size], rngs=nnx.Rngs(seed))
            rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, max(1, steps // 20), steps + 1)
            trained = kd.distill(
                student, None if name == "hard answers alone" else taught, data, method=methods[name],
                optimizer=optax.adamw(rate), epochs=epochs, batch_size=min(64, len(train)), key=seed,
            ).student  # fmt: skip
            given = np.asarray(kd.predict(trained, inputs, batch_size=64))
            rows.setdefault(label, []).append(measures(given))
            if label not in calls:
                file = kd.export.to_onnx(trained, Path(beside.name) / f"{len(calls)}.onnx", inputs[:64], tolerance=1e-4)
                calls[label] = in_onnxruntime(file, inputs[:1])
                parameters = kd.models.count_parameters(kd.models.as_model(trained))
                sizes[label] = (parameters, file.stat().st_size)
                if out and name == "KD":
                    Path(out).mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, Path(out) / f"{size.replace(' ', '-')}.onnx")
            print(
                f"{label}, seed {seed}: {100 * rows[label][-1]['agreement, other folders']:.2f} % agreement", flush=True
            )
    seconds = interleaved(calls, rounds=30)
    table = [
        [label, f"{sizes[label][0]:,}", f"{sizes[label][1] / 1000:,.0f}", f"{1e6 * seconds[label].median:,.0f}",
         *(f"{np.mean([one.get(name, np.nan) for one in every]) * (1 if name == 'KL' else 100):.2f}"
           for name in rows["teacher"][0])]
        for label, every in rows.items()
    ]  # fmt: skip
    names = [f"{name} {'(nats)' if name == 'KL' else '(%)'}" for name in rows["teacher"][0]]
    columns = ["", "parameters", "kB", "µs a file", *names]
    # A column for each model.
    print(
        tabulate([list(line) for line in zip(columns, *table, strict=True)], headers="firstrow", disable_numparse=True)
    )
    found = {
        "files": {"train": len(train), "test": len(test), "unseen types": len(other)}, "seeds": seeds, "epochs": epochs,
        "types": len(np.unique(answers[train])), "unseen": labels[sorted(unseen)].tolist(), "error": error,
        "models": {
            label: {
                "parameters": sizes[label][0], "bytes": sizes[label][1], "seconds": seconds[label]._asdict(),
                "runs": every,
            } for label, every in rows.items()
        },
    }  # fmt: skip
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    beside.cleanup()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--magika", metavar="PATH", help="its wheel, or a folder of it (default: the installed one)")
    parser.add_argument("--files", type=int, default=5000, metavar="N", help="files to learn from (default: 5000)")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="of each student (default: 8)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="of each student (default: 1)")
    parser.add_argument("--roots", nargs="+", default=list(ROOTS), metavar="DIR", help="where the files are")
    parser.add_argument("--out", metavar="DIR", help="folder for results.json and the students' ONNX files")
    parser.add_argument("--quick", action="store_true", help="few files and small students: to see that it runs")
    given = parser.parse_args()
    more = {"epochs": 1, "students": {"a small one": (4, 16)}} if given.quick else {"epochs": given.epochs}
    main(
        128 if given.quick else given.files,
        where=given.magika,
        roots=given.roots,
        seeds=given.seeds,
        out=given.out,
        **more,
    )
