"""The command `reproduce cifar100`: its options, and the folder that it goes on with."""

import argparse
import shutil
from typing import Any

from kd_jax.data.load import load
from kd_jax.errors import MismatchError
from kd_jax.experiments.cifar100 import plan as table
from kd_jax.experiments.cifar100.plan import METHODS, PAIRS, Plan
from kd_jax.experiments.notebook.config import PRESETS, make_config
from kd_jax.experiments.shell import command, resume, signals
from kd_jax.experiments.shell.text import counted

NAME = "cifar100"


def body(options: argparse.Namespace, interrupt: signals.Interrupt, prog: str) -> None:
    """Trains what is asked for and is not kept, and prints the table. Raises `ConfigError` and `MismatchError`."""
    settings = _settings(options)
    fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in settings.items()}
    plan = Plan(**fields)
    dataset = load(settings["dataset"])
    command.prepare_jax()
    from kd_jax.experiments.cifar100 import report, rows

    rows.check(plan, dataset)
    with command.opened(options, NAME, f"{prog} {NAME}") as store:
        configs = {pair: plan.config(pair).as_dict() for pair in plan.pairs}
        identity = resume.identity(dataset, config=configs, table=NAME, settings=settings)
        going_on = options.resume and store.started
        if not command.claimed(store, identity, options):
            return
        if not going_on:
            shutil.rmtree(store.folder / "rows", ignore_errors=True)
        policy, kept = command.checkpoint_policy(store, interrupt), rows.Kept(store.folder, identity)

        def work() -> tuple[str, str]:
            found = rows.run_table(plan, dataset, command.watcher(options), policy, kept)
            written = report.write(found, plan, dataset, store.folder)
            return report.text(found, plan, dataset), f"{store.folder}/ has {', '.join(written)}."

        command.carry_out(store, options, lambda: f"{report.header(plan, dataset, store.folder)}\nCompiling.", work)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What is asked for; with --resume what the folder has, from which nothing that is given may differ."""
    lists = {
        "pairs": list(table.chosen(options.pairs, tuple(PAIRS), "--pairs")),
        "methods": list(table.chosen(options.methods, tuple(METHODS), "--methods")),
    }
    given: dict[str, Any] = {name: value for name, value in lists.items() if getattr(options, name) is not None}
    for name in ("dataset", "seeds", "seed"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    given |= {"quick": True} if options.quick else {}
    make_config(**{name: value for name, value in given.items() if name in ("seeds", "seed")})
    store = command.check_output_options(options)
    if store is None:
        seeds = table.QUICK_SEEDS if options.quick else table.SEEDS
        usual = {"dataset": PRESETS["cifar100"]["dataset"], "seeds": seeds, "seed": table.SEED, "quick": False}
        return lists | usual | given
    saved = store.identity()
    if saved.get("table") != NAME:
        raise MismatchError(f"{store.folder} has another run: choose another folder for {NAME}")
    for name, value in given.items():
        was = saved["settings"].get(name)
        if was != value:
            raise MismatchError(
                f"--{name} is {resume.shown(value)}, and the run in {store.folder} has {resume.shown(was)}: leave the "
                "option out to go on, or choose another folder"
            )
    return dict(saved["settings"])


def help_of_pairs() -> str:
    """What `--pairs` may be."""
    return f"of cifar100: some of its {counted(len(PAIRS), 'pair')} (default: all), {', '.join(PAIRS)}"
