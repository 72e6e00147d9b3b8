"""A language model of bytes, of 4 layers, teaches one of 2 layers: `python examples/byte_language_model.py TEXT`.

TEXT is any file. The King James Bible, which is in the public domain, is in Debian's packages bible-kjv and
bible-kjv-text: `bible -f gen1:1-rev22:21 > bible.txt`. The table has the bits for each byte of the last tenth
of the text, which neither saw: fewer are better. They are the mean of −log2 of what a model gives to the next byte,
over the bytes of rows of 128 that each see their own row alone, but for the first of a row. "Less alone" is the mean
difference to the students without a teacher, seed by seed, and the 95 % interval of it by Student's t, corrected for
the number of differences: it is about other seeds of the students, with this one teacher and this text.

All of it is one training of the teacher and three of students for each seed, each of two epochs unless `--epochs` says
otherwise. What the teacher says of the text is kept in memory: 1 kB for each byte, 4 GB for the Bible. `--quick` takes
200,000 bytes, and has four small trainings. `--out DIR` writes the table there, and each training as it ends: the same
command goes on after those.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import optax
from flax import nnx
from tabulate import tabulate

import kd_jax as kd
from kd_jax.data.batch import check_whole
from kd_jax.errors import TOLD


def rows(text: bytes, length: int) -> kd.Batch:
    """A text as rows of `length` bytes, with the next byte as the label."""
    count = len(text) // length
    return kd.token_batch(np.frombuffer(text[: count * length], np.uint8).reshape(count, length).astype(np.int32))


def main(
    text: bytes,
    *,
    layers: tuple[int, int] = (4, 2),
    seeds: int = 3,
    epochs: int = 2,
    width: int = 128,
    length: int = 128,
    batch_size: int = 32,
    out: str | None = None,
) -> None:
    """Trains both on the text, and prints a table of the bits for each byte of its last tenth."""
    check_whole(seeds, "seeds")
    check_whole(epochs, "epochs")
    begun = time.perf_counter()
    end = len(text) * 9 // 10
    train, test = rows(text[:end], length), rows(text[end:], length)
    if len(train.labels) < batch_size or not len(test.labels):
        sys.exit(f"the text has {len(text):,} bytes: give at least {max(-(-10 * batch_size // 9), 10) * length:,}")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)

    def model(count: int) -> kd.Model:
        return kd.from_nnx(lambda rngs: kd.models.transformer(layers=count, width=width, rngs=rngs))

    def bits(trained: nnx.Module) -> float:
        return kd.evaluate(trained, test, batch_size=batch_size)["nll"] / float(np.log(2))

    steps = epochs * (len(train.labels) // batch_size)
    student = model(layers[1])
    how = dict(optimizer=optax.adamw(optax.cosine_decay_schedule(2e-3, steps)), epochs=epochs, batch_size=batch_size)
    methods = {"alone": kd.CrossEntropy(), "KD": kd.KD(alpha=0.5, temperature=1.0), "JSD": kd.JSD(alpha=0.5)}
    settings = {
        "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(), "layers": list(layers), "width": width,
        "length": length, "epochs": epochs, "batch_size": batch_size,
    }  # fmt: skip
    kept, seconds = {"teacher": [], **{name: [] for name in methods}}, 0.0
    folder = None if out is None else Path(out)
    if folder is not None and (folder / "results.json").is_file():
        before = json.loads((folder / "results.json").read_text())
        if before["settings"] != settings:
            raise SystemExit(f"{folder} is of {before['settings']}, and not of {settings}: give another folder")
        kept, seconds = before["bits_per_byte"], before["seconds"]

    def keep(name: str, trained: nnx.Module) -> None:
        """Measures a trained model, and keeps what was found so far."""
        kept[name].append(bits(trained))
        if folder is not None:
            result = {"settings": settings, "seconds": seconds + time.perf_counter() - begun, "bits_per_byte": kept}
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "results.new").write_text(json.dumps(result, indent=2) + "\n")
            (folder / "results.new").replace(folder / "results.json")

    if kept["teacher"]:
        teacher = kd.models.from_hugging_face(folder / "teacher")
    else:
        teacher = kd.distill(model(layers[0]), None, train, key=100, **how).student
        if folder is not None:
            kd.models.to_hugging_face(teacher, folder / "teacher")
        keep("teacher", teacher)
    answers = None
    for seed in range(seeds):
        for name, method in methods.items():
            if len(kept[name]) > seed:
                continue
            if name != "alone" and answers is None:
                answers = kd.cached(teacher, train, batch_size=batch_size)
            taught_by = None if name == "alone" else answers
            keep(name, kd.distill(student, taught_by, train, method=method, key=seed, **how).student)
    found = {name: np.array(kept[name][:seeds]) for name in methods}
    of_teacher = kept["teacher"][0]
    lines = [["teacher", f"{of_teacher:.4f}", "", ""]]
    for name, values in found.items():
        sd = f"{values.std(ddof=1):.4f}" if seeds > 1 else ""
        pair = kd.paired_comparison(found["alone"], values, metric="bits per byte", comparisons=len(methods) - 1)
        less = "" if name == "alone" else f"{pair.mean_difference:+.4f}"
        if less and pair.ci95 is not None:
            less += f" ({pair.ci95[0]:+.4f} to {pair.ci95[1]:+.4f})"
        lines.append([name, f"{values.mean():.4f}", sd, less])
    table = tabulate(lines, ["", "bits per byte", "sd", "less alone"], tablefmt="github", disable_numparse=True)
    counts = f"{epochs} epoch{'s' if epochs > 1 else ''}, {seeds} seed{'s' if seeds > 1 else ''}"
    print(f"{len(train.labels):,} rows of {length} bytes, {counts}\n\n{table}")
    prompt = np.frombuffer(b"And the ", np.uint8).astype(np.int32)[None]
    written = kd.generate(teacher, prompt, steps=80, temperature=0.7)
    print(f"\nThe teacher writes: {bytes(np.asarray(written.tokens[0], np.uint8)).decode(errors='replace')!r}")
    if folder is not None:
        (folder / "results.md").write_text(table + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a file of text")
    parser.add_argument("--quick", action="store_true", help="200,000 bytes, one seed, small models")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", help="a folder for the table")
    given = parser.parse_args()
    try:
        whole = given.text.read_bytes()
        if given.quick:
            main(whole[:200_000], seeds=1, epochs=1, width=64, length=64, out=given.out)
        else:
            main(whole, seeds=given.seeds, epochs=given.epochs, out=given.out)
    except TOLD as error:
        sys.exit(str(error))
