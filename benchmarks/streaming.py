"""How fast a training is whose data lies on the disk: `python -m benchmarks.streaming [--quick] [--out DIR]`.

Each round times epochs of the same training in memory, from batches in memory (`kd.batches`), and by `kd.stream` from
a mapped file; compiling is not in it. A ratio above 1 is faster than in memory.

The rows "within" are processes of their own: one has the data in memory, the other streams it and may allocate no more
than a quarter of its size (`RLIMIT_DATA`), beyond what a few examples took. The threads of a process keep some 60 MiB
of what they freed: a limit has to be larger. --quick: these alone, at most 5 minutes on 2 cores that do nothing else.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import kd_jax as kd
from kd_jax.models import zoo

CHANNELS, BATCH = 3, 64
# Of the data that is larger than the memory: bytes of an example, and a batch.
WIDE, LARGE_BATCH = 1024, 128
# So many of them are trained on before the limit is set: all is compiled then.
FEW = 2048


def scale(key: Any, images: jax.Array, train: bool) -> jax.Array:
    """Bytes as numbers."""
    return images.astype(jnp.float32) / 255


def networks(name: str) -> tuple[Any, Any, int, int]:
    """A student, a teacher, the side of their images and how many an epoch has."""
    if name == "dense":
        return kd.mlp([3072, 256, 10]), kd.mlp([3072, 1024, 10]).init(1), 32, 12_800
    return zoo.resnet8(rngs=nnx.Rngs(0)), zoo.resnet20(rngs=nnx.Rngs(1)), 32, 1_280


def ways(name: str, folder: Path) -> dict[str, Callable[[int], float]]:
    """Seconds of so many epochs, by where the data is."""
    student, teacher, side, count = networks(name)
    rng = np.random.default_rng(0)
    shape = (count, side, side, CHANNELS) if name != "dense" else (count, side * side * CHANNELS)
    images, labels = rng.integers(0, 256, shape).astype(np.uint8), rng.integers(0, 10, count).astype(np.int32)
    np.save(folder / f"{name}.npy", images)
    how: dict[str, Any] = {"method": kd.KD(), "optimizer": optax.sgd(0.05), "prepare": scale, "progress": False}

    def timed(data: Callable[[], Any], **more: Any) -> Callable[[int], float]:
        def run(epochs: int) -> float:
            given, began = data(), time.perf_counter()
            kd.distill(student, teacher, given, epochs=epochs, **how, **more)
            return time.perf_counter() - began

        return run

    def streamed() -> Any:
        return kd.stream((np.load(folder / f"{name}.npy", mmap_mode="r"), labels), batch_size=BATCH)

    memory = kd.Batch(images, labels)
    return {
        "memory": timed(lambda: memory, batch_size=BATCH),
        "batches": timed(lambda: list(kd.batches(memory, key=0, batch_size=BATCH, epochs=1))),
        "stream": timed(streamed),
    }


def limited_epoch(way: str, path: Path) -> float:
    """Seconds of an epoch on the data in `path`: all of it in memory, or streamed within a quarter of its size.

    Sets a limit of this process, for good. Linux alone has it.
    """
    import resource

    images = np.load(path, mmap_mode="r")
    labels = (np.arange(len(images)) % 10).astype(np.int32)
    student, teacher = kd.mlp([WIDE, 256, 10]), kd.mlp([WIDE, 1024, 10]).init(1)
    how: dict[str, Any] = {"method": kd.KD(), "optimizer": optax.sgd(0.05), "prepare": scale, "progress": False}

    def timed(count: int) -> float:
        data: Any = (images[:count], labels[:count])
        if way == "memory":
            data, size = kd.Batch(np.array(data[0]), data[1]), LARGE_BATCH
        else:
            data, size = kd.stream(data, batch_size=LARGE_BATCH), None
        began = time.perf_counter()
        result = kd.distill(student, teacher, data, epochs=1, batch_size=size, **how)
        assert int(result.state.step) == count // LARGE_BATCH
        return time.perf_counter() - began

    # Compiled in the lengths of loops that follow, and again without compiling: what is beside the steps.
    timed(FEW)
    beside = timed(FEW)
    if way != "memory":
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        used = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + path.stat().st_size // 4, resource.RLIM_INFINITY))
    else:
        timed(len(images))
    return (timed(len(images)) - beside) / (1 - FEW / len(images))


def limited(rounds: int, examples: int) -> dict[str, list[float]]:
    """Seconds of an epoch by where the data is, of as many processes each, in turn."""
    found: dict[str, list[float]] = {"memory": [], "stream within a quarter": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (examples, WIDE))
        rng = np.random.default_rng(0)
        for start in range(0, examples, FEW):
            images[start : start + FEW] = rng.integers(0, 256, (len(images[start : start + FEW]), WIDE), np.uint8)
        images.flush()
        del images
        for _ in range(rounds):
            for way, seconds in found.items():
                command = [sys.executable, "-m", "benchmarks.streaming", "--one", way, str(path)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                seconds.append(float(done.stdout.splitlines()[-1]))
    return found


def row(name: str, way: str, memory: list[float], seconds: list[float], epochs: int) -> str:
    """A line of the table; seconds: of so many epochs."""
    ratios = [one / other for one, other in zip(memory, seconds, strict=True)]
    return (
        f"| {name} | {way} | {statistics.median(seconds) / epochs:.3f} | {statistics.median(ratios):.2f} | "
        f"{min(ratios):.2f} to {max(ratios):.2f} |"
    )


def main(arguments: list[str] | None = None) -> None:
    """Options in, table out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for streaming.json and streaming.md")
    parser.add_argument("--rounds", type=int, help="(default: 7, quick: 3)")
    parser.add_argument("--quick", action="store_true", help="the rows within a limit alone")
    parser.add_argument("--examples", type=int, default=2**19, help="of these rows, 1 KiB each (default: %(default)s)")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        print(limited_epoch(options.one[0], Path(options.one[1])))
        return
    options.rounds = options.rounds or (3 if options.quick else 7)
    found: dict[str, dict[str, list[float]]] = {}
    lines = []
    name = f"dense, {options.examples * WIDE // 2**20} MiB"
    found[name] = limited(options.rounds, options.examples)
    lines += [row(name, way, found[name]["memory"], seconds, 1) for way, seconds in found[name].items()]
    with tempfile.TemporaryDirectory() as folder:
        for name in () if options.quick else ("dense", "resnet8"):
            each, found[name] = ways(name, Path(folder)), {}
            for run in each.values():
                run(1)
            for _ in range(options.rounds):
                for way, run in each.items():
                    # What is beside the epochs is the same in both, and not counted.
                    found[name].setdefault(way, []).append(run(4) - run(1))
            lines += [row(name, way, found[name]["memory"], seconds, 3) for way, seconds in found[name].items()]
    text = (
        f"# Data on the disk\n\n`python -m benchmarks.streaming{' --quick' * options.quick} --rounds {options.rounds}`"
        f"\n\nSeconds of an epoch, medians of {options.rounds} rounds; the ratio is memory's seconds over these, in "
        "the same round.\n\n| network | data | seconds | ratio | from, to |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "streaming.md").write_text(text, encoding="utf-8")
        (options.out / "streaming.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
