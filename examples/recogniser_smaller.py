"""A recogniser with 18,710 outputs, and what to keep of its answers: `python examples/recogniser_smaller.py`.

The package rapidocr 3.10.0 has a network (5,267,734 parameters) that reads a line of text: at each of its positions it
gives probabilities of 18,709 characters and of none. All of them are too many to keep for a large data set. Here it
reads lines that this program renders and degrades, until it is not sure any more, and its answers are kept in
several ways: all of them, the k most probable ones (renormalised, or with all others as one class), and classes drawn
from it (RS-KD), at the same number of bytes a position. The table says which student, of a fifth of its parameters,
is closest to it on lines of other text: by KL, by the most probable class, and by the text that comes out.

It downloads nothing: name the package's wheel (`pip download --no-deps rapidocr==3.10.0`; nothing of it is run). It
needs onnxruntime. The text is Python's own documentation, or that of `--text FILE`. Nearly all of the time goes into
the students: a busy core trained on 23 lines a second with all logits, and on 60 with a part of them. `--quick` takes
a minute or two, and only shows that it runs. `--out DIR` keeps the table, and each training as it ends: the same
command goes on after those. The teacher's answers, 1.1 GB there, may be deleted at the end. Where there is one
processor, set NPROC=2: JAX waits for itself without it.
"""

import argparse
import bisect
import importlib.util
import itertools
import json
import random
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
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

MODEL, CLASSES, BLANK = "models/PP-OCRv6_rec_small.onnx", 18_710, 0
HEIGHT, WIDTH, STRIDE = 48, 160, 8
# Of 3e-3 and 6e-3 the one that learned the teacher's most probable classes better, on the lines that it learned from.
RATE = 6e-3
FONTS = "/usr/share/fonts"
MEASURES = {"KL": "KL to the teacher, nats", "agreement": "agreement", "CER": "character error rate"}
FULL, HARD = "all logits", "its most probable class"


class Recogniser(nnx.Module):
    """Three convolutions down to a row of positions, two along it, and a linear head of all the outputs."""

    def __init__(self, width: int = 48, *, rngs: nnx.Rngs):
        maps = [1, 24, 48, 96]
        self.convs = nnx.List(
            nnx.Conv(before, after, (3, 3), strides=2, use_bias=False, rngs=rngs)
            for before, after in itertools.pairwise(maps)
        )
        self.norms = nnx.List(nnx.BatchNorm(channels, momentum=0.9, rngs=rngs) for channels in maps[1:])
        self.column = nnx.Conv(HEIGHT // STRIDE * maps[-1], width, (3,), rngs=rngs)
        self.context = nnx.Conv(width, width, (5,), rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, lines: jax.Array) -> jax.Array:
        """Logits `[batch, positions, 18710]` of what the teacher sees: `[batch, 3, 48, width]`, equal channels."""
        x = lines[:, 0, :, :, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        x = x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)
        x = nnx.relu(self.column(x))
        return self.head(x + nnx.relu(self.context(x)))


def prepare(key: Any, inputs: jax.Array, train: bool) -> jax.Array:
    """Grey bytes as the teacher wants them: three equal channels from -1 to 1."""
    x = inputs.astype(jnp.float32) / 127.5 - 1
    return jnp.repeat(x[:, None], 3, axis=1)


def package(where: str | None, folder: Path) -> tuple[Path, list[str]]:
    """The ONNX file, out of the installed package or out of a wheel into `folder`; and the character of each output."""
    try:
        import onnxruntime
    except ImportError:
        sys.exit("onnxruntime is missing: pip install onnxruntime")
    if where is None:
        spec = importlib.util.find_spec("rapidocr")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("rapidocr is not installed: name the wheel of rapidocr 3.10.0 with --rapidocr")
        where = str(spec.submodule_search_locations[0])
    path = Path(where) / "rapidocr" if (Path(where) / "rapidocr").is_dir() else Path(where)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            if f"rapidocr/{MODEL}" in wheel.namelist():
                path = Path(wheel.extract(f"rapidocr/{MODEL}", folder)).parents[1]
    if not (path / MODEL).is_file():
        sys.exit(f"{where} has no {MODEL}, as rapidocr 3.10.0 has: name a wheel of that version")
    try:
        session = onnxruntime.InferenceSession(str(path / MODEL), providers=["CPUExecutionProvider"])
    except Exception as error:
        sys.exit(f"onnxruntime cannot open {MODEL} of {where} ({str(error)[:200]}): name a wheel of rapidocr 3.10.0")
    listed = session.get_modelmeta().custom_metadata_map.get("character", "").splitlines()
    # None at first, and the space at the end, as the package adds them.
    characters = ["", *listed, " "]
    shapes = [one.shape for one in (*session.get_inputs(), *session.get_outputs())]
    fits = len(shapes) == 2 and shapes[0][1:3] == [3, HEIGHT] and shapes[1][2:] == [CLASSES]
    if not fits or len(characters) != CLASSES:
        sys.exit(
            f"{MODEL} of {where} has the shapes {shapes} and {len(characters)} characters, and rapidocr 3.10.0's has "
            f"[?, 3, {HEIGHT}, ?], [?, ?, {CLASSES}] and {CLASSES}: name a wheel of that version"
        )
    return path / MODEL, characters


def of_text(file: str | None) -> tuple[list[str], list[str]]:
    """Words to learn from and words that are held out: the last fifth of a text."""
    if file is None:
        from pydoc_data.topics import topics

        names = sorted(topics)
        random.Random(0).shuffle(names)
        text = "\n".join(topics[name] for name in names)
    else:
        try:
            text = Path(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"{file} cannot be read as UTF-8 text ({error}): give another file with --text")
    words = text.split()
    if len(words) < 1000:
        sys.exit(f"{file or 'the text'} has {len(words)} words: give at least 1000 with --text")
    held = len(words) * 4 // 5
    return words[:held], words[held:]


def fonts_in(folder: str) -> list[str]:
    """Fonts with Latin letters, or matplotlib's own where the folder has none and was not asked for."""
    from PIL import ImageFont

    def reads(path: Path) -> bool:
        try:
            font = ImageFont.truetype(str(path), 24)
            shapes = {bytes(font.getmask(sign)) for sign in "aBg8\uffff"}
        except (OSError, ValueError):
            return False
        return len(shapes) == 5 and b"" not in shapes

    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".ttf", ".otf"))
    if not found and folder == FONTS:
        import matplotlib

        found = sorted(Path(matplotlib.get_data_path()).rglob("DejaVu*.ttf"))
    # A mathematical one has other letters.
    fonts = [str(path) for path in found if "math" not in path.name.lower() and reads(path)]
    if not fonts:
        sys.exit(f"{folder} has no .ttf or .otf font with Latin letters: name a folder that has one with --fonts")
    return fonts


