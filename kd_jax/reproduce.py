"""Tables with several seeds: hinton2015 is Hinton, Vinyals and Dean (2015), section 3, MNIST; methods has all methods.

cifar100 is the table that papers on distillation compare by, on CIFAR-100: for whoever has the data and a GPU.
"""

from kd_jax.experiments.shell import signals

if __name__ == "__main__":
    signals.end_at_once()

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kd_jax.data.load import load
from kd_jax.errors import ConfigError, MismatchError
from kd_jax.experiments.cifar100 import door as cifar100
from kd_jax.experiments.hinton2015 import plan as hinton
from kd_jax.experiments.methods import door as methods
from kd_jax.experiments.notebook.config import make_config
from kd_jax.experiments.shell import command, resume
from kd_jax.experiments.shell import options as cli
from kd_jax.train.checkpoint import Store

if TYPE_CHECKING:
    pass

_PROG = "python -m kd_jax.reproduce"
_TABLES = ("hinton2015", cifar100.NAME, methods.NAME)
_EXAMPLES = """\
  python -m kd_jax.reproduce hinton2015 --out runs/hinton         the paper's rows: hours on two CPU cores
  python -m kd_jax.reproduce hinton2015 --quick                   the same with 3 seeds and fewer epochs
  python -m kd_jax.reproduce hinton2015 --rows alone distilled    what distillation gains

  python -m kd_jax.reproduce hinton2015 --out runs/hinton --resume              goes on with what was stopped
  python -m kd_jax.reproduce hinton2015 --out runs/hinton --resume --rows no3   adds a row to a folder

  python -m kd_jax.reproduce cifar100 --pairs resnet32x4-resnet8x4 --methods kd dkd     one pair, two methods

  python -m kd_jax.reproduce methods --quick                      all methods on MNIST, 3 seeds
  python -m kd_jax.reproduce methods --dataset idx:DIR --methods dkd at crd     three of them on other images
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Options in, table out."""
    command.run_command(_parser(), arguments, _body)


def _parser() -> cli.Parser:
    parser = command.parser(_PROG, __doc__, _EXAMPLES)
    parser.add_argument("table", nargs="?", metavar="TABLE", help=f"what is made: {' or '.join(_TABLES)}")
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--rows",
        nargs="*",
        metavar="ROW",
        help=f"some of {', '.join(hinton.ROWS)} (default: all but the last two; the teacher always). The last "
        "two are not in the paper. averaged: students taught by the mean of the teacher's logits over shifts of the "
        "image; shifted: students, alone and distilled, that see shifted images as the teacher does",
    )
    what.add_argument("--pairs", nargs="*", metavar="PAIR", help=cifar100.help_of_pairs())
    what.add_argument(
        "--methods",
        nargs="*",
        metavar="NAME",
        help=f"of cifar100: some of {', '.join(cifar100.METHODS)} (default: all; students alone always); of "
        "methods: some of those that python -m kd_jax.run --method list shows (default: all; none and kd always)",
    )
    what.add_argument(
        "--dataset",
        metavar="SOURCE",
        help="of cifar100: other images than tfds:cifar100; of methods: other ones than mnist",
    )
    what.add_argument(
        "--seeds",
        type=cli.whole,
        metavar="N",
        help=f"students of each kind; all have one teacher; {cifar100.table.SEEDS} for cifar100 "
        f"(default: {hinton.SEEDS})",
    )
    what.add_argument(
        "--seed", type=cli.whole, metavar="N", help=f"first seed; the teacher's seed, too (default: {hinton.SEED})"
    )
    what.add_argument(
        "--quick",
        action="store_true",
        help=f"fewer epochs, and {hinton.QUICK_SEEDS} seeds where --seeds is not given: for a first look",
    )
    command.add_output_options(parser, "results.json, results.csv, the table, the plots and the teacher's parameters")
    return parser


