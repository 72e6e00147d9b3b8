"""Google's file-type classifier, smaller: `python examples/magika_smaller.py --magika magika-1.0.3….whl`.

magika 1.0.3 tells 214 types of files from 2,048 bytes with 784,214 parameters. Here it is rebuilt from its ONNX file as
an NNX module, and teaches students with a quarter and about a sixteenth of its parameters on the files of this
computer, and on pieces of them, without a single label. The larger student begins as the teacher itself, whose two
largest matrices are factorised to low ranks, and is taught in three ways; the smaller one begins at random. Printed is
how often each agrees with magika, and with its own command, on files of other folders, and what each costs in
onnxruntime on one thread.

It downloads nothing: install magika==1.0.3, or name its wheel or an unpacked folder (`pip download --no-deps
magika==1.0.3`). How long it takes grows with `--files`, `--epochs` and `--seeds`: the kept result took an hour and a
half on two CPU cores. `--quick` takes two minutes, and only shows that it runs.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
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
from kd_jax.data.batch import check_whole
from kd_jax.errors import TOLD
from kd_jax.evaluate import calibration_error
from kd_jax.export.latency import in_onnxruntime, interleaved

BYTES, PADDING, SURE = 1024, 256, 0.9
MODEL = "models/standard_v3_3"
# Of the student that begins as the teacher, the ranks of the convolution and of the head.
FACTORISED = {"a quarter": (64, 80)}
# Of the one that begins at random, its width and channels.
AT_RANDOM = {"a sixteenth": (16, 84)}
# The key, in a run, of its agreement with the teacher by type, where that is sure.
TYPES = "by type, where sure"
TEMPERATURE, RATE, RATE_AT_RANDOM, BATCH_SIZE = 2.0, 3e-3, 5e-3, 64
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
        return self.head(self.norm(nnx.gelu(self.conv(self.places(tokens))).max(1)))

    def table(self) -> jax.Array:
        """The vector of each byte: GELU of 257, and not of all 2,048."""
        return nnx.gelu(self.embed.embedding[...] + self.bias[...][None])

    def places(self, tokens: jax.Array) -> jax.Array:
        """What the convolution sees, `[batch, 512, 4 width]`."""
        return normalised(tokens, self.table(), self.scale[...], self.shift[...], self.epsilon)


def normalised(tokens: jax.Array, table: jax.Array, scale: jax.Array, shift: jax.Array, epsilon: float) -> jax.Array:
    """Four bytes to a place, of mean 0 and variance 1 over the places, scaled and shifted."""
    x = table[tokens].reshape(-1, 512, 4 * table.shape[1])
    mean = x.mean(1, keepdims=True)
    spread = ((x - mean) ** 2).mean(1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(spread + epsilon) * scale[None] + shift[None]


class Fixed(nnx.Variable):
    """An array that is not trained."""


class Factorised(nnx.Module):
    """The teacher's network with low ranks: the convolution and the head are each two matrices, one after the other.

    ranks: of the convolution and of the head. The vectors of the bytes are the teacher's, and are not trained.
    """

    def __init__(self, ranks: tuple[int, int], *, width: int = 64, channels: int = 512, rngs: nnx.Rngs):
        self.table = Fixed(jnp.zeros((257, width)))
        self.scale, self.shift = Fixed(jnp.ones((512, 1))), Fixed(jnp.zeros((512, 1)))
        self.narrow = nnx.Conv(4 * width, ranks[0], (5,), padding="VALID", use_bias=False, rngs=rngs)
        self.conv = nnx.Linear(ranks[0], channels, rngs=rngs)
        self.norm = nnx.LayerNorm(channels, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.small = nnx.Linear(channels, ranks[1], use_bias=False, rngs=rngs)
        self.head = nnx.Linear(ranks[1], 214, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits, of the GELU of the largest; the teacher takes the largest GELU, which is the same above 0."""
        x = self.narrow(normalised(tokens, self.table[...], self.scale[...], self.shift[...], 1e-6))
        x = largest(x, self.conv.kernel[...]) + self.conv.bias[...][None]
        return self.head(self.small(self.norm(nnx.gelu(x))))


