"""The command `reproduce methods`: its options, the folder that it goes on with, and its result."""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from kd_jax.data.load import load
from kd_jax.errors import ConfigError, MismatchError
from kd_jax.experiments.methods import plan as table
from kd_jax.experiments.methods.plan import Plan
from kd_jax.experiments.methods.rows import ROWS
from kd_jax.experiments.notebook.config import make_config
from kd_jax.experiments.shell import command, resume, signals
from kd_jax.experiments.shell.progress import Silent, duration
from kd_jax.experiments.shell.text import say

NAME = "methods"


def body(options: argparse.Namespace, interrupt: signals.Interrupt, prog: str) -> None:
    """Trains what is asked for and is not kept, and prints the table. Raises `ConfigError` and `MismatchError`."""
    names = [name for given in options.methods or () for name in given.split(",") if name]
    if options.methods is not None and not names:
        raise ConfigError("--methods is given without a method: use some of those that kd_jax.run --method list shows")
    chosen = table.find(names) if names else None
    settings = _settings(options)
    dataset = load(settings["dataset"])
    plan = plan_of(settings)
    table.parts(plan, dataset)
    command.prepare_jax()
    from kd_jax.experiments.methods import files, report, search
    from kd_jax.experiments.methods.kept import KeptTrainings

    with command.opened(options, NAME, f"{prog} {NAME}") as store:
        identity = resume.identity(dataset, config=table.as_dict(plan), table=NAME, settings=settings)
        kept = KeptTrainings(store.folder, identity)
        before = store.notes.get("methods", ()) if options.resume and store.started else ()
        rows = _rows(chosen, before, lambda name: search.complete([name], plan, kept))

        def complete() -> bool:
            # A run that was stopped before its table was written has all trainings, and the table of before.
            return search.complete(rows, plan, kept) and {*rows} <= files.written(store.folder)

        if not command.claimed_with_parts(store, identity, options, kept, name="trainings", complete=complete):
            return
        store.note(methods=[name for name in ROWS if name in {*rows, *before}])
        policy = command.checkpoint_policy(store, interrupt)
        tell = _Told(isinstance(command.watcher(options), Silent))

        def work() -> tuple[str, str]:
            found = search.run_table(rows, plan, dataset, command.watcher(options), policy, kept, tell)
            written = files.write(found, plan, dataset, store.folder)
            return report.text(found, plan, dataset), f"{store.folder}/ has {', '.join(written)}."

        command.carry_out(store, options, lambda: f"{report.header(rows, plan, dataset)}\nCompiling.", work)


class _Told:
    """A line after each method's trials, and after each round of students, with the time that is left."""

    def __init__(self, silent: bool) -> None:
        self.silent, self.began, self.first, self.said = silent, time.monotonic(), -1, ""

    def __call__(self, job: Any, done: int, total: int, trained: bool) -> None:
        if self.first < 0 or not trained:
            # What was kept takes no time.
            self.first, self.began = done, self.began if trained else time.monotonic()
        about = f"students with seed {job.seed}" if job.part == "test" else f"trials of {job.row}"
        if self.silent or about == self.said or not trained:
            return
        self.said = about
        left = (time.monotonic() - self.began) / max(1, done - self.first) * (total - done)
        told = f", {duration(left)} left" if done > self.first + 10 else ""
        say(f"{about:<30} {done:,} of {total:,} trainings{told}")


def plan_of(settings: dict[str, Any]) -> Plan:
    """The plan with these settings."""
    plan = table.PLAN._replace(seeds=settings["seeds"], seed=settings["seed"])
    return table.quick(plan) if settings["quick"] else plan


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Data set, seeds and whether it is quick; with --resume those of the run in the folder.

    Raises `ConfigError`, and `MismatchError` where options that are given differ from the folder's.
    """
    named = ("dataset", "seeds", "seed", "quick")
    given = {name: getattr(options, name) for name in named}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    make_config(**{name: value for name, value in given.items() if name in ("seeds", "seed")})
    store = command.check_output_options(options)
    if store is None:
        seeds = table.QUICK_SEEDS if options.quick else table.PLAN.seeds
        return {"dataset": "mnist", "seeds": seeds, "seed": table.PLAN.seed, "quick": options.quick} | given
    saved = store.identity()
    if saved.get("table") != NAME:
        raise MismatchError(f"{store.folder} has another run: choose another folder for {NAME}")
    for name, value in given.items():
        if saved["settings"].get(name) != value:
            raise MismatchError(
                f"--{name} is {value}, and the run in {store.folder} has {saved['settings'].get(name)}: "
                "leave the option out to go on, or choose another folder"
            )
    return dict(saved["settings"])


def _rows(chosen: Sequence[str] | None, before: Sequence[str], done: Callable[[str], bool]) -> tuple[str, ...]:
    """The methods asked for, else those that the folder was asked for, else all; and its own that are done."""
    wanted = {*(chosen or before or ROWS), *(name for name in before if done(name))}
    return tuple(name for name in ROWS if name in wanted)
