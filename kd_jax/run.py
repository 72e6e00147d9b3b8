"""Trains a teacher, students alone and distilled students; tells what distillation gained, and whether it is real."""

import argparse
import datetime
import os
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
    options = _parser().parse(arguments)
    try:
        config = make_config(**cli.config_options(options))
        folder = options.out or _default_folder(config)
        dataset = load(config.dataset)
        config.check_against(len(dataset.train_labels))
        _run(config, dataset, folder, options)
    except BrokenPipeError:
        # Whoever read the output has gone, with `head` for example; Python would complain again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ConfigError, DataError) as error:
        cli.fail(str(error), code=2)
    except KeyboardInterrupt:
        cli.fail("interrupted: there are no results, so run it again", code=130)


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
        "--out", type=Path, metavar="DIR",
        help="folder for results.json, the table, the plots and the parameters (default: a new one under runs/)",
    )  # fmt: skip
    output.add_argument("--overwrite", action="store_true", help="replace the results that DIR already holds")
    output.add_argument("--quiet", action="store_true", help="print only the table and the conclusion")
    return parser


def _run(config: Config, dataset: Dataset, folder: Path, options: argparse.Namespace) -> None:
    import jax

    from kd_jax import experiment, progress, report

    experiment.check_memory(config, dataset)
    made = not folder.exists()
    try:
        report.claim(folder, overwrite=options.overwrite)
    except report.OutputError as error:
        cli.fail(str(error), code=2)
    cache.keep_compiled_programs()
    bars = progress.Bars if sys.stdout.isatty() else progress.Lines
    watcher = progress.Silent() if options.quiet else bars()
    try:
        if not options.quiet:
            print(_header(config, dataset, folder), flush=True)
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
        if made and not any(folder.iterdir()):
            folder.rmdir()
    print(f"\n{report.table(result)}\n\n{report.conclusion(result)}")
    if not options.quiet:
        print(f"\n{result.total_s:.0f} s in all. {folder}/ has {', '.join(files)}.")


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
    image = " × ".join(map(str, dataset.image_shape))
    lines = {
        "data": f"{dataset.name}, {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images "
        f"of {image}, {dataset.classes} classes",
        "teacher": f"{teacher}, dropout {config.teacher_dropout:g}",
        "students": f"{student}, {seeds}, alone and distilled",
        "method": f"{config.method}, alpha {config.alpha:g}, temperature {config.temperature:g}",
        "training": f"{config.epochs} {epochs} of {steps:,} steps, batch {config.batch_size}, "
        f"Adam {config.learning_rate:g}",
        "device": f"{len(jax.devices())} × {environment['devices'][0]} ({environment['cpus']} CPUs), "
        f"jax {environment['packages']['jax']}",
        "results": f"{folder}/",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def _default_folder(config: Config) -> Path:
    source = "".join(c if c.isalnum() else "-" for c in config.dataset).strip("-")[-40:]
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{source}-{config.preset}-{moment}"


if __name__ == "__main__":
    main()