@jax.custom_vjp
def largest(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The largest of all places of `x @ kernel`, `[batch, channels]`, of x `[batch, places, rank]`.

    A gradient goes through one place of 508. It is found first, so that the gradient is computed of that place alone.
    """
    return jnp.einsum("bpr,rc->bcp", x, kernel).max(-1)


def _at(x: jax.Array, kernel: jax.Array, place: jax.Array) -> jax.Array:
    return jnp.einsum("bcr,rc->bc", jnp.take_along_axis(x, place[..., None], 1), kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    place = jnp.einsum("bpr,rc->bcp", x, kernel).argmax(-1)
    return _at(x, kernel, place), (x, kernel, place)


def _backward(kept: Any, given: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, place = kept
    return jax.vjp(lambda x, kernel: _at(x, kernel, place), x, kernel)[1](given)


largest.defvjp(_forward, _backward)


def factorised(teacher: ByteCNN, ranks: tuple[int, int], tokens: np.ndarray) -> Factorised:
    """The teacher with low ranks.

    Each matrix is the nearest of its rank, in squares, for what the teacher gives it of these files.
    """
    student = Factorised(ranks, rngs=nnx.Rngs(0))
    of_places, of_norm = np.zeros((1280, 1280)), np.zeros((512, 512))
    for start in range(0, len(tokens), 64):
        x = teacher.places(jnp.asarray(tokens[start : start + 64]))
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(x, np.float64), 5, axis=1)[:, ::4]
        windows = windows.swapaxes(2, 3).reshape(-1, 1280)
        seen = np.asarray(teacher.norm(nnx.gelu(teacher.conv(x)).max(1)), np.float64)
        of_places += windows.T @ windows
        of_norm += seen.T @ seen
    student.table[...], student.scale[...] = teacher.table(), teacher.scale[...]
    student.shift[...] = teacher.shift[...]
    first, second = low_rank(np.asarray(teacher.conv.kernel[...]).reshape(1280, -1), of_places, ranks[0])
    student.narrow.kernel[...] = jnp.asarray(first.reshape(5, 256, -1), jnp.float32)
    student.conv.kernel[...], student.conv.bias[...] = jnp.asarray(second, jnp.float32), teacher.conv.bias[...]
    student.norm.scale[...], student.norm.bias[...] = teacher.norm.scale[...], teacher.norm.bias[...]
    first, second = low_rank(np.asarray(teacher.head.kernel[...]), of_norm, ranks[1])
    student.small.kernel[...] = jnp.asarray(first, jnp.float32)
    student.head.kernel[...], student.head.bias[...] = jnp.asarray(second, jnp.float32), teacher.head.bias[...]
    return student


def low_rank(matrix: np.ndarray, moments: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices whose product changes `x @ matrix` least, in squares, for x of these second moments."""
    values, vectors = np.linalg.eigh(moments)
    # It is divided by: directions that no input has get a small size.
    root = np.sqrt(np.maximum(values, 1e-9 * values.max()))
    left, size, right = np.linalg.svd((vectors * root) @ vectors.T @ matrix, full_matrices=False)
    left, size, right = left[:, :rank], np.sqrt(size[:rank]), right[:rank]
    return (vectors / root) @ vectors.T @ left * size, size[:, None] * right


def rebuilt(path: Path) -> ByteCNN:
    """The teacher, with the weights of the ONNX file."""
    try:
        import onnx
    except ImportError:
        sys.exit("onnx is not installed: pip install 'kd-jax[onnx]'")
    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer}

    def array(end: str) -> Any:
        found = [value for name, value in arrays.items() if name.endswith(end)]
        if len(found) != 1:
            sys.exit(f"{path} has {len(found)} arrays {end}, and magika 1.0.3 has one: name a wheel of that version")
        return jnp.asarray(found[0])

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
            first = file.read(4096)
            file.seek(max(0, size - 4096))
            return seen_of(first, file.read(4096))
    except OSError:
        return None


