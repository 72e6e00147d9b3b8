"""Trains a teacher, students alone and distilled students; tells what distillation gained, and whether it is real."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kd_jax.data.dataset import Dataset, load
from kd_jax.experiments.notebook.config import Config, ConfigError, make_config
from kd_jax.experiments.shell import command, resume
from kd_jax.experiments.shell import options as cli
from kd_jax.experiments.shell.signals import Interrupt

if TYPE_CHECKING:
    from kd_jax.experiments import stage as phase

_PROG = "python -m kd_jax.run"
_EXAMPLES = """\
  python -m kd_jax.run                                the notebook's experiment on MNIST, 5 seeds
  python -m kd_jax.run --method kd --temperature 4    Hinton's loss, with T squared
  python -m kd_jax.run --preset tuned --seeds 20      the best recipe found for the notebook's student
  python -m kd_jax.run --dataset idx:FashionMNIST/raw --epochs 10 --out runs/fashion

  python -m kd_jax.run --out runs/fashion --resume    goes on with a run that was stopped, with its own options
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Options in, table out."""
    command.run(_parser(), arguments, _body)


def _parser() -> cli.Parser:
    parser = command.parser(_PROG, __doc__, _EXAMPLES, cli.presets())
    parser.stray = "give an option's name before it, and one value to each (python -m kd_jax.sweep takes lists)"
    cli.add_config_options(parser)
    output = command.add_output_options(parser, "results.json, the table, the plots and the parameters")
    output.add_argument(
        "--checkpoint-steps", type=cli.whole, metavar="N",
        help="a checkpoint every N steps of an epoch, and at its end (default: at the end of an epoch, "
        f"{command.CHECKPOINT_PAUSE:g} seconds or more after the one before, and after the first and the last epoch)",
    )  # fmt: skip
    return parser


def _body(options: argparse.Namespace, interrupt: Interrupt) -> None:
    config, every = _resolved(options)
    dataset = load(config.dataset)
    command.prepare_jax()
    from kd_jax.experiments.notebook import experiment, report

    experiment.check(config, dataset)
    with command.opened(options, f"{command.as_name(config.dataset)}-{config.preset}", _PROG) as store:
        identity = resume.identity(config, dataset, report.environment(), every)
        if command.claimed(store, identity, options, report.RESULTS, report.TABLE):
            _train(config, dataset, options, command.keeping(store, interrupt, every))


def _resolved(options: argparse.Namespace) -> tuple[Config, int | None]:
    """The configuration and the checkpoint steps; with --resume those of the run in the folder."""
    given, every = cli.config_options(options), options.checkpoint_steps
    if every is not None and every < 1:
        raise ConfigError(f"--checkpoint-steps is {every}: it must be at least 1")
    store = command.check_output_options(options)
    return resume.saved_options(store, given, every) if store else (make_config(**given), every)


def _train(config: Config, dataset: Dataset, options: argparse.Namespace, keeping: "phase.Keeping") -> None:
    from kd_jax.experiments.notebook import experiment, report
    from kd_jax.experiments.shell import progress

    assert keeping.store is not None
    folder = keeping.store.folder
    bars = progress.Bars if sys.stdout.isatty() else progress.Lines
    watcher = progress.Silent() if options.quiet else bars()
    with command.telling_failures(keeping.store):
        if not options.quiet:
            print(f"{report.header(config, dataset, folder)}\nCompiling.", flush=True)
        result = experiment.run(config, dataset, watcher, keeping)
        files = report.write(result, dataset, folder)
        keeping.store.finish()
    explanation = "" if options.quiet else report.explanation(result)
    text = "\n" + "\n\n".join(filter(None, (report.table(result), explanation, report.conclusion(result))))
    if not options.quiet:
        text += f"\n\n{result.total_s:.0f} s {command.since(options)}. {folder}/ has {', '.join(files)}."
    command.say(text, folder / report.TABLE)


if __name__ == "__main__":
    command.as_program(main)
