"""Trains a grid of distilled students beside two baselines; tells which setting is best, and whether its gain is real.

Any option below but --dataset, --preset, --seeds and --seed may have several values: every combination of them is
trained, with all seeds, and compared, seed by seed, with the same student on hard labels alone and on smoothed labels.
Settings are chosen on a development split (the last 10,000 training images, at most a sixth); the test set is
read once, for the chosen one (of each student, where there are several) and its baselines, which are trained anew with
other seeds for that. A teacher is trained as its students unless a --teacher option says otherwise; where the students'
option is a list, as the preset has it.
"""

from kd_jax.experiments.shell import signals

if __name__ == "__main__":
    signals.end_at_once()

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from kd_jax.data.dataset import development
from kd_jax.data.load import load
from kd_jax.errors import MismatchError
from kd_jax.experiments.notebook import methods
from kd_jax.experiments.notebook import options as config_options
from kd_jax.experiments.notebook.config import Config, check_numbers, make_config
from kd_jax.experiments.shell import command, progress, resume
from kd_jax.experiments.shell import options as cli
from kd_jax.experiments.shell.options import option
from kd_jax.experiments.sweep import grid
from kd_jax.experiments.sweep.grid import Grid
from kd_jax.train.checkpoint import Store

_PROG = "python -m kd_jax.sweep"
_DEFAULT_SMOOTHING = (0.1,)
_EXAMPLES = """\
  python -m kd_jax.sweep --method kd --temperature 1 2 4 8 20 --alpha 0 0.1 0.5 0.9 --seeds 10
  python -m kd_jax.sweep --method kd --temperature 4 --student-hidden 10,10 20,20 50,50 100,100
  python -m kd_jax.sweep --method dkd --method-option beta=1 beta=2 beta=8 temperature=2 temperature=4
  python -m kd_jax.sweep --preset tuned --learning-rate 0.001 0.003 0.01 --label-smoothing 0.05 0.1 0.2

  python -m kd_jax.sweep --out runs/grid --resume     goes on with a sweep that was stopped, with its own options
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Options in, best settings out."""
    command.run_command(_parser(), arguments, _body)


def _parser() -> cli.Parser:
    parser = command.parser(_PROG, __doc__, _EXAMPLES, config_options.presets())
    parser.stray = f"give an option's name before it ({', '.join(map(option, grid.SINGLE))} take one value each)"
    config_options.add_options(parser, single=grid.SINGLE)
    parser.add_argument_group("the second baseline").add_argument(
        "--label-smoothing", type=cli.number, metavar="X", nargs="*", default=argparse.SUPPRESS,
        help="shares of the uniform distribution in the labels; the best counts, no value leaves it out (default: 0.1)",
    )  # fmt: skip
    command.add_output_options(parser, "results.json, results.csv, the tables and the plots")
    return parser


def _body(options: argparse.Namespace, interrupt: signals.Interrupt) -> None:
    if getattr(options, "method", None) == ["list"]:
        print(methods.listing())
        return
    asked = _resolved(options)
    dataset = load(asked.base.dataset)
    split = development(dataset)
    command.prepare_jax()
    from kd_jax.experiments.sweep import files, plan, report, search

    plan.teacher_trials(asked, split)
    plan.student_entries(asked, split)
    grid.first_unused_seed(asked)
    with command.opened(options, f"sweep-{command.as_name(asked.base.dataset)}", _PROG) as store:
        config = asked.base.as_dict()
        identity = resume.identity(dataset, config=config, checkpoint_steps=None) | {"grid": _as_json(asked)}
        if not command.claimed(store, identity, options):
            return
        policy = command.checkpoint_policy(store, interrupt)

        def work() -> tuple[str, str]:
            watcher: Any = progress.Silent()
            if not options.quiet:
                words = plan.words(asked, split)
                watcher = progress.Overall(*plan.costs(asked, split), words, bar=sys.stdout.isatty())
            try:
                result = search.run_sweep(asked, dataset, split, watcher, policy)
            finally:
                if isinstance(watcher, progress.Overall):
                    watcher.close()
            written = files.write(result, dataset, store.folder)
            closing = f"{result.total_s:.0f} s {command.since(options)}. {store.folder}/ has {', '.join(written)}."
            return report.text(result), closing

        command.carry_out(store, options, lambda: report.header(asked, split, store.folder), work)


def _resolved(options: argparse.Namespace) -> Grid:
    """The grid that is asked for; with --resume that of the folder."""
    given = _given(options)
    store = command.check_output_options(options)
    if store is None:
        return _grid(given)
    saved = _saved(store)
    for name, values in given.items():
        if saved.get(name, _default(name)) != values:
            was = saved.get(name, _default(name))
            raise MismatchError(
                f"{option(name)} is {_words(values)}, and the sweep in {store.folder} has {_words(was)}: leave the "
                "option out to go on, or choose another folder"
            )
    return _grid(saved)


def _given(options: argparse.Namespace) -> dict[str, tuple[Any, ...]]:
    """What was given, every option as a list of values."""
    names = [*Config.__dataclass_fields__, "label_smoothing"]
    given = {name: value for name, value in vars(options).items() if name in names}
    lists = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in given.items()}
    if "method" in lists:
        lists["method"] = tuple(config_options.method_name(name) for name in lists["method"])
        check_numbers(lists["method"], lists)
    if "method_option" in lists:
        lists["method_option"] = _combined(sum(lists["method_option"], ()))
    return lists


def _combined(texts: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Every combination of the values that are given for each number of a method: a name that comes twice is a list."""
    names = list(dict.fromkeys(text.partition("=")[0] for text in texts))
    return tuple(itertools.product(*([t for t in texts if t.partition("=")[0] == name] for name in names)))


def _grid(given: dict[str, tuple[Any, ...]]) -> Grid:
    smoothing = given.get("label_smoothing", _DEFAULT_SMOOTHING)
    options = {name: values for name, values in given.items() if name != "label_smoothing"}
    single = {name: values[0] for name, values in options.items() if len(values) == 1}
    lists = {name: values for name, values in options.items() if len(values) > 1}
    return grid.make_grid(make_config(**single), lists, smoothing)


def _default(name: str) -> tuple[Any, ...]:
    return _DEFAULT_SMOOTHING if name == "label_smoothing" else (getattr(Config(), name),)


def _as_json(asked: Grid) -> dict[str, Any]:
    """A grid as JSON keeps it."""
    lists = {name: [list(v) if isinstance(v, tuple) else v for v in values] for name, values in asked.lists.items()}
    return {"lists": lists, "label_smoothing": list(asked.smoothing)}


def _saved(store: Store) -> dict[str, tuple[Any, ...]]:
    """The options of the sweep in the folder. Raises `MismatchError` where it has none."""
    known = store.identity()
    try:
        single = {name: (_frozen(value),) for name, value in known["config"].items()}
        lists = {name: tuple(_frozen(value) for value in values) for name, values in known["grid"]["lists"].items()}
        return single | lists | {"label_smoothing": tuple(known["grid"]["label_smoothing"])}
    except (KeyError, TypeError, AttributeError):
        raise MismatchError(
            f"{store.folder} has no sweep of this kd_jax: go on with the command and the version that started it"
        ) from None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _words(values: tuple[Any, ...]) -> str:
    words = (",".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values)
    return " ".join(words) or "without a value"


if __name__ == "__main__":
    command.as_program(main)
