"""Section `xla`: what XLA's flags and the unrolling of the loop over steps change; each variant is a process.

`python -m benchmarks.xla --unroll N` is such a process: it prints milliseconds for a step of each row as JSON.
"""

import argparse
import json
import os
import statistics
from typing import NamedTuple

import jax
from tqdm import tqdm

import kd_jax
from benchmarks import kd_jax_ways, processes
from benchmarks.measure import Figures, Setting, Table, take_turns
from benchmarks.steps import ROWS, count
from kd_jax.train import fit as loops


class Variant(NamedTuple):
    """A name, flags for XLA, and steps in each turn of the loop; None leaves those of kd_jax."""

    name: str
    flags: str = ""
    unroll: int | None = None


_BASE = "kd_jax"
_WHILE = "--xla_gpu_enable_command_buffer=+WHILE"
VARIANTS = {
    "gpu": (
        Variant(_BASE),
        Variant("while loop in a command buffer", _WHILE),
        Variant("command buffer, unroll 5", _WHILE, 5),
        Variant("no command buffers", "--xla_gpu_enable_command_buffer="),
        Variant("unroll 1", unroll=1),
        Variant("unroll 5", unroll=5),
        Variant("unroll 15", unroll=15),
        Variant("unroll 25", unroll=25),
        Variant("no Triton products", "--xla_gpu_enable_triton_gemm=false"),
    ),
    "cpu": (
        Variant(_BASE),
        Variant("unroll 1", unroll=1),
        Variant("unroll 4", unroll=4),
        Variant("unroll 8", unroll=8),
        Variant("one thread for products", "--xla_cpu_multi_thread_eigen=false"),
        Variant("fast mathematics", "--xla_cpu_enable_fast_math=true"),
        Variant("concurrent scheduler", "--xla_cpu_enable_concurrency_optimized_scheduler=true"),
        Variant("vectors of 512 bits", "--xla_cpu_prefer_vector_width=512"),
    ),
}


def xla(setting: Setting) -> list[Table]:
    """Milliseconds for a step at batch 32 with each variant, in rounds of processes."""
    backend = jax.default_backend()
    variants = VARIANTS.get(backend, (Variant(_BASE), Variant("unroll 1", unroll=1), Variant("unroll 4", unroll=4)))
    variants = variants[:2] if setting.quick else variants
    rounds = 1 if setting.quick else 2 if backend == "gpu" else 5
    figures: Figures = {row: {} for row in ROWS.values()}
    notes = [
        f"{rounds} round{'s' if rounds > 1 else ''} of processes, the median of 5 turns in each; start-up and "
        "compilation are left out"
    ]
    working = list(variants)
    for _ in range(rounds):
        for variant in tqdm(list(working), desc="xla", leave=False, disable=None):
            try:
                found = _measure(variant)
            except processes.ProcessError as error:
                notes.append(f"{variant.name} does not run here: {error}")
                working.remove(variant)
                continue
            for row, milliseconds in found.items():
                figures[ROWS[row]].setdefault(variant.name, []).append(milliseconds)
    complete = {
        row: {name: values for name, values in by_column.items() if len(values) == rounds}
        for row, by_column in figures.items()
    }
    notes += [f"{variant.name}: `{variant.flags}`" for variant in working if variant.flags]
    title = f"XLA's flags and unrolling, on the {backend}: one training step, batch 32"
    return [Table("xla", title, "ms", complete, tuple(notes), turned=True)]


def _measure(variant: Variant) -> dict[str, float]:
    unroll = [] if variant.unroll is None else ["--unroll", str(variant.unroll)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {variant.flags}".strip()
    finished = processes.run(["-m", "benchmarks.xla", *unroll], mark="{", environment={"XLA_FLAGS": flags})
    return json.loads(finished.output[-1])


def main() -> None:
    """One variant: milliseconds for a step of each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unroll", type=int, help="steps in each turn of the loop (default: as kd_jax has it)")
    options = parser.parse_args()
    if options.unroll is not None:
        loops._UNROLL = loops._UNROLL_SMALL = options.unroll
    jax.config.update("jax_default_matmul_precision", "highest")
    data, found = kd_jax.load("mnist"), {}
    for row in ROWS:
        job = kd_jax_ways.job(row, data)
        steps = count(row, "kd_jax", 32, job.per_epoch)
        contestant = kd_jax_ways.contestant(kd_jax_ways.Trainer(job), steps)
        found[row] = 1000 * statistics.median(take_turns({row: contestant}, 5, label=row)[row])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
