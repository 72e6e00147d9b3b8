"""Trains a teacher, students alone and distilled students; tells what distillation gained, and whether it is real."""

import argparse
import contextlib
import datetime
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_jax import cache, cli
from kd_jax.config import Config, ConfigError, make_config
from kd_jax.data import DataError, Dataset, load

_EPILOG = """\
examples:
  python -m kd_jax.run                                the notebook's experiment on MNIST, 5 seeds
  python -m kd_jax.run --method kd --temperature 4    Hinton's loss, with T squared
  python -m kd_jax.run --dataset idx:FashionMNIST/raw --epochs 10 --out runs/fashion

exit codes: 0 done, 1 the run failed (a loss that is not finite, say), 2 bad input or options, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Options in, table out."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _make_stdout_patient()
    options = _parser().parse(arguments)
    try:
        config = make_config(**cli.config_options(options))
        dataset = load(config.dataset)
        _run(config, dataset, options)
    except BrokenPipeError:
        # Whoever read the output has gone, with `head` for example; Python would complain again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ConfigError, DataError) as error:
        cli.fail(str(error), code=2)
    except KeyboardInterrupt:
        print("kd_jax: interrupted: there are no results, so run it again", file=sys.stderr, flush=True)
        # Not sys.exit, which would wait for what is still being compiled.
        os._exit(130)


def _make_stdout_patient() -> None:
    """A standard output that is closed, or cannot write ±, is no reason to lose a run."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m kd_jax.run",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cli.add_config_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=_folder, metavar="DIR",
        help="folder for results.json, the table, the plots and the parameters (default: a new one under runs/)",
    )  # fmt: skip
    output.add_argument("--overwrite", action="store_true", help="replace the results that DIR already holds")
    output.add_argument("--quiet", action="store_true", help="print only the table and the conclusion")
    return parser


def _run(config: Config, dataset: Dataset, options: argparse.Namespace) -> None:
    import jax

    from kd_jax import experiment, progress, report

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        cli.fail(f"JAX_PLATFORMS is {asked!r}, and JAX finds no such device ({error}): unset it, or use cpu", code=2)
    if jax.config.values["jax_default_matmul_precision"] is None:
        # Else GPUs and TPUs would round the factors of a product to fewer digits than float32 has.
        jax.config.update("jax_default_matmul_precision", "highest")
    cache.keep_compiled_programs()
    experiment.check(config, dataset)
    try:
        folder = options.out or report.new_folder(_folder_name(config))
        made = report.claim(folder, overwrite=options.overwrite) if options.out else True
    except report.OutputError as error:
        cli.fail(str(error), code=2)
    bars = progress.Bars if sys.stdout.isatty() else progress.Lines
    watcher = progress.Silent() if options.quiet else bars()
    try:
        if not options.quiet:
            print(f"{_header(config, dataset, folder)}\nCompiling.", flush=True)
        result = experiment.run(config, dataset, watcher)
        files = report.write(result, dataset, folder)
    except (experiment.RunError, report.OutputError) as error:
        cli.fail(str(error), code=1)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        cli.fail(
            f"the device gave up ({reason}): use fewer --seeds, a smaller --batch-size or smaller networks", code=1
        )
    finally:
        if made:
            # Leaves a folder that holds anything.
            with contextlib.suppress(OSError):
                folder.rmdir()
    text = f"\n{report.table(result)}\n\n{report.conclusion(result)}"
    if not options.quiet:
        text += f"\n\n{result.total_s:.0f} s in all. {folder}/ has {', '.join(files)}."
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        cli.fail(f"the table cannot be printed ({error.strerror}): it is in {folder}/results.md, too", code=1)


def _header(config: Config, dataset: Dataset, folder: Path) -> str:
    import jax

    from kd_jax import experiment, report

    teacher = "-".join(map(str, experiment.layer_sizes(config.teacher_hidden, dataset)))
    student = "-".join(map(str, experiment.layer_sizes(config.student_hidden, dataset)))
    environment = report.environment()
    steps = len(dataset.train_labels) // config.batch_size
    last = config.seed + config.seeds - 1
    seeds = f"{config.seeds} seeds ({config.seed} to {last})" if config.seeds > 1 else f"1 seed ({config.seed})"
    epochs = "epochs" if config.epochs > 1 else "epoch"
    of = f", the first of {len(jax.devices())}" if len(jax.devices()) > 1 else ""
    image = " × ".join(map(str, dataset.image_shape))
    lines = {
        "data": f"{dataset.name}, {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images "
        f"of {image}, {dataset.classes} classes",
        "teacher": f"{teacher}, dropout {config.teacher_dropout:g}",
        "students": f"{student}, {seeds}, alone and distilled",
        "method": f"{config.method}, alpha {config.alpha:g}, temperature {config.temperature:g}",
        "training": f"{config.epochs} {epochs} of {steps:,} steps, batch {config.batch_size}, "
        f"Adam {config.learning_rate:g}",
        "device": f"{environment['devices'][0]}{of} ({environment['cpus']} CPUs), jax {environment['packages']['jax']}",
        "results": f"{folder}/",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder: name one, such as runs/mine")
    return Path(text)


def _folder_name(config: Config) -> str:
    source = "".join(c if c.isascii() and c.isalnum() else "-" for c in config.dataset).strip("-")[-40:]
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{source}-{config.preset}-{moment}"


if __name__ == "__main__":
    main()
