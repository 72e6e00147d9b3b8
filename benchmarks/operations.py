"""A training step of one operation, outside and inside a loop, against PyTorch: `python -m benchmarks.operations`.

A step takes the gradients of a mean square by the parameters and the inputs, and moves both. Each operation runs as one
step, in a `lax.scan` of 4 steps and as 4 seeds in a `vmap`, as JAX compiles it and with
`kd_jax.convolution.canonical`, and in eager PyTorch with channels last. The contestants take turns, so the ratios
hold on a busy machine, and the milliseconds do not; where other programs use the cores, PyTorch's threads wait for one
another, so give the process one core then (`taskset -c 0 …`). `--only NAME …` takes some rows, `--columns NAME …` some
columns (those without `canonical` take most of the time), `--rounds N` another number of turns. Rows of an earlier run
in the same folder stay.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.measure import Contestant, quartiles, ratios, take_turns
from kd_jax.convolution import canonical

try:
    from benchmarks import operations_torch
except ImportError:  # PyTorch is an extra of kd_jax
    operations_torch = None  # type: ignore[assignment]

STEPS = 4
FOLDER = Path("results/throughput/operations")
COLUMNS = ("step", "scan", "scan, canonical", "scan, no YNN", "vmap, each", "vmap, canonical, each", "PyTorch")
# XLA's library YNN makes the kernel's gradient twice as slow in jax 0.10; "scan, no YNN" is canonical, too.
WITHOUT_YNN = {"xla_cpu_experimental_ynn_fusion_type": ""}


class Operation(NamedTuple):
    """module: `module(rngs)`, an NNX module or a function of the inputs. shape: of the inputs, or of one of three."""

    module: Callable[[nnx.Rngs], Callable[..., Any]]
    shape: tuple[int, ...]
    dtype: Any = jnp.float32
    whole: bool = False  # numbers of tokens


def _conv(inputs: int, outputs: int, window: Sequence[int], **options: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: nnx.Conv(inputs, outputs, tuple(window), rngs=rngs, **options)


def _function(fun: Callable[[jax.Array], jax.Array]) -> Callable[[nnx.Rngs], Callable[..., Any]]:
    return lambda rngs: fun


def _attention(x: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(x, x, x)


class ResNet8(nnx.Module):
    """ResNet-8 in the form for CIFAR: 16, 32 and 64 features, one block each."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nnx.Conv:
            return nnx.Conv(inputs, outputs, (size, size), strides=stride, use_bias=False, rngs=rngs)

        self.first, self.norm = conv(3, 16, 3), nnx.BatchNorm(16, rngs=rngs)
        blocks = []
        for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            shortcut = (
                [] if inputs == outputs else [conv(inputs, outputs, 1, stride), nnx.BatchNorm(outputs, rngs=rngs)]
            )
            main: list[Any] = [conv(inputs, outputs, 3, stride), nnx.BatchNorm(outputs, rngs=rngs), nnx.relu]
            main += [conv(outputs, outputs, 3), nnx.BatchNorm(outputs, rngs=rngs)]
            blocks.append(nnx.List([nnx.Sequential(*main), nnx.Sequential(*shortcut)]))
        self.blocks, self.head = nnx.List(blocks), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, 32, 32, 3] to [batch, 10]."""
        x = nnx.relu(self.norm(self.first(x)))
        for main, shortcut in self.blocks:
            x = nnx.relu(main(x) + (shortcut(x) if shortcut.layers else x))
        return self.head(jnp.mean(x, (1, 2)))


IMAGE = (64, 32, 32, 16)
OPERATIONS = {
    "ResNet-8": Operation(ResNet8, (64, 32, 32, 3)),
    "conv 3 × 3": Operation(_conv(16, 16, (3, 3)), IMAGE),
    "conv 3 × 3, bfloat16": Operation(
        _conv(16, 16, (3, 3), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), IMAGE, jnp.bfloat16
    ),
    "conv 3 × 3, stride 2": Operation(_conv(16, 32, (3, 3), strides=2), IMAGE),
    "conv 3 × 3, dilation 2": Operation(_conv(16, 16, (3, 3), kernel_dilation=2), IMAGE),
    "conv 3 × 3, 4 groups": Operation(_conv(64, 64, (3, 3), feature_group_count=4), (64, 16, 16, 64)),
    "depthwise 3 × 3": Operation(_conv(16, 16, (3, 3), feature_group_count=16), IMAGE),
    "depthwise 3 × 3, 128 features": Operation(_conv(128, 128, (3, 3), feature_group_count=128), (64, 8, 8, 128)),
    "depthwise 3 × 3, bfloat16": Operation(
        _conv(128, 128, (3, 3), feature_group_count=128, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
        (64, 8, 8, 128),
        jnp.bfloat16,
    ),
    "conv 1 × 1": Operation(_conv(16, 64, (1, 1)), IMAGE),
    "conv_transpose 3 × 3, stride 2": Operation(
        lambda rngs: nnx.ConvTranspose(16, 16, (3, 3), strides=2, rngs=rngs), (64, 16, 16, 16)
    ),
    "conv 1-D, 5": Operation(_conv(32, 64, (5,)), (64, 256, 32)),
    "conv 512 × 1, stride 4": Operation(
        _conv(1, 128, (512, 1), strides=(4, 1), padding=((254, 254), (0, 0))), (64, 1024, 1, 1)
    ),
    "conv 64 × 1": Operation(_conv(128, 16, (64, 1), padding=((31, 32), (0, 0))), (64, 128, 1, 128)),
    "conv 3-D, 3 × 3 × 3": Operation(_conv(8, 8, (3, 3, 3)), (8, 16, 16, 16, 8)),
    "average pool 3 × 3, padded": Operation(_function(lambda x: nnx.avg_pool(x, (3, 3), (2, 2), "SAME")), IMAGE),
    "max pool 2 × 2": Operation(_function(lambda x: nnx.max_pool(x, (2, 2), (2, 2))), IMAGE),
    "batch norm": Operation(lambda rngs: nnx.BatchNorm(16, rngs=rngs), IMAGE),
    "layer norm": Operation(lambda rngs: nnx.LayerNorm(128, rngs=rngs), (64, 64, 128)),
    "group norm": Operation(lambda rngs: nnx.GroupNorm(16, num_groups=4, rngs=rngs), IMAGE),
    "attention": Operation(_function(_attention), (16, 64, 4, 32)),
    "GRU": Operation(lambda rngs: nnx.RNN(nnx.GRUCell(32, 64, rngs=rngs), rngs=rngs), (64, 32, 32)),
    "LSTM": Operation(lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(32, 64, rngs=rngs), rngs=rngs), (64, 32, 32)),
    "embedding": Operation(lambda rngs: nnx.Embed(1000, 64, rngs=rngs), (64, 64), jnp.int32, True),
    "GELU": Operation(_function(jax.nn.gelu), (64, 64, 256)),
    "sort": Operation(_function(lambda x: jnp.sort(x, axis=-1)), (64, 64, 256)),
}


def training(operation: Operation) -> tuple[Callable[[Any, Any], tuple[Any, None]], Any]:
    """`step(carry, _)`, and the carry to start from: parameters, state and inputs."""
    module = operation.module(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    if operation.whole:
        inputs = jnp.asarray(rng.integers(0, 1000, operation.shape), operation.dtype)
    else:
        inputs = jnp.asarray(rng.normal(size=operation.shape), operation.dtype)
    graph: Any = None
    params: Any = ()
    state: Any = ()
    if isinstance(module, nnx.Module):
        graph, params, *others = nnx.split(module, nnx.Param, ...)
        state = others[0]

    def square(trained: Any, state: Any, tokens: Any) -> tuple[jax.Array, Any]:
        params, inputs = trained
        own = module if graph is None else nnx.merge(graph, params, state, copy=True)
        out = own(tokens if operation.whole else inputs).astype(jnp.float32)
        return jnp.mean(out**2), state if graph is None else nnx.state(own, nnx.Not(nnx.Param))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state, inputs = carry
        trained = (params, None if operation.whole else inputs)
        gradients, state = jax.grad(square, has_aux=True)(trained, state, inputs)
        changed = jax.tree.map(lambda own, gradient: own - (0.01 * gradient).astype(own.dtype), trained, gradients)
        return (changed[0], state, inputs if operation.whole else changed[1]), None

    return step, (params, state, inputs)


def _run(compiled: Callable[[Any], Any], carry: Any) -> None:
    jax.block_until_ready(compiled(carry))


def contestants(name: str, operation: Operation, columns: Sequence[str]) -> dict[str, Contestant]:
    """By column, compiled; seconds are for one step of one seed."""
    step, start = training(operation)
    starts = jax.tree.map(lambda array: jnp.stack([array] * STEPS), start)

    def one(carry: Any) -> Any:
        return step(carry, None)[0]

    def loop(carry: Any) -> Any:
        return jax.lax.scan(step, carry, None, length=STEPS)[0]

    functions: dict[str, tuple[Callable[[Any], Any], Any, int]] = {
        "step": (one, start, 1),
        "scan": (loop, start, STEPS),
        "scan, canonical": (canonical(loop), start, STEPS),
        "scan, no YNN": (canonical(loop), start, STEPS),
        "vmap, each": (jax.vmap(one), starts, STEPS),
        "vmap, canonical, each": (canonical(jax.vmap(one)), starts, STEPS),
    }
    there = {}
    for column in functions.keys() & set(columns):
        function, carry, units = functions[column]
        options = WITHOUT_YNN if "YNN" in column else None
        compiled = jax.jit(function, compiler_options=options).lower(carry).compile()
        there[column] = Contestant(partial(_run, compiled, carry), units)
    if operations_torch is not None and "PyTorch" in columns:
        there["PyTorch"] = Contestant(operations_torch.step(name, operation.shape))
    return there


def row(name: str, seconds: dict[str, list[float]]) -> str:
    """A line of the table: milliseconds, and medians of ratios of one round."""
    cells = [f"{1000 * statistics.median(seconds[column]):.3g}" if column in seconds else "–" for column in COLUMNS]
    for other in ("step", "PyTorch"):
        if other in seconds and "scan, canonical" in seconds:
            low, middle, high = quartiles(ratios(seconds["scan, canonical"], seconds[other]))
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        else:
            cells.append("–")
    return f"| {name} | {' | '.join(cells)} |"


def markdown(kept: dict[str, dict[str, list[float]]]) -> str:
    """All rows, in the order of `OPERATIONS`."""
    heading = [*COLUMNS, "scan, canonical / step", "scan, canonical / PyTorch"]
    rounds = {len(values) for by_column in kept.values() for values in by_column.values()}
    cores = len(os.sched_getaffinity(0))
    lines = [
        "A training step in ms, and medians (quartiles) of ratios of one round; "
        f"{min(rounds)} to {max(rounds)} rounds, "
        f"jax {jax.__version__}, {cores} cores: `python -m benchmarks.operations`",
        "",
        f"| | {' | '.join(heading)} |",
        f"|:--|{'--:|' * len(heading)}",
        *(row(name, kept[name]) for name in OPERATIONS if name in kept),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints and writes Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), metavar="NAME", help="; ".join(OPERATIONS))
    add("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), metavar="NAME", help="; ".join(COLUMNS))
    add("--rounds", type=int, default=7, metavar="N", help="turns of each (default: 7)")
    add("--out", type=Path, default=FOLDER, metavar="DIR", help=f"folder of the table (default: {FOLDER})")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"jax-{jax.__version__}"
    kept: dict[str, dict[str, list[float]]] = {}
    if Path(f"{stem}.json").exists():
        kept = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))["seconds"]
    for name in options.only:
        own = contestants(name, OPERATIONS[name], options.columns)
        kept[name] = take_turns(own, options.rounds, label=name)
        print(row(name, kept[name]), flush=True)
        Path(f"{stem}.md").write_text(markdown(kept), encoding="utf-8")
        facts = {"jax": jax.__version__, "unit": "seconds a step", "seconds": kept}
        Path(f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        jax.clear_caches()


if __name__ == "__main__":
    main()
