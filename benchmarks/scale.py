"""What the compiled step of a training sends and keeps on 1 to 8 devices: `python -m benchmarks.scale [--out DIR]`.

The devices are simulated on a CPU, so that no time is told, which would be that of cores that share one memory. Told is
what does not depend on it: the collectives in the compiled program, the bytes of each, and the memory of a device.
Weak: as many examples for each device. Strong: as many together.
"""

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from tabulate import tabulate

import kd_jax as kd
from kd_jax.data.batch import Batch
from kd_jax.models import Model
from kd_jax.teacher import as_teacher
from kd_jax.train.checks import make_training
from kd_jax.train.sharding import DATA, Rule, Sharding, as_mesh, on_mesh, put_batch, put_teacher, replicated
from kd_jax.train.sources import Stream
from kd_jax.train.start import first_state

STUDENT, TEACHER, EACH, TOGETHER = (784, 1024, 1024, 10), (784, 2048, 2048, 10), 64, 512
DEVICES = (1, 2, 4, 8)
SIZES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
OPERATION = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(")


def by_columns(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The first of two products by its columns and the next by its rows; the last layer is whole."""
    if "hidden.0" in path:
        return PartitionSpec(None, "model") if len(shape) == 2 else PartitionSpec("model")
    return PartitionSpec("model", None) if "hidden.1" in path and len(shape) == 2 else PartitionSpec()


def fully(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Parameters over `data`, as ZeRO's stage 3 has them."""
    return PartitionSpec(DATA) if shape[0] % max(DEVICES) == 0 else PartitionSpec()


class Way(NamedTuple):
    """How a training lies on devices. axes: sizes and names of a mesh of so many."""

    name: str
    axes: Callable[[int], dict[str, int]]
    rule: Rule | None = None
    zero: bool = False


WAYS = (
    Way("data", lambda count: {"data": count}),
    Way("data, moments over data", lambda count: {"data": count}, zero=True),
    Way("data, fully sharded", lambda count: {"data": count}, fully, zero=True),
    Way("model", lambda count: {"data": 1, "model": count}, by_columns),
    Way("data × model", lambda count: {"data": count // 2, "model": 2}, by_columns),
)


class Found(NamedTuple):
    """Of one compiled step, on each device. collectives: bytes of results, and how many, by kind.

    parameters: bytes of all the student's. held: of arguments: state, teacher and batch. temporary: beside them.
    """

    way: str
    scaling: str
    devices: int
    examples: int
    collectives: dict[str, tuple[int, int]]
    held: int
    temporary: int
    parameters: int


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """By kind how many there are in a compiled program, and the bytes of their results."""
    number, size = Counter[str](), Counter[str]()
    for result, kind in OPERATION.findall(text):
        number[kind] += 1
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            size[kind] += SIZES.get(dtype, 1) * int(np.prod([int(one) for one in shape.split(",") if one]))
    return {kind: (number[kind], size[kind]) for kind in KINDS if number[kind]}


@on_mesh
def compiled(batch_size: int, *, mesh: Any, sharding: Sharding) -> Any:
    """The step of a student with its teacher, as `kd.distill` compiles it for an iterator."""
    model: Model = kd.mlp(list(STUDENT))
    batch = Batch(np.zeros((batch_size, STUDENT[0]), np.float32), np.zeros(batch_size, np.int32))
    teacher = put_teacher(mesh, as_teacher(kd.mlp(list(TEACHER)).init(1)), sharding.teacher)
    key, method = replicated(mesh, (jax.random.key(0), kd.KD()))
    training = make_training(model, optax.adamw(1e-3))
    source = Stream([batch], teacher, key, method, training, steps=1, labels_count=True, mesh=mesh)
    state = first_state(source, model, mesh, sharding)
    assert source.layout is not None
    step = jax.jit(partial(source._steps, most=1), donate_argnums=0, out_shardings=source.layout.results(state))
    return step.lower(state, key, put_batch(mesh, batch), teacher, method, np.int32(1)).compile()


def measured(way: Way, count: int, examples: int, scaling: str) -> Found:
    """One way on so many devices."""
    axes = way.axes(count)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:count])
    program = compiled(examples, mesh=mesh, sharding=Sharding(student=way.rule, teacher=way.rule, zero=way.zero))
    memory = program.memory_analysis()
    parameters = 4 * sum(one * other + other for one, other in itertools.pairwise(STUDENT))
    sent = collectives(str(program.as_text()))
    held, temporary = int(memory.argument_size_in_bytes), int(memory.temp_size_in_bytes)
    return Found(way.name, scaling, count, examples, sent, held, temporary, parameters)


def seeds(count: int) -> dict[str, tuple[int, int]]:
    """Collectives in a program that trains one seed on each device, as `kd.compare` does along `seed`."""
    mesh = as_mesh(jax.make_mesh((count,), ("seed",), devices=jax.devices()[:count]))
    data = Batch(jnp.zeros((64, 8)), jnp.zeros(64, jnp.int32))

    def train(keys: Any) -> Any:
        one = kd.fit(keys[0], data, kd.mlp([8, 4, 2]), method=kd.CrossEntropy(), optimizer=optax.sgd(0.1), epochs=1,
                     batch_size=8)  # fmt: skip
        return jax.tree.map(lambda leaf: leaf[None], one[1])

    each = jax.shard_map(
        train, mesh=mesh, in_specs=PartitionSpec("seed"), out_specs=PartitionSpec("seed"), check_vma=False
    )
    keys = jax.random.split(jax.random.key(0), count)
    return collectives(str(jax.jit(each).lower(keys).compile().as_text()))


def table(found: list[Found]) -> str:
    """In Markdown, bytes in MB (10⁶)."""
    rows = []
    for one in found:
        sent = ", ".join(f"{n} {kind} {size / 1e6:.3g}" for kind, (n, size) in one.collectives.items())
        rows.append(
            [one.way, one.scaling, one.devices, one.examples, sent or "none", one.held / 1e6, one.temporary / 1e6]
        )
    heads = ["way", "scaling", "devices", "examples", "collectives: number, kind, MB", "held, MB", "temporary, MB"]
    return tabulate(rows, heads, tablefmt="github", floatfmt=".1f")


def main(arguments: list[str] | None = None) -> None:
    """Options in, table out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for scale.json and scale.md")
    parser.add_argument("--devices", type=int, nargs="+", default=list(DEVICES), help="how many (default: %(default)s)")
    options = parser.parse_args(arguments)
    if jax.device_count() < max(options.devices):
        raise SystemExit("scale: simulated devices are missing: set JAX_NUM_CPU_DEVICES=8 and JAX_PLATFORMS=cpu")
    apart, found = seeds(max(options.devices)), []
    for way in WAYS:
        for count in options.devices:
            if way.axes(count)["data"] < 1:
                continue
            for scaling, examples in {"weak": EACH * count, "strong": TOGETHER}.items():
                found.append(measured(way, count, examples, scaling))
    text = (
        f"# What a step sends and keeps\n\n`JAX_NUM_CPU_DEVICES=8 JAX_PLATFORMS=cpu python -m benchmarks.scale`\n\n"
        f"Student {'-'.join(map(str, STUDENT))} ({found[0].parameters / 1e6:.2f} MB of parameters), teacher "
        f"{'-'.join(map(str, TEACHER))}, KD, AdamW, float32. Of each device, from the compiled program: bytes of the "
        "results of collectives, of what it holds (state, teacher, batch), and of what is temporary in a step.\n\n"
        f"{table(found)}\n\nSeeds, one on each of {max(options.devices)} devices: "
        f"{apart if apart else 'no collective'}.\n"
    )
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scale.md").write_text(text, encoding="utf-8")
        known = {"steps": [one._asdict() for one in found], "seeds": apart, "jax": jax.__version__}
        (options.out / "scale.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
