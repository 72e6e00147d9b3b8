"""What a cache of a teacher costs and what it changes: bytes a token, bias and standard deviation of the gradient.

The teacher is a small model of words, trained here on the sources of Python's standard library, which are wherever this
runs; its student is smaller. Of the student's gradient by its parameters, the mean over held-out tokens, each kind of
cache gives another one: its relative bias is ||mean - full|| / ||full||, of caches with draws over many of them, less
what the draws' variance adds to it; its relative standard deviation is sqrt(mean ||one - mean||^2) / ||full||.
"""

import argparse
import json
import re
import shlex
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from tabulate import tabulate

import kd_jax as kd
from benchmarks import report
from kd_jax.teacher import CachedTeacher

_LENGTH = 32
Tokens = Int[np.ndarray, "rows positions"]

_KL = kd.KD(alpha=0, temperature=1.0)
# By name: what is kept, and the method that is trained by it.
KINDS: dict[str, tuple[dict[str, Any], kd.Method]] = {
    "logits, float32": ({}, _KL),
    "logits, bfloat16": ({"dtype": jnp.bfloat16}, _KL),
    "hidden, bfloat16": ({"keep": "hidden", "dtype": jnp.bfloat16}, _KL),
    **{
        f"top-{k}, {rest}": (
            {"keep": "top-k", "k": k, "rest": rest, "dtype": jnp.float16},
            kd.TopKKL(alpha=0, k=k) if rest == "tail" else _KL,
        )
        for k in (12, 64)
        for rest in ("renormalised", "uniform", "tail")
    },
    **{f"{n} draws": ({"keep": "samples", "draws": n}, kd.SampledKL(samples=n)) for n in (12, 50)},
    "50 draws, power 0.8": (
        {"keep": "samples", "draws": 50, "power": 0.8}, kd.SampledKL(samples=50, power=0.8)
    ),
    "50 draws, systematic": ({"keep": "samples", "draws": 50, "systematic": True}, kd.SampledKL(samples=50)),
}  # fmt: skip


def words(vocabulary: int, most: int) -> Int[np.ndarray, " words"]:
    """The words and signs of Python's standard library by their rank; 0 for those beyond the vocabulary."""
    text: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += re.findall(r"\w+|[^\w\s]", path.read_text(encoding="utf-8", errors="ignore"))
        if len(text) >= most:
            break
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(text).most_common(vocabulary - 1), start=1)}
    return np.asarray([ranks.get(word, 0) for word in text[:most]], np.int32)


def rows_of(text: Int[np.ndarray, " words"]) -> Tokens:
    """Rows of `_LENGTH` and one more, whose last is only predicted."""
    count = (len(text) - 1) // _LENGTH
    return np.stack([text[i * _LENGTH : (i + 1) * _LENGTH + 1] for i in range(count)])


def apply(params: Any, tokens: Int[Array, "rows positions"]) -> kd.Output:
    """The next word from the last two."""
    before = jnp.pad(tokens, [(0, 0), (1, 0)])[:, :-1]
    hidden = jnp.tanh(params["last"][tokens] + params["before"][before])
    bias = params["bias"].reshape(1, 1, -1)
    return kd.Output(hidden @ params["head"] + bias, {"hidden": hidden})


def trained(rows: Tokens, vocabulary: int, width: int, steps: int, seed: int) -> tuple[kd.Model, float]:
    """A model of words after some steps, and its cross entropy in the last tenth of them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "last": jax.random.normal(keys[0], (vocabulary, width)),
        "before": jax.random.normal(keys[1], (vocabulary, width)),
        "head": jax.random.normal(keys[2], (width, vocabulary)) / width**0.5,
        "bias": jnp.zeros(vocabulary),
    }
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(params: Any, state: Any, tokens: Array) -> Any:
        def loss(params: Any) -> Array:
            return jnp.mean(kd.losses.cross_entropy(apply(params, tokens[:, :-1]).logits, tokens[:, 1:]))

        value, slope = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(slope, state, params)
        return optax.apply_updates(params, updates), state, value

    state, rng, values = optimizer.init(params), np.random.default_rng(seed), []
    for _ in range(steps):
        params, state, value = step(params, state, rows[rng.choice(len(rows), 16, replace=False)])
        values.append(float(value))
    return kd.from_function(apply, params), float(np.mean(values[-max(1, steps // 10) :]))


def gradients(student: kd.Model, tokens: Tokens) -> Any:
    """A compiled function (teacher of these rows, method) -> the student's gradient, and the loss."""

    @jax.jit
    def one(
        variables: Any, tokens: Array, known: kd.Teacher, method: Any
    ) -> tuple[Float[Array, " parameters"], Float[Array, ""]]:
        def loss(params: Any) -> Array:
            ours, (theirs,) = apply(params, tokens), known.outputs(tokens)
            parts = method.init(jax.random.key(0), ours, theirs)
            return jnp.mean(method.loss(parts, ours, theirs, kd.Batch(tokens), jnp.int32(0))["soft"])

        value, slope = jax.value_and_grad(loss)(variables)
        return ravel_pytree(slope)[0], value

    return partial(one, student.variables, jnp.asarray(tokens))


