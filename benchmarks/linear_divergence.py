"""The loss of hidden states and heads, `kd.losses.linear_divergence`, against the same loss from all logits.

Memory is XLA's own analysis of the compiled value and gradient: temporaries, without arguments and results. Seconds are
of rounds in which all forms take turns; ratios are within a round. Processor seconds add up the cores, and tell more
where other programs share them. The plain forms: "log-softmaxes", the shortest that
JAX can write, and `kd.losses.kd`, which keeps more digits.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kd_jax as kd
from benchmarks import report
from benchmarks.measure import Contestant, quartiles, ratios, take_turns

_GPU: dict[str, Any] = {"tokens": 8192, "vocabulary": 128256, "widths": [2048, 4096], "dtype": "bfloat16"}
_CPU: dict[str, Any] = {"tokens": 2048, "vocabulary": 32768, "widths": [256, 320], "dtype": "float32"}
_FUSED, _PLAIN = "linear_divergence", "log-softmaxes"

Loss = Callable[..., jax.Array]


def forms(divergence: str, chunk: int | None) -> dict[str, Loss]:
    """Sums over the tokens of the divergence at temperature 1, by (student's hidden, head, teacher's hidden, head)."""

    def fused(*arrays: jax.Array) -> jax.Array:
        return kd.losses.linear_divergence(*arrays, divergence=divergence, chunk=chunk)[0]

    def whole(loss: Loss, h: jax.Array, w: jax.Array, ht: jax.Array, wt: jax.Array) -> jax.Array:
        product = partial(jnp.matmul, preferred_element_type=jnp.float32)
        return jnp.sum(loss(product(h, w), product(ht, wt)))

    name = "kd" if divergence == "kl" else divergence
    found: dict[str, Loss] = {_FUSED: fused}
    if divergence == "kl":
        found[_PLAIN] = partial(whole, _log_softmaxes)
    numbers = {"temperature": 1.0} if divergence == "kl" else {}
    return found | {f"kd.losses.{name}": partial(whole, partial(getattr(kd.losses, name), **numbers))}


def _log_softmaxes(student: jax.Array, teacher: jax.Array) -> jax.Array:
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def arrays(tokens: int, vocabulary: int, widths: Sequence[int], dtype: Any) -> list[jax.Array]:
    """Hidden states of about 1 and heads whose logits have a standard deviation of about 3, of both networks."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    made = []
    for width in widths:
        made.append(jax.random.normal(next(keys), (tokens, width), dtype))
        made.append((3 / width**0.5 * jax.random.normal(next(keys), (width, vocabulary))).astype(dtype))
    return made


def measure(given: list[jax.Array], losses: dict[str, Loss], rounds: int) -> dict[str, dict[str, Any]]:
    """By form: bytes of temporaries and results, and seconds of each round."""
    compiled: dict[str, Any] = {}
    for name, loss in losses.items():
        try:
            compiled[name] = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*given).compile()
            jax.block_until_ready(compiled[name](*given))
        except jax.errors.JaxRuntimeError as error:
            print(f"{name} does not run here: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            compiled.pop(name, None)
    processor: dict[str, list[float]] = {name: [] for name in compiled}

    def run(name: str) -> None:
        started = time.process_time()
        jax.block_until_ready(compiled[name](*given))
        processor[name].append(time.process_time() - started)

    runs = {name: Contestant(partial(run, name)) for name in compiled}
    seconds = take_turns(runs, rounds, label="linear_divergence", warm=False)
    analyses = {name: program.memory_analysis() for name, program in compiled.items()}
    return {
        name: {
            "temporary bytes": analyses[name].temp_size_in_bytes,
            "result bytes": analyses[name].output_size_in_bytes,
            "seconds": seconds[name],
            "processor seconds": processor[name],
        }
        for name in compiled
    }


def markdown(found: dict[str, dict[str, Any]], title: str) -> str:
    """A table: memory and time, and the ratios of `linear_divergence` to each plain form."""
    heads = ("form", "temporaries, MB", "seconds", "memory, ratio", "time, ratio", "processor time, ratio")
    lines = [f"## {title}\n", f"| {' | '.join(heads)} |", "|:--|--:|--:|--:|--:|--:|"]
    fused = found[_FUSED]
    for name, row in found.items():
        size = row["temporary bytes"]
        cells = [name, f"{size / 1e6:.1f}", f"{quartiles(row['seconds'])[1]:.4g}", "", "", ""]
        if name != _FUSED:
            cells[3] = f"{fused['temporary bytes'] / size:.3f}"
            for place, kind in ((4, "seconds"), (5, "processor seconds")):
                low, middle, high = quartiles(ratios(fused[kind], row[kind]))
                cells[place] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes `linear-divergence.{json,md}` into `--out`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_divergence", description=__doc__)
    parser.add_argument(
        "--gpu", action="store_true", help="8,192 tokens, 128,256 columns, widths 2,048 and 4,096, bf16"
    )
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--widths", type=int, nargs=2, metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--divergence", default="kl", choices=("kl", "reverse_kl", "jsd", "skew_kl", "total_variation"))
    parser.add_argument("--chunk", type=int, nargs="+", default=[0], help="tokens at a time; 0 for the default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fused-only", action="store_true", help="without the plain forms, which may not fit")
    parser.add_argument("--out", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    chosen = {name: getattr(options, name) or usual for name, usual in (_GPU if options.gpu else _CPU).items()}
    jax.config.update("jax_default_matmul_precision", "highest")
    command = shlex.join(
        ["python", "-m", "benchmarks.linear_divergence", *(sys.argv[1:] if arguments is None else arguments)]
    )
    facts = report.environment()
    given = arrays(**chosen)
    tables, texts = {}, []
    for chunk in options.chunk:
        losses = forms(options.divergence, chunk or None)
        losses = {_FUSED: losses[_FUSED]} if options.fused_only else losses
        title = (
            f"{options.divergence}: {chosen['tokens']:,} tokens, {chosen['vocabulary']:,} columns, widths "
            f"{' and '.join(f'{width:,}' for width in chosen['widths'])}, {chosen['dtype']}, "
            + (f"chunks of {chunk}" if chunk else "the default chunk")
        )
        tables[title] = measure(given, losses, options.rounds)
        texts.append(markdown(tables[title], title))
        print(texts[-1], flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            content = {"command": command, "environment": facts, "tables": tables}
            (options.out / "linear-divergence.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            machine = "\n".join(f"- {name}: {value}" for name, value in facts.items())
            text = (
                f"`{command}`\n\n{' '.join(__doc__.split())}\n\n"
                + "\n".join(texts)
                + f"\n## The machine\n\n{machine}\n"
            )
            (options.out / "linear-divergence.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