def seen_of(first: bytes, last: bytes) -> np.ndarray | None:
    """Tokens of the first and the last 4,096 bytes."""
    first, last = first.lstrip()[:BYTES], last.rstrip()[-BYTES:]
    if len(first) < 8:
        return None
    seen = np.full(2 * BYTES, PADDING, np.int32)
    seen[: len(first)] = list(first)
    seen[2 * BYTES - len(last) :] = list(last)
    return seen


def pieces(paths: Any, each: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of pieces of files: what begins and ends within one, or a file that was cut off."""
    found = []
    for path in np.repeat(paths, each):
        try:
            data = Path(path).read_bytes()
        except OSError:
            continue
        size = len(data)
        if size > 4 * BYTES and rng.random() < 0.5:
            start = int(rng.integers(0, size - BYTES))
            data = data[start : int(rng.integers(start + BYTES, size + 1))]
        else:
            data = data[: int(rng.integers(1, size + 2))]
        if (seen := seen_of(data[:4096], data[-4096:])) is not None:
            found.append(seen)
    return np.stack(found) if found else np.zeros((0, 2 * BYTES), np.int32)


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


def chosen(roots: Any, count: int, out: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Paths and tokens of files; where `out` has those of an earlier call, these."""
    kept = None if out is None else out / "files.npz"
    if kept is not None and kept.is_file():
        with np.load(kept) as before:
            return before["paths"], before["tokens"].astype(np.int32)
    paths, inputs = read(files(roots, 3 * count, np.random.default_rng(0)))
    names = np.array([str(path) for path in paths])
    save(kept, paths=names, tokens=inputs.astype(np.uint16))
    return names, inputs


def save(file: Path | None, **arrays: np.ndarray) -> None:
    """Arrays in a file, which is there as a whole or not at all."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file.with_name("new.npz"), **arrays)  # type: ignore[arg-type]
        file.with_name("new.npz").replace(file)


def plot(models: dict[str, dict[str, Any]], file: Path) -> None:
    """How often a student agrees with the teacher where that is sure, by what a file costs, each seed a point."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for place, (label, of) in enumerate(models.items()):
        shares = [100 * one["where sure, other folders"] for one in of["runs"]]
        axes.plot([1e6 * of["seconds"]["median"]] * len(shares), shares, "o", color=f"C{place}", label=label, alpha=0.7)
    axes.set_xscale("log")
    axes.set(xlabel="µs a file, onnxruntime, one thread", ylabel="agreement where the\nteacher is sure, %")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(count: int = 5000, **how: Any) -> dict[str, Any]:
    """Trains on `count` files of this computer, and prints a table of others. how: as `trained_on` takes it."""
    with tempfile.TemporaryDirectory() as beside:
        return trained_on(count, Path(beside), **how)


def trained_on(
    count: int, beside: Path, *, where: str | None = None, roots: Any = ROOTS, epochs: int = 8, seeds: int = 1,
    each: int = 1, students: Any = FACTORISED, small: Any = AT_RANDOM, out: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What was found on each model.

    A seed is the order of the examples and, of the student that begins at random, its first weights.
    """
    for name, number in {"files": count, "epochs": epochs, "seeds": seeds, "pieces": each}.items():
        check_whole(number, name)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    rng = np.random.default_rng(1)
    folder = beside if out is None else Path(out)
    home = package(where, beside)
    labels = np.array(json.loads((home / MODEL / "config.min.json").read_text())["target_labels_space"])
    teacher = rebuilt(home / MODEL / "model.onnx")
    original = kd.from_onnx(home / MODEL / "model.onnx", probabilities=True)

    def asked(model: Any, inputs: np.ndarray, name: str, **more: Any) -> Any:
        """Its outputs, in memory; with a folder those that an earlier call has left there."""
        place = None if out is None else folder / name
        kept = kd.cached(model, inputs, batch_size=64, path=place, **more)
        return kept if place is None else kept.in_memory()

    paths, inputs = chosen(roots, count, None if out is None else folder)
    sample = inputs[:256]
    mine = np.asarray(jax.nn.softmax(kd.predict(teacher, sample, batch_size=64)))
    differences = np.abs(mine - np.exp(kd.predict(original, sample, batch_size=64))).max(-1)
    error = {"median": float(np.median(differences)), "largest": float(differences.max())}
    print(
        f"the rebuilt teacher's probabilities differ from onnxruntime's by {error['median']:.1e} in the median of "
        f"{len(sample)} files, and by {error['largest']:.1e} at most"
    )
    logits = np.asarray(asked(teacher, inputs, "answers").output.logits)
    answers, sure = logits.argmax(-1), np.asarray(jax.nn.softmax(logits)).max(-1) > SURE

    # A folder is for training or for the test; and some types no student sees.
    of_test = held_out([str(Path(path).parent) for path in paths], rng)
    often = [kind for kind in np.unique(answers) if (answers == kind).sum() >= 10]
    unseen = set(rng.permutation(often)[: len(often) // 15])
    hidden = np.isin(answers, list(unseen))
    train = np.flatnonzero(~of_test & ~hidden)
    train = train[balanced(answers[train], count, rng)]
    test, other = np.flatnonzero(of_test & ~hidden), np.flatnonzero(hidden)
    if not len(train) or not len(test):
        sys.exit(f"{len(train)} files are left to learn from and {len(test)} for the test: name more with --roots")
    cut = None if out is None else folder / "pieces.npz"
    if cut is not None and cut.is_file():
        with np.load(cut) as before:
            parts = before["tokens"].astype(np.int32)
            # Of an earlier version it has neither.
            alike = {"each", "paths"} <= {*before.files} and before["each"] == each
            if not alike or before["paths"].tolist() != paths[train].tolist():
                sys.exit(f"{cut} has pieces of other files, or more or fewer of each: give another folder")
    else:
        parts = pieces(paths[train], each, rng)
        save(cut, tokens=parts.astype(np.uint16), paths=paths[train], each=np.array(each))
    print(
        f"{len(train)} files and {len(parts)} pieces of them to learn from, of {len(np.unique(answers[train]))} types; "
        f"{len(test)} in other folders; {len(other)} of types that no student sees "
        f"({', '.join(labels[sorted(unseen)]) or 'none'})"
    )
    batch_size = min(BATCH_SIZE, len(train) + len(parts))
    settings = {
        "files": {"train": len(train), "test": len(test), "unseen types": len(other)}, "pieces": len(parts),
        "pieces of each": each, "epochs": epochs, "batch size": batch_size, "temperature": TEMPERATURE,
        "learning rates": {"as the teacher": RATE, "at random": RATE_AT_RANDOM},
        "types": len(np.unique(answers[train])), "unseen": labels[sorted(unseen)].tolist(),
        "ranks": {name: list(ranks) for name, ranks in students.items()},
        "sizes at random": {name: list(sizes) for name, sizes in small.items()},
    }  # fmt: skip
    found: dict[str, Any] = {"settings": settings, "seconds": 0.0, "command": None, "runs": {}}
    file = None if out is None else folder / "results.json"
    if file is not None and file.is_file():
        found = json.loads(file.read_text())
        if found["settings"] != settings:
            sys.exit(f"{file} is of {found['settings']}, and not of {settings}: give another folder")
    command = shutil.which("magika") or next(map(str, home.parent.glob("magika-*.data/scripts/magika")), None)
    if command and not os.access(command, os.X_OK):
        os.chmod(command, 0o755)
    # Of trainings that an earlier call has measured nothing is left to hold against it.
    if found["command"] is None and command and not any(name != "teacher" for name in found["runs"]):
        found["command"] = of_command(command, [Path(paths[row]) for row in test]).tolist()

    soft = kd.KD(alpha=0.0, temperature=TEMPERATURE)
    methods = {
        "KD": soft, "KD and FitNet": soft + kd.FitNet("norm", "norm"), "hard answers alone": kd.CrossEntropy(),
    }  # fmt: skip
    trainings = [*((size, name) for size in students for name in methods), *((size, "KD") for size in small)]
    begun_as = {size: factorised(teacher, ranks, inputs[train[:1024]]) for size, ranks in students.items()}

    def student_of(size: str, seed: int) -> nnx.Module:
        return ByteCNN(*small[size], rngs=nnx.Rngs(seed)) if size in small else nnx.clone(begun_as[size])

    # Its outputs for all of them, once.
    learned = np.concatenate([inputs[train], parts])
    taught = asked(teacher, learned, "taught", features=("norm",))
    data = kd.Batch(learned, np.asarray(taught.output.logits).argmax(-1).astype(np.int32))
    steps = epochs * (len(learned) // batch_size)
    held = {"other folders": test, "unseen types": other}

    by_type = {labels[kind]: sure[test] & (answers[test] == kind) for kind in np.unique(answers[test][sure[test]])}

    def measures(given: dict[str, np.ndarray]) -> dict[str, Any]:
        """Against the teacher, of logits of the files that were held out."""
        found_of: dict[str, float] = {}
        for name, rows in held.items():
            if not len(rows):
                continue
            own = given[name].argmax(-1) == answers[rows]
            found_of[f"agreement, {name}"] = own.mean()
            found_of[f"where sure, {name}"] = own[sure[rows]].mean() if sure[rows].any() else np.nan
        tested = given["other folders"]
        batch = jnp.asarray(tested), jnp.asarray(answers[test].astype(np.int32))
        found_of["KL"] = float(kd.losses.kl_divergence(batch[0], jnp.asarray(logits[test])).mean())
        found_of["calibration"] = float(calibration_error(*batch))
        if found["command"] is not None:
            found_of["agrees with the command"] = (labels[tested.argmax(-1)] == found["command"]).mean()
        types = {name: float((tested.argmax(-1) == answers[test])[rows].mean()) for name, rows in by_type.items()}
        found_of["mean over types, where sure"] = float(np.mean(list(types.values()))) if types else np.nan
        return {name: float(value) for name, value in found_of.items()} | {TYPES: types}

    runs = found["runs"]
    runs["teacher"] = [measures({name: logits[rows] for name, rows in held.items()})]
    onnx_files = {"teacher": home / MODEL / "model.onnx"}
    parameters = {"teacher": kd.models.count_parameters(kd.models.as_model(teacher))}
    for size, name in trainings:
        label = f"{size}, {name}"
        onnx_files[label] = folder / f"{'-'.join(re.findall('[a-z]+', label.lower()))}.onnx"
        arrays = jax.tree.leaves(nnx.state(student_of(size, 0)))
        parameters[label] = sum(array.size for array in arrays)
    for seed in range(seeds):
        for size, name in trainings:
            label = f"{size}, {name}"
            if len(runs.setdefault(label, [])) > seed and (seed or onnx_files[label].is_file()):
                continue
            peak = RATE_AT_RANDOM if size in small else RATE
            rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 20), steps + 1)
            trained = kd.distill(
                student_of(size, seed), None if name == "hard answers alone" else taught, data,
                method=methods[name], optimizer=optax.adamw(rate), epochs=epochs, batch_size=batch_size, key=seed,
            ).student  # fmt: skip
            said = {held_as: np.asarray(kd.predict(trained, inputs[rows], batch_size=64))
                    for held_as, rows in held.items() if len(rows)}  # fmt: skip
            runs[label][seed : seed + 1] = [measures(said)]
            agreement = runs[label][seed]["agreement, other folders"]
            print(f"{label}, seed {seed}: {agreement:.2%} agreement", flush=True)
            if file is not None:
                found["seconds"] += time.perf_counter() - begun
                begun = time.perf_counter()
                file.with_suffix(".new").write_text(json.dumps(found, indent=2) + "\n")
                file.with_suffix(".new").replace(file)
            # Last: where it fails, what was measured is kept.
            if not seed:
                kd.export.to_onnx(trained, onnx_files[label], inputs[:64], tolerance=1e-4)
    calls = {label: in_onnxruntime(onnx_file, inputs[:1]) for label, onnx_file in onnx_files.items()}
    seconds = interleaved(calls, rounds=30)
    models = {
        label: {
            "parameters": parameters[label], "bytes": onnx_files[label].stat().st_size,
            "seconds": seconds[label]._asdict(), "runs": runs[label][:seeds],
        } for label in onnx_files
    }  # fmt: skip
    measured = [name for name in runs["teacher"][0] if name != TYPES]
    table = [
        [label, f"{of['parameters']:,}", f"{of['bytes'] / 1000:,.0f}", f"{1e6 * of['seconds']['median']:,.0f}",
         *(shown([one.get(name, np.nan) for one in of["runs"]], 1 if name == "KL" else 100) for name in measured)]
        for label, of in models.items()
    ]  # fmt: skip
    names = [f"{name} {'(nats)' if name == 'KL' else '(%)'}" for name in measured]
    columns = ["", "parameters", "kB", "µs a file", *names]
    # A column for each model.
    lines = [list(line) for line in zip(columns, *table, strict=True)]
    print(tabulate(lines, headers="firstrow", disable_numparse=True))
    files_sure = {name: int(files_of.sum()) for name, files_of in by_type.items()}
    whole = settings | {
        "seeds": seeds, "seconds": found["seconds"], "error": error, "files where sure": files_sure, "models": models
    }  # fmt: skip
    if file is not None:
        text = tabulate(lines, headers="firstrow", tablefmt="github", disable_numparse=True)
        (folder / "results.md").write_text(text + "\n")
        rows = [[name, int(files_of.sum()), *(shown([one[TYPES][name] for one in runs[label][:seeds]], 100) for label in
                 onnx_files if label != "teacher")] for name, files_of in by_type.items()]  # fmt: skip
        headers = ["type", "files where it is sure", *(f"{label} (%)" for label in onnx_files if label != "teacher")]
        (folder / "types.md").write_text(tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n")
        (folder / "models.json").write_text(json.dumps(whole, indent=2) + "\n")
        plot(models, folder / "magika.png")
    return whole


def shown(values: list[float], by: float) -> str:
    """Mean and standard deviation."""
    of = by * np.array(values)
    return f"{of.mean():.2f}" + (f" ± {of.std(ddof=1):.2f}" if len(of) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--magika", metavar="PATH", help="its wheel, or a folder of it (default: the installed one)")
    parser.add_argument("--files", type=int, default=5000, metavar="N", help="files to learn from (default: 5000)")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="of each student (default: 8)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="of each student (default: 1)")
    parser.add_argument("--pieces", type=int, default=1, metavar="N", help="of each file, to learn from (default: 1)")
    parser.add_argument("--roots", nargs="+", default=list(ROOTS), metavar="DIR", help="where the files are")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for tables (results.md, types.md), plot, results.json, models.json and ONNX files. What is there "
        "already is not trained again. Its files.npz, pieces.npz, answers and taught hold what was read of this "
        "computer's files, and what the teacher says of it: a later call takes these, whatever --roots says",
    )
    parser.add_argument("--quick", action="store_true", help="few files and small students: to see that it runs")
    given = parser.parse_args()
    more: dict[str, Any] = {"each": given.pieces}
    more |= (
        {"epochs": 1, "students": {"a small one": (4, 4)}, "small": {"one at random": (4, 8)}}
        if given.quick
        else {"epochs": given.epochs}
    )
    try:
        main(
            128 if given.quick else given.files,
            where=given.magika,
            roots=given.roots,
            seeds=given.seeds,
            out=given.out,
            **more,
        )
    except TOLD as error:
        sys.exit(str(error))
