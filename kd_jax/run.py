"""Trains a teacher, students alone and distilled students; tells what distillation gained, and whether it is real."""

from kd_jax.experiments.shell import signals

if __name__ == "__main__":
    signals.end_at_once()

import argparse
from collections.abc import Sequence

from kd_jax.data.load import load
from kd_jax.errors import ConfigError
from kd_jax.experiments.notebook import methods
from kd_jax.experiments.notebook import options as config_options
from kd_jax.experiments.notebook.config import Config
from kd_jax.experiments.shell import command, resume
from kd_jax.experiments.shell import options as cli

_PROG = "python -m kd_jax.run"
_EXAMPLES = """\
  python -m kd_jax.run                                the notebook's experiment on MNIST, 5 seeds
  python -m kd_jax.run --method kd --temperature 4    Hinton's loss, with T squared
  python -m kd_jax.run --method dkd --method-option beta=2 temperature=4
  python -m kd_jax.run --method list                  every method: paper, needs, numbers
  python -m kd_jax.run --preset tuned --seeds 20      the best recipe found for the notebook's student
  python -m kd_jax.run --preset cifar100              the protocol of the papers on CIFAR-100
  python -m kd_jax.run --dataset idx:FashionMNIST/raw --epochs 10 --out runs/fashion

  python -m kd_jax.run --out runs/fashion --resume    goes on with a run that was stopped, with its own options
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Options in, table out."""
    command.run_command(_parser(), arguments, _body)


def _parser() -> cli.Parser:
    parser = command.parser(_PROG, __doc__, _EXAMPLES, config_options.presets())
    parser.stray = "give an option's name before it, and one value to each (python -m kd_jax.sweep takes lists)"
    config_options.add_options(parser)
    output = command.add_output_options(parser, "results.json, the table, the plots and the parameters")
    output.add_argument(
        "--checkpoint-steps", type=cli.whole, metavar="N",
        help="a checkpoint every N steps of an epoch, and at its end (default: at the end of an epoch, "
        f"{command.CHECKPOINT_PAUSE:g} seconds or more after the one before, and after the first and the last epoch)",
    )  # fmt: skip
    parser.add_argument(
        "--stream", action="store_true",
        help="leaves the training images on the disk, in the cache, and reads the next ones while some train: "
        "for data that is larger than memory; the results are the same, to rounding",
    )  # fmt: skip
    return parser


def _body(options: argparse.Namespace, interrupt: signals.Interrupt) -> None:
    if getattr(options, "method", None) == "list":
        print(methods.listing())
        return
    config, every = _resolved(options)
    dataset = load(config.dataset, stream=True) if options.stream else load(config.dataset)
    command.prepare_jax()
    from kd_jax.experiments.notebook import experiment, fits, recipes, report
    from kd_jax.train.resume import digest

    fits.check(config, dataset)
    with command.opened(options, f"{command.as_name(config.dataset)}-{config.preset}", _PROG) as store:
        given = recipes.given_teacher(config, dataset)
        own = {} if given is None else {"teacher_sha256": digest(given.variables)}
        identity = resume.identity(dataset, config=config.as_dict(), checkpoint_steps=every, **own)
        if not command.claimed(store, identity, options):
            return
        policy = command.checkpoint_policy(store, interrupt, every)

        def work() -> tuple[str, str]:
            watcher = command.watcher(options)
            result = experiment.run_experiment(config, dataset, watcher, policy)
            files = report.write(result, dataset, store.folder)
            explanation = "" if options.quiet else report.explanation(result)
            text = "\n\n".join(filter(None, (report.table(result), explanation, report.conclusion(result))))
            return text, f"{result.total_s:.0f} s {command.since(options)}. {store.folder}/ has {', '.join(files)}."

        command.carry_out(store, options, lambda: f"{report.header(config, dataset, store.folder)}\nCompiling.", work)


def _resolved(options: argparse.Namespace) -> tuple[Config, int | None]:
    """The configuration and the checkpoint steps; with --resume those of the run in the folder."""
    given, every = config_options.given(options), options.checkpoint_steps
    if every is not None and every < 1:
        raise ConfigError(f"--checkpoint-steps is {every}: it must be at least 1")
    store = command.check_output_options(options)
    return config_options.saved(store, given, every) if store else (config_options.config_of(given), every)


if __name__ == "__main__":
    command.as_program(main)
