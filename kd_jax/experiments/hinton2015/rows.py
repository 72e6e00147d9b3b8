"""The parts of `hinton`'s rows, one after the other: read from the folder where they are done, else trained and kept.

A folder has `rows/PART.json`, what a part gave and a digest of that and of what made it, and the teacher's parameters.
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
import numpy as np
from safetensors.numpy import save

from kd_jax.data import shifts as augment
from kd_jax.data.dataset import DataError, Dataset
from kd_jax.experiments import stage as phase
from kd_jax.experiments.hinton2015 import parts as hinton_parts
from kd_jax.experiments.hinton2015 import plan as hinton
from kd_jax.experiments.hinton2015.parts import Taught
from kd_jax.experiments.hinton2015.plan import Found, Part, Plan
from kd_jax.experiments.notebook import experiment
from kd_jax.experiments.notebook.config import ConfigError
from kd_jax.experiments.notebook.report import OutputError, as_text, not_written, write_whole
from kd_jax.experiments.shell.progress import Silent
from kd_jax.experiments.stage import Keeping, Progress
from kd_jax.models import parameters
from kd_jax.models.parameters import tensor_name
from kd_jax.train import memory
from kd_jax.train.checkpoint import Store
from kd_jax.train.step import Examples

_ROWS = "rows"


class Files:
    """What the parts of one reproduction left in its folder. identity: what makes it this one."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.teacher = folder / "parameters" / f"teacher-seed{identity['config']['seed']}.safetensors"

    def read(self, part: Part) -> Found | None:
        """What a part gave; None where it is not done, or what is there was made by something else."""
        try:
            kept = json.loads(self._path(part.name).read_bytes())
            return kept["found"] if kept["sha256"] == self._digest(part, kept["found"]) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, part: Part, found: Found) -> None:
        """Keeps what a part gave. Raises `OutputError`."""
        content = {"sha256": self._digest(part, found), "found": found}
        _write(self._path(part.name), as_text(content, indent=None))

    def write_teacher(self, params: Any, state: Any) -> None:
        """Keeps the parameters `[1, 1, ...]`. Raises `OutputError`."""
        leaves = jax.tree.leaves_with_path((params, state))
        named = {tensor_name(path[1:]): np.array(leaf[0, 0], order="C") for path, leaf in leaves}
        description = {"model": "teacher", "seed": self.identity["config"]["seed"]}
        _write(self.teacher, save(named, metadata={"kd_jax": json.dumps(description)}))

    @property
    def kept(self) -> bool:
        """Whether any part was kept."""
        return any((self.folder / _ROWS).glob("*.json"))

    def discard(self) -> None:
        """Forgets all parts and the teacher. Raises `OSError`."""
        for path in (self.folder / _ROWS).glob("*.json"):
            path.unlink()
        self.teacher.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / _ROWS / f"{name}.json"

    def _digest(self, part: Part, found: Found) -> str:
        taught_by = hashlib.sha256(self.teacher.read_bytes()).hexdigest()
        made_by = {"run": self.identity, "part": hinton.as_dict(part), "teacher": taught_by, "found": found}
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def run(
    rows: tuple[str, ...], plan: Plan, dataset: Dataset, progress: Progress, keeping: Keeping, files: Files
) -> dict[str, Found]:
    """What every part of the rows gave, by its name, and of those that are done already.

    Raises what `hinton_parts.train` does, and `OutputError` where the folder no longer takes what is found.
    """
    assert keeping.store is not None
    parts = hinton.parts(plan, dataset.classes)
    keeping.store.note(rows=[row for row in hinton.ROWS if row in (*rows, *asked(keeping.store))])
    missing = _missing(rows, plan, dataset, files)
    if missing and not isinstance(progress, Silent):
        _estimate(missing, plan, dataset, progress)
    taught: dict[tuple[int, int], Taught] = {}
    for part in hinton.wanted(rows, plan, dataset.classes):
        # Read again: what a teacher taught is found once the teacher is.
        if files.read(part) is not None:
            continue
        if part.name == "teacher":
            given, trained = hinton_parts.train(part, plan, dataset, None, progress, keeping)
            files.write_teacher(*trained)
            files.write(part, given)
            # Its checkpoints stay, as a sign that the folder holds something to go on with.
            continue
        began = time.perf_counter()
        views = part.averaged, part.training.shift if part.temperatures else 0
        if views not in taught:
            taught[views] = _ask_teacher(parts["teacher"], plan, dataset, files, *views)
        asking_s = time.perf_counter() - began
        given, _ = hinton_parts.train(part, plan, dataset, taught[views], progress, keeping)
        given["timing"] |= {"teacher_outputs_s": asking_s, "total_s": given["timing"]["total_s"] + asking_s}
        files.write(part, given)
        keeping.store.forget(part.name)
    return {name: found for name, part in parts.items() if (found := files.read(part)) is not None}


