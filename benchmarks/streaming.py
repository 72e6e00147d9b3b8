"""How fast a training is whose data lies on the disk: `python -m benchmarks.streaming [--out DIR] [--rounds N]`.

Each round times epochs of the same training in memory, from batches in memory (`kd.batches`), and by `kd.stream` from
a mapped file; compiling is not in it. A ratio above 1 is faster than in memory.
"""

import argparse
import json
import statistics
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


def main(arguments: list[str] | None = None) -> None:
    """Options in, table out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for streaming.json and streaming.md")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, list[float]]] = {}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dense", "resnet8"):
            each, found[name] = ways(name, Path(folder)), {}
            for run in each.values():
                run(1)
            for _ in range(options.rounds):
                for way, run in each.items():
                    # What is beside the epochs is the same in both, and not counted.
                    found[name].setdefault(way, []).append(run(4) - run(1))
            memory = found[name]["memory"]
            for way, seconds in found[name].items():
                ratios = [one / other for one, other in zip(memory, seconds, strict=True)]
                lines.append(
                    f"| {name} | {way} | {statistics.median(seconds) / 3:.3f} | {statistics.median(ratios):.2f} | "
                    f"{min(ratios):.2f} to {max(ratios):.2f} |"
                )
    text = (
        "# Data on the disk\n\n`python -m benchmarks.streaming`\n\nSeconds of an epoch, medians of "
        f"{options.rounds} rounds; the ratio is memory's seconds over these, in the same round.\n\n"
        "| network | data | seconds | ratio | from, to |\n|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "streaming.md").write_text(text, encoding="utf-8")
        (options.out / "streaming.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
