"""How fast kd_jax is: against the notebook in PyTorch, tuned PyTorch, Keras 3 on JAX, and the limit of the machine.

Contestants take turns on one machine in one run, so that their ratios mean something where the machine is shared. The
sections: `steps` (one step at batch 32), `networks` (one of convolutional networks), `language` (one of a language
model, and sampling), `batches` (32 to 4096), `end-to-end` (the whole notebook as a process), `evaluation` (the test
set), `seeds` (students a second when many train together), `memory`, and `xla` (what compiler flags and unrolling
change; only when named).
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

import kd_jax
from benchmarks import end_to_end, language, memory, networks, report, seeds, steps, xla
from benchmarks.measure import Setting, Table
from benchmarks.steps import has_torch, torch_of
from kd_jax.experiments.shell.options import Parser

SECTIONS: dict[str, Callable[[Setting], list[Table]]] = {
    "steps": steps.steps,
    "networks": networks.networks,
    "language": language.language,
    "batches": steps.batches,
    "end-to-end": end_to_end.end_to_end,
    "evaluation": steps.evaluation,
    "seeds": seeds.seeds,
    "memory": memory.memory,
    "xla": xla.xla,
}
_USUAL = tuple(name for name in SECTIONS if name != "xla")
_QUICK_ROUNDS, _ROUNDS, _WHOLE_ROUNDS = 3, 30, 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and, with --out, keeps them; each section as soon as it is done."""
    options = _parser().parse(arguments)
    rounds = options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS)
    whole = options.whole_rounds or (1 if options.quick else _WHOLE_ROUNDS)
    # Else JAX takes most of a GPU's memory at once, and PyTorch and the processes that are timed find none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.config.values["jax_default_matmul_precision"] is None:
        # As `kd_jax.run` does, and as PyTorch does by default: float32 products on every device.
        jax.config.update("jax_default_matmul_precision", "highest")
    facts = report.environment()
    if options.torch_python and not {"networks", "language"} & {*(options.only or _USUAL)}:
        raise SystemExit("kd_jax: --torch-python is for the sections networks and language: name one of them, or none")
    if options.torch_python:
        facts["PyTorch apart"] = torch_of(options.torch_python)
    setting = Setting(kd_jax.load("mnist"), rounds, whole, options.quick, options.torch_python)
    command = shlex.join(["python", "-m", "benchmarks.throughput", *(sys.argv[1:] if arguments is None else arguments)])
    tables: list[Table] = []
    for name in options.only or _USUAL:
        started = time.perf_counter()
        made = SECTIONS[name](setting)
        tables += made
        facts[f"{name} took"] = f"{time.perf_counter() - started:.0f} s"
        print("\n".join(report.markdown(table) for table in made), flush=True)
        if options.out:
            report.write(tables, facts, command, options.out)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="every section in small: at most 3 minutes on 2 cores")
    parser.add_argument(
        "--rounds", type=_rounds, metavar="N",
        help=f"rounds of single steps to take turns in (default: {_ROUNDS}, quick: {_QUICK_ROUNDS}); a third of them "
        "elsewhere",
    )  # fmt: skip
    parser.add_argument(
        "--whole-rounds", type=_whole, metavar="N", help=f"rounds of whole runs (default: {_WHOLE_ROUNDS}, quick: 1)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION",
        help=f"these sections, of {', '.join(SECTIONS)} (default: all but xla)",
    )  # fmt: skip
    parser.add_argument(
        "--torch-python", type=_python, metavar="PYTHON",
        help="another Python, whose PyTorch the sections networks and language measure (default: this one)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=_folder, metavar="DIR", help="folder for throughput.md, throughput.json and throughput.png"
    )
    return parser


def _rounds(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is too few rounds for a spread: give a whole number of at least 2")
    return int(text)


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds: give a whole number of at least 1")
    return int(text)


def _python(text: str) -> str:
    # Not resolved: a virtual environment's Python is a link. Made whole, as it is started from another folder.
    python = os.path.abspath(shutil.which(text) or text)
    if not has_torch(python):
        raise argparse.ArgumentTypeError(f"{text!r} is no Python that has PyTorch, JAX and what kd_jax needs: name one")
    return python


def _folder(text: str) -> Path:
    path = Path(text)
    if not text or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder: name one, such as results/throughput")
    return path


if __name__ == "__main__":
    main()