def rendered(words: Sequence[str], font: str, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Some words that follow each other and fill a line: bytes `[48, 160]`, and the text."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    face = ImageFont.truetype(font, int(rng.integers(24, 35)))
    at, text = int(rng.integers(len(words) - 1)), ""
    for word in words[at:]:
        longer = f"{text} {word}".strip()
        if face.getlength(longer) > WIDTH - 8:
            break
        text = longer
    image = Image.new("L", (WIDTH, HEIGHT), int(rng.integers(190, 256)))
    place = 4 + rng.uniform() * (WIDTH - 8 - face.getlength(text)), HEIGHT / 2 + rng.integers(-3, 4)
    ImageDraw.Draw(image).text(place, text, font=face, anchor="lm", fill=int(rng.integers(0, 90)))
    # On a clean line the teacher is sure, and nothing is left for the other classes.
    image = image.filter(ImageFilter.GaussianBlur(1.5 * rng.uniform()))
    share = rng.uniform(0.2, 0.38)
    small = image.resize((round(WIDTH * share), round(HEIGHT * share)), Image.Resampling.BILINEAR)
    image = small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    noisy = np.asarray(image, np.float32) + 40 * rng.uniform() * rng.normal(size=(HEIGHT, WIDTH))
    return np.clip(noisy, 0, 255).astype(np.uint8), text


def lines(
    words: Sequence[str], count: int, fonts: Sequence[str], seed: int, but: Any = ()
) -> tuple[np.ndarray, list[str]]:
    """Lines `[count, 48, 160]` and their texts, no text twice, and none of `but`."""
    rng = np.random.default_rng(seed)
    images: dict[str, np.ndarray] = {}
    for _ in range(50 * count):
        image, text = rendered(words, fonts[rng.integers(len(fonts))], rng)
        if text and text not in but and text.isprintable():
            images.setdefault(text, image)
        if len(images) == count:
            return np.stack(list(images.values())), list(images)
    sys.exit(
        f"the text gives {len(images)} lines that differ, and {count} are asked for: give a longer one with --text"
    )


def decoded(classes: np.ndarray, characters: Sequence[str]) -> str:
    """The text of the most probable class at each position: repeats are one, and the blank is none."""
    kept = [int(one) for place, one in enumerate(classes) if place == 0 or one != classes[place - 1]]
    return "".join(characters[one] for one in kept if one != BLANK)


def distance(one: str, other: str) -> int:
    """Insertions, deletions and replacements from one text to another."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def draws_for(budget: float, chunks: Iterable[np.ndarray]) -> int:
    """As many draws as fit into a number of bytes a position, in the mean over positions `[..., classes]` of chunks."""
    chances, others, positions = [], 0.0, 0
    for probabilities in chunks:
        large = probabilities > 1e-6
        chances.append(probabilities[large].astype(np.float64))
        others += float(probabilities[~large].sum(dtype=np.float64))
        positions += probabilities[..., 0].size
    logs = np.log1p(-np.minimum(np.concatenate(chances), 1 - 1e-12))

    def size(draws: int) -> float:
        # An entry is a class and its count, and each position has the number of its entries.
        width = -(-((CLASSES << (draws - 1).bit_length()) - 1).bit_length() // 8)
        distinct = -np.expm1(draws * logs).sum() + draws * others
        return float(width * distinct / positions + (1 if draws < 256 else 2))

    most = bisect.bisect_right(range(1, 4096), budget, key=size)
    if not most:
        sys.exit(f"{budget} bytes a position are asked for: a draw takes {size(1):.1f}, so give at least that many")
    return most


def ways(budgets: Sequence[int], chunks: Sequence[np.ndarray]) -> dict[str, tuple[Any, dict[str, Any] | None]]:
    """What is trained: names, methods, and what is kept of the teacher; None for its most probable class."""
    found: dict[str, tuple[Any, dict[str, Any] | None]] = {
        FULL: (kd.KD(alpha=0.0, temperature=1.0), {"dtype": jnp.float16}),
        HARD: (kd.CrossEntropy(), None),
    }
    for budget in budgets:
        # A class is 2 bytes, a logarithm too, and there is one more of all other classes.
        k, draws = (budget - 2) // 4, draws_for(budget, chunks)
        if k < 1:
            sys.exit(f"{budget} bytes a position are asked for: one class and the rest take 6, so give at least 6")
        top = {"keep": "top-k", "k": k, "dtype": jnp.float16}
        found[f"top {k}, renormalised"] = kd.TopKKL(alpha=0.0, k=k, rest="renormalised"), top
        found[f"top {k}, tail"] = kd.TopKKL(alpha=0.0, k=k, rest="tail"), top
        found[f"{draws} draws"] = kd.SampledKL(samples=draws), {"keep": "samples", "draws": draws}
    return found


def measured(
    model: Any, known: Any, inputs: np.ndarray, texts: Sequence[str], characters: Sequence[str]
) -> dict[str, float]:
    """Means over the positions, and errors for each character that was rendered. model: None for the teacher."""
    compare = jax.jit(kd.losses.kl_divergence)
    found: dict[str, list[float]] = {name: [] for name in ("KL", "agreement", "largest", "entropy")}
    wrong = 0
    for start in range(0, len(inputs), 50):
        rows = np.arange(start, min(start + 50, len(inputs)))
        taught = known.take(rows).output.logits
        given = taught if model is None else kd.predict(model, inputs[rows], batch_size=50, prepare=prepare)
        log_p, answers = jax.nn.log_softmax(given), np.asarray(given.argmax(-1))
        found["KL"] += np.ravel(compare(given, taught)).tolist()
        found["agreement"] += np.ravel(answers == taught.argmax(-1)).tolist()
        found["largest"] += np.ravel(jnp.exp(log_p.max(-1))).tolist()
        found["entropy"] += np.ravel(-(jnp.exp(log_p) * log_p).sum(-1)).tolist()
        wrong += sum(distance(decoded(answers[row - start], characters), texts[row]) for row in rows)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return means | {"CER": wrong / sum(map(len, texts))}


def pictures(out: Path, images: np.ndarray, texts: Sequence[str], told: Sequence[str], points: Any) -> None:
    """Some of the lines, and KL against bytes. points: name, bytes and KL of each seed."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 5.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.4])
    for place, axes in enumerate(left.subplots(4, 2).ravel()):
        axes.imshow(images[place], cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{texts[place]}\n{told[place] or '(nothing)'}", fontsize=7, parse_math=False)
        axes.axis("off")
    left.suptitle("held-out lines: their text, and what the teacher reads", fontsize=8)
    axes = right.subplots()
    for place, (name, size, values) in enumerate(points):
        label = f"{name} ({size:,.1f} bytes)" if name != HARD else f"{name} ({size:.0f} bytes)"
        axes.plot([size] * len(values), values, "ox+sd^v*x+"[place % 10], color=f"C{place % 10}", label=label)
    axes.set(xscale="log", xlabel="bytes a position", ylabel="KL to the teacher on held-out lines, nats")
    axes.legend(fontsize=7)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def table_of(shown: dict[str, list[dict[str, float]]], of_teacher: dict[str, float]) -> str:
    """What each student is, and by how much it differs from that of all logits, seed by seed."""
    table = [["teacher", "", *(f"{of_teacher[one]:.3f}" if one == "KL" else f"{of_teacher[one]:.2%}"
              for one in ("KL", "agreement", "CER")), f"{of_teacher['largest']:.1%}", "", "", ""]]  # fmt: skip
    for name, of in shown.items():
        row = [name, f"{np.mean([run['bytes'] for run in of]):,.1f}"]
        for one in (*MEASURES, "largest"):
            values, form = np.array([run[one] for run in of]), ".3f" if one == "KL" else ".2%"
            row.append(f"{values.mean():{form}}" + (f" ± {values.std(ddof=1):{form}}" if len(of) > 1 else ""))
        for one in MEASURES:
            form = "+.3f" if one == "KL" else "+.2%"
            pair = kd.paired_comparison(
                [run[one] for run in shown[FULL]], [run[one] for run in of], metric=one, comparisons=len(shown) - 1
            )
            low, high = pair.ci95 or (0.0, 0.0)
            told = pair.ci95 is not None and name != FULL
            row.append(f"{pair.mean_difference:{form}} ({low:{form}} to {high:{form}})" if told else "")
        table.append(row)
    columns = ["", "bytes a position", *MEASURES.values(), "its largest probability"]
    columns += [f"{one}, less that of {FULL}" for one in MEASURES]
    return tabulate(table, columns, tablefmt="github", disable_numparse=True)


def main(
    count: int = 1000, *, where: str | None = None, text: str | None = None, fonts: str = FONTS, epochs: int = 10,
    seeds: int = 3, budgets: Sequence[int] = (10,), width: int = 48, batch_size: int = 16, out: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains on `count` lines, and prints a table of others. budgets: bytes a position of what is sparse."""
    for name, number in {"lines": count, "epochs": epochs, "seeds": seeds}.items():
        check_whole(number, name)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        return compared(
            Path(folder), count, where=where, text=text, fonts=fonts, epochs=epochs, seeds=seeds, budgets=budgets,
            width=width, batch_size=batch_size, out=out,
        )  # fmt: skip


def compared(
    beside: Path, count: int, *, where: str | None, text: str | None, fonts: str, epochs: int, seeds: int,
    budgets: Sequence[int], width: int, batch_size: int, out: str | None,
) -> dict[str, Any]:  # fmt: skip
    """`main`, with a folder for what is not kept."""
    begun = time.perf_counter()
    home = Path(out or beside)
    path, characters = package(where, beside)
    faces, (words, others) = fonts_in(fonts), of_text(text)
    inputs, texts = lines(words, count, faces, seed=0)
    held, wanted = lines(others, max(16, count // 4), faces, seed=1, but=set(texts))
    teacher = kd.from_onnx(path, probabilities=True)
    asked: dict[str, Any] = {"batch_size": min(16, count), "prepare": prepare}
    answers = home / "answers"
    tested = kd.cached(teacher, held, path=answers / "held-out", **asked | {"batch_size": 16})
    whole = kd.cached(teacher, inputs, path=answers / "all", dtype=jnp.float16, **asked)
    # Some of them, of all parts.
    parts = np.array_split(np.unique(np.linspace(0, count - 1, 256).astype(int)), 8)
    chunks = [np.asarray(jax.nn.softmax(whole.take(rows).outputs(None)[0].logits)) for rows in parts if len(rows)]
    kinds = ways(budgets, chunks)
    of_teacher = measured(None, tested, held, wanted, characters)
    positions = count * (WIDTH // STRIDE)
    largest = np.mean([np.sort(one)[..., :-33:-1].cumsum(-1).mean((0, 1)) for one in chunks], axis=0)
    print(
        f"{count:,} lines to learn from, {len(held):,} of other text, {len(faces)} fonts; the teacher's entropy is "
        f"{of_teacher['entropy']:.2f} nats in the mean; its 1, 2, 8 and 32 most probable classes have "
        f"{', '.join(f'{largest[k - 1]:.1%}' for k in (1, 2, 8))} and {largest[31]:.1%}", flush=True,
    )  # fmt: skip

    settings = {
        "lines": count, "held out": len(held), "words": len(words), "fonts": len(faces), "epochs": epochs,
        "width": width, "batch size": batch_size, "learning rate": RATE,
    }  # fmt: skip
    runs: dict[str, list[dict[str, float]]] = {}
    seconds, file = 0.0, None if out is None else home / "results.json"
    if file is not None and file.is_file():
        before = json.loads(file.read_text())
        if before["settings"] != settings:
            sys.exit(f"{file} is of {before['settings']}, and not of {settings}: give another folder with --out")
        runs, seconds = before["runs"], before["seconds"]
    for name in kinds:
        runs.setdefault(name, [])

    hard = np.concatenate(
        [whole.take(np.arange(count)[start : start + 64]).output.logits.argmax(-1) for start in range(0, count, 64)]
    )
    steps = epochs * max(1, count // min(batch_size, count))
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(RATE / 10, RATE, max(1, steps // 20), steps + 1))
    for seed in range(seeds):
        for name, (method, how) in kinds.items():
            if len(runs[name]) > seed:
                continue
            kept, size = None, 2.0
            if how is not None:
                # Each seed has draws of its own: its students tell of them, too.
                own = how | {"key": seed} if "draws" in how else how
                # Top k of both kinds are one cache.
                of = name.split(",")[0].replace(" ", "-") + (f"-{seed}" if "draws" in how else "")
                kept = whole if name == FULL else kd.cached(teacher, inputs, path=answers / of, **own, **asked)
                size = kept.nbytes / positions
            clock = time.perf_counter()
            trained = kd.distill(
                Recogniser(width, rngs=nnx.Rngs(seed)), kept, kd.Batch(inputs, hard), method=method,
                optimizer=optimizer, epochs=epochs, batch_size=min(batch_size, count), key=seed, prepare=prepare,
            ).student  # fmt: skip
            took = time.perf_counter() - clock
            found = measured(trained, tested, held, wanted, characters) | {"bytes": size, "seconds": took}
            runs[name].append(found)
            print(f"{name}, seed {seed}: {found['KL']:.3f} nats, {found['agreement']:.2%} agreement", flush=True)
            if file is not None:
                so_far = {"settings": settings, "seconds": seconds + time.perf_counter() - begun,
                          "teacher": of_teacher, "runs": runs}  # fmt: skip
                file.with_suffix(".new").write_text(json.dumps(so_far, indent=2) + "\n")
                file.with_suffix(".new").replace(file)

    shown = {name: runs[name][:seeds] for name in kinds}
    printed = table_of(shown, of_teacher)
    size = kd.models.count_parameters(kd.models.as_model(Recogniser(width, rngs=nnx.Rngs(0))))
    print(
        f"students of {size:,} parameters, {count:,} lines, {epochs} epochs, {seeds} seeds: mean ± standard deviation"
        f"\n\n{printed}"
    )
    if file is not None:
        (home / "results.md").write_text(printed + "\n")
        reads = [decoded(row, characters) for row in np.asarray(tested.take(np.arange(8)).output.logits.argmax(-1))]
        points = [
            (name, np.mean([run["bytes"] for run in of]), [run["KL"] for run in of]) for name, of in shown.items()
        ]
        pictures(home / "recogniser.png", held, wanted, reads, points)
    return {"settings": settings, "parameters": size, "teacher": of_teacher, "runs": shown}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rapidocr", metavar="PATH", help="its wheel or its folder (default: the installed one)")
    parser.add_argument("--text", metavar="FILE", help="what the lines say (default: Python's own documentation)")
    parser.add_argument("--fonts", default=FONTS, metavar="DIR", help=f"fonts (default: {FONTS}, or matplotlib's)")
    parser.add_argument("--lines", type=int, default=1000, metavar="N", help="lines to learn from (default: 1000)")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="of each student (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each student (default: 3)")
    parser.add_argument(
        "--bytes", type=int, nargs="+", default=[10], metavar="N", help="a position, of what is sparse (default: 10)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the table, a plot, results.json and the answers")
    parser.add_argument("--quick", action="store_true", help="16 lines, one epoch, one seed: to see that it runs")
    given = parser.parse_args()
    quick = {"count": 16, "epochs": 1, "seeds": 1, "width": 8}
    more = {"count": given.lines, "epochs": given.epochs, "seeds": given.seeds}
    try:
        main(
            **(quick if given.quick else more), where=given.rapidocr, text=given.text, fonts=given.fonts,
            budgets=given.bytes, out=given.out,
        )  # fmt: skip
    except TOLD as error:
        sys.exit(str(error))