def measure(teacher: kd.Model, student: kd.Model, tokens: Tokens, caches: int) -> dict[str, dict[str, float]]:
    """By kind: bytes a token, relative bias and standard deviation, and what a bias of 0 would be measured as."""
    rows = np.arange(len(tokens))
    one = gradients(student, tokens)
    whole = partial(kd.cached, teacher, tokens, batch_size=16)
    full = np.asarray(one(kd.cached(np.asarray(teacher(tokens))), _KL)[0], np.float64)
    size, found = float(np.linalg.norm(full)), {}
    for name, (how, method) in KINDS.items():
        if how.get("keep") == "hidden":
            how = how | {"hidden": "hidden", "head": (teacher.variables["head"], teacher.variables["bias"])}
        draws = how.get("keep") == "samples"
        total, squares, count, nbytes = np.zeros_like(full), 0.0, caches if draws else 1, 0
        for number in range(count):
            with tempfile.TemporaryDirectory() as folder:
                known = whole(path=Path(folder) / "cache", key=number, **how) if number == 0 else None
                nbytes = known.nbytes if known else nbytes
                taught = known.take(rows) if known else whole(key=number, **how)
                if draws:
                    # The number of distinct draws is a shape.
                    short = how["draws"] - taught.classes_of.shape[-1]
                    taught = jax.tree.map(lambda leaf, n=short: jnp.pad(leaf, [(0, 0), (0, 0), (0, n)]), taught)
                elif method is _KL:
                    # All of them are one program.
                    taught = CachedTeacher(kd.Output(taught.outputs(tokens)[0].logits))
                gradient = np.asarray(one(taught, method)[0], np.float64)
            total += gradient
            squares += float(gradient @ gradient)
        mean = total / count
        variance = (squares / count - float(mean @ mean)) * count / max(1, count - 1)
        bias = float((mean - full) @ (mean - full)) - variance / count
        found[name] = {
            "bytes a token": nbytes / tokens.size, "bias": float(np.sqrt(max(bias, 0.0))) / size,
            "standard deviation": float(np.sqrt(max(variance, 0.0))) / size,
            "noise of the bias": float(np.sqrt(max(variance, 0.0) / count)) / size,
        }  # fmt: skip
    return found


def _bias(bias: float, noise: float) -> str:
    """What is no more than noise is not told as a bias."""
    return f"{bias:.4f}" if bias > 2 * noise else f"0 (noise {noise:.4f})"


def main(argv: list[str] | None = None) -> None:
    """Measures, prints a table, and leaves it with what it depends on."""
    parser = argparse.ArgumentParser(prog="benchmarks.caches", description=__doc__)
    for name, default in (("vocabulary", 4096), ("steps", 400), ("tokens", 1024), ("caches", 30), ("words", 300_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("results/caches"))
    given = parser.parse_args(argv)
    started = time.time()
    rows = rows_of(words(given.vocabulary, given.words))
    held = max(1, given.tokens // _LENGTH)
    # What is held out lies between what is trained on, as the files are of many kinds.
    held_out = np.zeros(len(rows), bool)
    held_out[np.linspace(0, len(rows) - 1, held).astype(int)] = True
    teacher, of_teacher = trained(rows[~held_out], given.vocabulary, 64, given.steps, 0)
    student, of_student = trained(rows[~held_out], given.vocabulary, 16, given.steps // 4, 1)
    tokens = rows[held_out][:, :-1]
    found = measure(teacher, student, tokens, given.caches)
    facts = {
        "words": int(rows.size), "vocabulary": given.vocabulary, "tokens": int(tokens.size), "caches": given.caches,
        "cross entropy of the teacher": of_teacher, "cross entropy of the student": of_student,
    }  # fmt: skip
    command = f"python -m benchmarks.caches {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()
    environment = report.environment()
    cells = [
        [
            name, f"{one['bytes a token']:.1f}", _bias(one["bias"], one["noise of the bias"]),
            f"{one['standard deviation']:.3f}" if one["standard deviation"] else "",
        ]
        for name, one in found.items()
    ]  # fmt: skip
    table = tabulate(
        cells, ["kept", "bytes a token", "bias", "standard deviation"], "pipe",
        colalign=("left", "right", "right", "right"), disable_numparse=True,
    )  # fmt: skip
    print(table)
    listed = "\n".join(f"- {name}: {value}" for name, value in (facts | environment).items())
    given.out.mkdir(parents=True, exist_ok=True)
    words_of = " ".join(str(__doc__).split())
    (given.out / "README.md").write_text(
        f"# Caches of a teacher\n\n`{command}` ({time.time() - started:.0f} s)\n\n{words_of}\n\n"
        f"{table}\n\n## The data and the machine\n\n{listed}\n"
    )
    kept = {"command": command, "facts": facts, "environment": environment, "kinds": found}
    (given.out / "caches.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
