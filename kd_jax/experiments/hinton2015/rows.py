"""The trials of all rows, one after the other: read from the folder where they are done, else trained and kept.

A folder has `rows/NAME.json`, what the trials of that name gave and a digest of that and of what made it, and the
teacher's parameters.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.data import shifts as augment
from kd_jax.data.dataset import Dataset
from kd_jax.errors import DataError, OutputError
from kd_jax.experiments import stage as stages
from kd_jax.experiments.hinton2015 import plan as hinton
from kd_jax.experiments.hinton2015 import row_trials
from kd_jax.experiments.hinton2015.plan import Plan, RowResult, RowTrials
from kd_jax.experiments.hinton2015.row_trials import Taught
from kd_jax.experiments.images import Images
from kd_jax.experiments.notebook import fits, recipes
from kd_jax.experiments.shell.folder import write_part
from kd_jax.experiments.shell.parameters import safetensors
from kd_jax.experiments.shell.progress import Progress, Silent, StageName
from kd_jax.experiments.shell.text import json_text
from kd_jax.models import parameters
from kd_jax.train.checkpoint import CheckpointPolicy, Store

_ROWS = "rows"


class KeptRows:
    """What the trials of one reproduction left in its folder. identity: what makes it this one."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.teacher = folder / "parameters" / f"teacher-seed{identity['config']['seed']}.safetensors"

    def read(self, trials: RowTrials) -> RowResult | None:
        """What trials gave; None where they are not done, or what is there was made by something else."""
        try:
            content = json.loads(self._path(trials.name).read_bytes())
            return content["found"] if content["sha256"] == self._digest(trials, content["found"]) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, trials: RowTrials, found: RowResult) -> None:
        """Keeps what trials gave. Raises `OutputError`."""
        content = {"sha256": self._digest(trials, found), "found": found}
        write_part(self._path(trials.name), json_text(content, indent=None))

    def write_teacher(self, variables: Any) -> None:
        """Keeps the variables `[1, 1, ...]`. Raises `OutputError`."""
        description = {"model": "teacher", "seed": self.identity["config"]["seed"]}
        write_part(self.teacher, safetensors(variables, (0, 0), description))

    @property
    def kept(self) -> bool:
        """Whether anything was kept."""
        return any((self.folder / _ROWS).glob("*.json"))

    def discard(self) -> None:
        """Forgets all results and the teacher. Raises `OSError`."""
        for path in (self.folder / _ROWS).glob("*.json"):
            path.unlink()
        self.teacher.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / _ROWS / f"{name}.json"

    def _digest(self, trials: RowTrials, found: RowResult) -> str:
        taught_by = hashlib.sha256(self.teacher.read_bytes()).hexdigest()
        made_by = {"run": self.identity, "part": hinton.as_dict(trials), "teacher": taught_by, "found": found}
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def run_rows(
    rows: tuple[str, ...], plan: Plan, dataset: Dataset, progress: Progress, policy: CheckpointPolicy, kept: KeptRows
) -> dict[str, RowResult]:
    """What all trials of the rows gave, by their name, and those that are done already.

    Raises what `row_trials.train_row` does, and `OutputError` where the folder no longer takes what is found.
    """
    assert policy.store is not None
    known = hinton.all_trials(plan, dataset.classes)
    policy.store.note(rows=[name for name in hinton.ROWS if name in (*rows, *asked(policy.store))])
    missing = _missing(rows, plan, dataset, kept)
    if missing and not isinstance(progress, Silent):
        _estimate(missing, plan, dataset, progress)
    taught: dict[tuple[int, int], Taught] = {}
    for trials in hinton.wanted(rows, plan, dataset.classes):
        # Read again: what a teacher taught is found once the teacher is.
        if kept.read(trials) is not None:
            continue
        if trials.of_teacher:
            given, trained = row_trials.train_row(trials, plan, dataset, None, progress, policy)
            kept.write_teacher(trained)
            kept.write(trials, given)
            # Its checkpoints stay, as a sign that the folder holds something to go on with.
            continue
        began = time.perf_counter()
        views = trials.averaged, trials.training.shift if trials.temperatures else 0
        if views not in taught:
            taught[views] = _ask_teacher(known[hinton.TEACHER], plan, dataset, kept, *views)
        asking_s = time.perf_counter() - began
        given, _ = row_trials.train_row(trials, plan, dataset, taught[views], progress, policy)
        given["timing"] |= {"teacher_outputs_s": asking_s, "total_s": given["timing"]["total_s"] + asking_s}
        kept.write(trials, given)
        policy.store.forget(trials.name)
    return {name: found for name, trials in known.items() if (found := kept.read(trials)) is not None}


