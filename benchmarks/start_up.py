"""How long the first variables of a network take: `python -m benchmarks.start_up`.

Each is made in a process of its own, which has compiled nothing before: as the network itself makes it (of NNX
operation by operation, of Linen as one program), as one program at XLA's usual level, and as `Model.init` makes it.
Seconds are the processor's, of all cores, the median of three processes in turn; the digest is of the bits.
"""

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import linen, nnx
from tabulate import tabulate

import kd_jax as kd
from benchmarks import report

FOLDER = Path("results/throughput/start-up")
ROUNDS = 3
WIDTHS = (3, 16, 24, 32, 48, 64, 80, 96, 112)


class CNN(nnx.Module):
    """Eight convolutions and a head, as Flax initialises them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in itertools.pairwise(WIDTHS)])
        self.head = nnx.Linear(WIDTHS[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.head(x.mean((1, 2)))


class LinenCNN(linen.Module):
    """The same in Linen."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        for width in WIDTHS[1:]:
            x = linen.relu(linen.Conv(width, (3, 3))(x))
        return linen.Dense(10)(x.mean((1, 2)))


NETWORKS: dict[str, Callable[[], kd.Model]] = {
    "NNX, 8 convolutions": lambda: kd.from_nnx(CNN),
    "Linen, 8 convolutions": lambda: kd.from_linen(LinenCNN(), jax.numpy.zeros((1, 32, 32, 3))),
    "resnet20": lambda: kd.from_nnx(lambda rngs: kd.models.resnet20(num_classes=10, rngs=rngs)),
    "resnet18": lambda: kd.from_nnx(lambda rngs: kd.models.resnet18(num_classes=10, rngs=rngs)),
    "mobilenet_v2": lambda: kd.from_nnx(lambda rngs: kd.models.mobilenet_v2(num_classes=10, rngs=rngs)),
}
WAYS: dict[str, Callable[[kd.Model, Any], Any]] = {
    "the network itself": lambda model, key: model.network.init(key),
    "one program": lambda model, key: jax.jit(model.network.init)(key),
    "Model.init": lambda model, key: model.init(key).variables,
}


def measure(network: str, way: str) -> dict[str, Any]:
    """Of this process."""
    model, key = NETWORKS[network](), jax.block_until_ready(jax.random.key(0))
    started, began = time.process_time(), time.perf_counter()
    variables = jax.block_until_ready(WAYS[way](model, key))
    found = {"processor seconds": time.process_time() - started, "seconds": time.perf_counter() - began}
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(jax.device_get(leaf).tobytes())
    return found | {"digest": digest.hexdigest()[:12]}


def main() -> None:
    """Measures in new processes, prints a table and keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "WAY"), help="measure this one in this process")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help=f"default: {FOLDER}")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one)))
        return
    found: dict[str, dict[str, Any]] = {}
    rows = []
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    for network in NETWORKS:
        of: dict[str, list[Any]] = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.start_up", "--one", network, way]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                of[way].append(json.loads(done.stdout.splitlines()[-1]))
        found[network] = of
        same = len({one["digest"] for each in of.values() for one in each}) == 1
        medians = [statistics.median(one["processor seconds"] for one in each) for each in of.values()]
        rows.append([network, *(f"{seconds:.1f}" for seconds in medians), "yes" if same else "no"])
    table = tabulate(rows, ["processor seconds", *WAYS, "the same bits"], tablefmt="github", disable_numparse=True)
    text = f"{report.environment()['processor']}, jax {jax.__version__}: `python -m benchmarks.start_up`\n\n{table}\n"
    print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"jax-{jax.__version__}.md").write_text(text, encoding="utf-8")
    (given.out / f"jax-{jax.__version__}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