def check(rows: tuple[str, ...], plan: Plan, dataset: Dataset, files: Files) -> None:
    """Of the parts that are not done.

    Raises `ConfigError` where a part's parameters, kept until all of it is measured, or one training do not fit.
    """
    room = memory.host()
    for part in _missing(rows, plan, dataset, files):
        hinton_parts.at_once(part, dataset, hinton_parts.network(part, plan, dataset))
        layers = experiment.layer_sizes(part.hidden, dataset)
        # In blocks, and put together.
        kept = 2 * 4 * hinton.trainings(part, plan) * sum((a + 1) * b for a, b in itertools.pairwise(layers))
        if room is not None and kept > room:
            raise ConfigError(
                f"--seeds is {plan.seeds}: the parameters of {part.name} need {kept / 2**30:.1f} GiB, and "
                f"{room / 2**30:.1f} GiB are free: choose fewer seeds"
            )


def asked(store: Store) -> list[str]:
    """The rows that a folder was asked for until now."""
    return list(store.notes.get("rows", ()))


def complete(rows: tuple[str, ...], plan: Plan, dataset: Dataset, files: Files) -> bool:
    """Whether every part of the rows is done."""
    return not _missing(rows, plan, dataset, files)


def _missing(rows: tuple[str, ...], plan: Plan, dataset: Dataset, files: Files) -> list[Part]:
    return [part for part in hinton.wanted(rows, plan, dataset.classes) if files.read(part) is None]


def _ask_teacher(part: Part, plan: Plan, dataset: Dataset, files: Files, averaged: int, shift: int) -> Taught:
    own = hinton_parts.network(part, plan, dataset)
    try:
        params, state = parameters.load(files.teacher, own)
    except DataError as error:
        raise OutputError(f"{error}: start again with --overwrite") from None
    return hinton_parts.ask(params, state, dataset, own, averaged=averaged, shift=shift)


def _estimate(missing: list[Part], plan: Plan, dataset: Dataset, progress: Progress) -> None:
    """Tells how long the rest will take, from some steps of the students alone."""
    units = plan.widths[0].units
    part = hinton.parts(plan, dataset.classes)[f"alone-{units}"]
    own = hinton_parts.network(part, plan, dataset)
    planned = hinton_parts.make_group(part, plan, dataset, own)
    seen = Examples(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
    seeds = planned.seeds[: hinton_parts.at_once(part, dataset, own)]
    given: Any = jax.tree.map(lambda value: jnp.full(len(seeds), value, jnp.float32), planned.settings[0])
    trial = phase.prepare("trial", planned.recipe, given, seeds, experiment.STUDENT, seen, epochs=1)
    epoch_s = phase.trial(trial, seen)
    one = _work(part, plan, dataset) / part.training.epochs * len(seeds) / len(planned.seeds)
    asking = {(part.averaged, part.training.shift) for part in missing if part.temperatures}
    work = sum(_work(part, plan, dataset) for part in missing)
    work += sum(_asking(max(shifts), plan, dataset) for shifts in asking)
    progress.compiled(trial.compile_s, epoch_s / one * work)


def _work(part: Part, plan: Plan, dataset: Dataset) -> float:
    """How much a part has to do, in a unit of its own."""
    weights = sum(a * b for a, b in itertools.pairwise(experiment.layer_sizes(part.hidden, dataset)))
    steps = part.training.epochs * (len(hinton_parts.transfer_set(part, dataset)) // part.training.batch_size)
    # An update costs about what the gradients of 32 images do; small networks cost more than their size says.
    return float(hinton.trainings(part, plan) * steps * (weights + 50_000) * (part.training.batch_size + 32))


def _asking(shift: int, plan: Plan, dataset: Dataset) -> float:
    """The same of asking the teacher for all views: a third of a training step's products, of each image once."""
    weights = sum(a * b for a, b in itertools.pairwise(experiment.layer_sizes(plan.teacher_hidden, dataset)))
    return augment.view_count(shift) * len(dataset.train_labels) * (weights + 50_000) / 3


def _write(path: Path, content: str | bytes) -> None:
    """All or nothing. Raises `OutputError`."""
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise not_written(path, error) from None