def check(rows: tuple[str, ...], plan: Plan, dataset: Dataset, kept: KeptRows) -> None:
    """Of the trials that are not done.

    Raises `ConfigError` where their parameters, kept until all of them are measured, or one training do not fit.
    """
    for trials in _missing(rows, plan, dataset, kept):
        network = row_trials.network(trials, plan, dataset)
        row_trials.at_once(trials, dataset, network)
        count = hinton.trainings(trials, plan)
        fits.check_kept(network, count, trials.name, seeds=plan.seeds, remedy="choose fewer seeds")


def asked(store: Store) -> list[str]:
    """The rows that a folder was asked for until now."""
    return list(store.notes.get("rows", ()))


def complete(rows: tuple[str, ...], plan: Plan, dataset: Dataset, kept: KeptRows) -> bool:
    """Whether all trials of the rows are done."""
    return not _missing(rows, plan, dataset, kept)


def _missing(rows: tuple[str, ...], plan: Plan, dataset: Dataset, kept: KeptRows) -> list[RowTrials]:
    return [trials for trials in hinton.wanted(rows, plan, dataset.classes) if kept.read(trials) is None]


def _ask_teacher(trials: RowTrials, plan: Plan, dataset: Dataset, kept: KeptRows, averaged: int, shift: int) -> Taught:
    own = row_trials.network(trials, plan, dataset)
    try:
        variables = own.merge(*parameters.load(kept.teacher, own))
    except DataError as error:
        raise OutputError(f"{error}: start again with --overwrite") from None
    return row_trials.ask(variables, dataset, own, averaged=averaged, shift=shift)


def _estimate(missing: list[RowTrials], plan: Plan, dataset: Dataset, progress: Progress) -> None:
    """Tells how long the rest will take, from some steps of the students alone."""
    units = plan.widths[0].units
    trials = hinton.all_trials(plan, dataset.classes)[f"alone-{units}"]
    own = row_trials.network(trials, plan, dataset)
    planned = row_trials.make_trials(trials, plan, dataset, own)
    seen = Images(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
    seeds = planned.seeds[: row_trials.at_once(trials, dataset, own)]
    given: Any = jax.tree.map(lambda value: jnp.full(len(seeds), value, jnp.float32), planned.settings[0])
    trial = stages.prepare(StageName("trial", "trial"), planned.role, planned.setup, given, seeds, seen, epochs=1)
    epoch_s = stages.time_an_epoch(trial, seen)
    one = _work(trials, plan, dataset) / trials.training.epochs * len(seeds) / len(planned.seeds)
    asking = {(trials.averaged, trials.training.shift) for trials in missing if trials.temperatures}
    work = sum(_work(trials, plan, dataset) for trials in missing)
    work += sum(_asking(max(shifts), plan, dataset) for shifts in asking)
    progress.compiled(trial.compile_s, epoch_s / one * work)


def _work(trials: RowTrials, plan: Plan, dataset: Dataset) -> float:
    """How much trials have to do, in a unit of its own."""
    weights = sum(a * b for a, b in itertools.pairwise(recipes.layer_sizes(trials.hidden, dataset)))
    steps = trials.training.epochs * (len(row_trials.transfer_set(trials, dataset)) // trials.training.batch_size)
    # An update costs about what the gradients of 32 images do; small networks cost more than their size says.
    return float(hinton.trainings(trials, plan) * steps * (weights + 50_000) * (trials.training.batch_size + 32))


def _asking(shift: int, plan: Plan, dataset: Dataset) -> float:
    """The same of asking the teacher for all views: a third of a training step's products, of each image once."""
    weights = sum(a * b for a, b in itertools.pairwise(recipes.layer_sizes(plan.teacher_hidden, dataset)))
    return augment.view_count(shift) * len(dataset.train_labels) * (weights + 50_000) / 3