def _body(options: argparse.Namespace, interrupt: signals.Interrupt) -> None:
    if options.rows:
        options.rows = [row for given in options.rows for row in given.split(",") if row]
    if options.table is None and options.rows and options.rows[-1] in _TABLES:
        # A table after the rows is no row.
        options.table = options.rows.pop()
    for name in ("pairs", "methods"):
        if options.table is None and (getattr(options, name) or [""])[-1] in _TABLES:
            options.table = getattr(options, name).pop()
    if options.table is None and options.resume and options.out:
        options.table = _table_in(options)
    if options.table not in _TABLES:
        given = "no table is given" if options.table is None else f"unknown table {options.table!r}"
        raise ConfigError(f"{given}: use {' or '.join(_TABLES)}")
    if options.table == methods.NAME:
        if options.rows is not None or options.pairs is not None:
            name = "pairs" if options.rows is None else "rows"
            raise ConfigError(f"--{name} is of another table: use --methods to choose those of {methods.NAME}")
        return methods.body(options, interrupt, _PROG)
    if options.table == cifar100.NAME:
        if options.rows is not None:
            raise ConfigError("--rows is of the table hinton2015: cifar100 has --pairs and --methods")
        return cifar100.body(options, interrupt, _PROG)
    for name in ("pairs", "methods", "dataset"):
        if getattr(options, name) is not None:
            of = cifar100.NAME if name == "pairs" else f"{cifar100.NAME}, and of {methods.NAME}"
            raise ConfigError(f"--{name} is of the table {of}: leave it out")
    if options.rows == []:
        raise ConfigError(f"--rows is given without a row: use some of {', '.join(hinton.ROWS)}")
    for row in options.rows or ():
        if row not in hinton.ROWS:
            raise ConfigError(f"unknown row {row!r}: use some of {', '.join(hinton.ROWS)}")
    twice = next((row for row in options.rows or () if options.rows.count(row) > 1), None)
    if twice:
        raise ConfigError(f"--rows has {twice} twice: give each row once")
    settings = _settings(options)
    dataset = load("mnist")
    command.prepare_jax()
    from kd_jax.experiments.hinton2015 import files, report
    from kd_jax.experiments.hinton2015 import rows as hinton_rows

    plan = _plan(settings)
    with command.opened(options, options.table, f"{_PROG} {options.table}") as store:
        identity = resume.identity(dataset, config=hinton.as_dict(plan), table=options.table, settings=settings)
        kept = hinton_rows.KeptRows(store.folder, identity)
        rows = _rows(options, store)
        hinton_rows.check(rows, plan, dataset, kept)
        if not command.claimed_with_parts(
            store, identity, options, kept, name="rows",
            complete=lambda: hinton_rows.complete(rows, plan, dataset, kept),
        ):  # fmt: skip
            return
        policy = command.checkpoint_policy(store, interrupt)

        def work() -> tuple[str, str]:
            results = hinton_rows.run_rows(rows, plan, dataset, command.watcher(options), policy, kept)
            written = files.write(results, plan, dataset, store.folder)
            return report.text(results, plan, dataset), f"{store.folder}/ has {', '.join(written)}."

        command.carry_out(
            store, options, lambda: f"{report.header(rows, plan, dataset, store.folder)}\nCompiling.", work
        )


def _table_in(options: argparse.Namespace) -> str | None:
    """The table of the folder to go on with, if there is one."""
    store = command.check_output_options(options)
    table = store.identity().get("table") if store else None
    return table if table in _TABLES else None


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The seeds and whether it is quick; with --resume those of the run in the folder.

    Raises `ConfigError`, and `MismatchError` where options that are given differ from the folder's.
    """
    given = {"seeds": options.seeds, "seed": options.seed, "quick": options.quick or None}
    given = {name: value for name, value in given.items() if value is not None}
    make_config(**{name: value for name, value in given.items() if name != "quick"})
    store = command.check_output_options(options)
    if store is None:
        seeds = hinton.QUICK_SEEDS if options.quick else hinton.SEEDS
        return {"seeds": seeds, "seed": hinton.SEED, "quick": options.quick} | given
    saved = store.identity()
    if saved.get("table") != options.table:
        raise MismatchError(f"{store.folder} has another run: choose another folder for {options.table}")
    for name, value in given.items():
        if saved["settings"].get(name) != value:
            raise MismatchError(
                f"--{name} is {value}, and the run in {store.folder} has {saved['settings'].get(name)}: "
                "leave the option out to go on, or choose another folder"
            )
    return dict(saved["settings"])


def _plan(settings: dict[str, Any]) -> hinton.Plan:
    plan = hinton.PLAN._replace(seeds=settings["seeds"], seed=settings["seed"])
    return hinton.quick(plan) if settings["quick"] else plan


def _rows(options: argparse.Namespace, store: Store) -> tuple[str, ...]:
    """The rows asked for, else the paper's; with --resume alone those of the folder."""
    from kd_jax.experiments.hinton2015 import rows as hinton_rows

    before = hinton_rows.asked(store) if options.resume and store.started else ()
    chosen = options.rows or before or hinton.PAPERS_ROWS
    return tuple(row for row in hinton.ROWS if row in chosen)


if __name__ == "__main__":
    command.as_program(main)
