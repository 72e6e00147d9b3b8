"""Trains what the table lacks, pair by pair: the teacher, students alone, and students with each method."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.data.dataset import Dataset
from kd_jax.errors import DataError
from kd_jax.evaluate import Evaluation, evaluate_logits
from kd_jax.experiments import images as of_images
from kd_jax.experiments.cifar100.plan import ALONE, TEACHER, Plan
from kd_jax.experiments.images import Images, Settings
from kd_jax.experiments.notebook import fits, recipes
from kd_jax.experiments.notebook.config import Config
from kd_jax.experiments.notebook.report import runs_json
from kd_jax.experiments.shell.folder import write_part
from kd_jax.experiments.shell.parameters import safetensors
from kd_jax.experiments.shell.progress import Progress
from kd_jax.experiments.shell.text import json_text
from kd_jax.experiments.stage import Role
from kd_jax.experiments.trials import TrainedTrials, Trials, train_trials, trainings_at_once
from kd_jax.methods import CrossEntropy, Method
from kd_jax.models import Network, parameters
from kd_jax.teacher import LiveTeacher
from kd_jax.train import memory
from kd_jax.train.checkpoint import CheckpointPolicy

Found = dict[str, dict[str, Any]]
"""By `PAIR-ALONE`, `PAIR-TEACHER` and `PAIR-method`: runs, one for each seed, and the seconds of their training."""


class Kept:
    """What is done in a folder: `rows/NAME.json`, and each teacher's parameters. identity: what makes it this run."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def read(self, name: str) -> dict[str, Any] | None:
        """What was found; None where it is not done, or is another run's or damaged."""
        try:
            content = json.loads((self.folder / "rows" / f"{name}.json").read_bytes())
            return content["found"] if content["sha256"] == self._digest(content["found"]) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, name: str, found: dict[str, Any]) -> None:
        """Keeps what was found. Raises `OutputError`."""
        write_part(self.folder / "rows" / f"{name}.json", json_text({"sha256": self._digest(found), "found": found}))

    def teacher(self, pair: str, network: Network) -> Any:
        """The variables of a teacher that is done; None without one."""
        path = self._teacher(pair)
        known = self.read(f"{pair}-{TEACHER}")
        try:
            if known is None or known["parameters"] != hashlib.sha256(path.read_bytes()).hexdigest():
                return None
            return network.merge(*parameters.load(path, network))
        except (OSError, DataError, KeyError):
            return None

    def write_teacher(self, pair: str, variables: Any, found: dict[str, Any]) -> None:
        """Keeps the variables `[1, 1, ...]` of a teacher, and what was found. Raises `OutputError`."""
        content = safetensors(variables, (0, 0), {"model": TEACHER, "pair": pair})
        write_part(self._teacher(pair), content)
        self.write(f"{pair}-{TEACHER}", found | {"parameters": hashlib.sha256(content).hexdigest()})

    def _teacher(self, pair: str) -> Path:
        return self.folder / "parameters" / f"{pair}-{TEACHER}.safetensors"

    def _digest(self, found: Any) -> str:
        return hashlib.sha256((self.run + json.dumps(found, sort_keys=True)).encode()).hexdigest()


def check(plan: Plan, dataset: Dataset) -> None:
    """Raises `ConfigError` where a pair does not fit the data or the memory."""
    for pair in plan.pairs:
        # Seeds are split so that they fit.
        fits.check(dataclasses.replace(plan.config(pair), seeds=1), dataset)


def run_table(plan: Plan, dataset: Dataset, progress: Progress, policy: CheckpointPolicy, kept: Kept) -> Found:
    """All of the table. What is kept is not trained again. Raises what `train_trials` does, and `OutputError`."""
    data = Images(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
    found: Found = {}
    for pair in plan.pairs:
        names = [f"{pair}-{part}" for part in (TEACHER, ALONE, *plan.methods)]
        if any(kept.read(name) is None for name in names):
            _train_pair(pair, plan, dataset, data, progress, policy, kept)
        found |= {name: known for name in names if (known := kept.read(name)) is not None}
    return found


def _train_pair(
    pair: str, plan: Plan, dataset: Dataset, data: Images, progress: Progress, policy: CheckpointPolicy, kept: Kept
) -> None:
    config, count = plan.config(pair), len(dataset.train_labels)
    of_teacher, of_student = recipes.networks(config, dataset)
    variables = kept.teacher(pair, of_teacher)
    if variables is None:
        trained = _trained(f"{pair}-{TEACHER}", config, dataset, data, CrossEntropy(), progress, policy)
        kept.write_teacher(pair, trained.variables, _found(trained, of_teacher, dataset, (config.seed,), None))
        variables = jax.tree.map(lambda leaf: leaf[0, 0], trained.variables)
    variables = jax.tree.map(jnp.asarray, variables)
    said = of_images.predict(variables, jnp.asarray(dataset.test_images), network=of_teacher)
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    for part in (ALONE, *plan.methods):
        name = f"{pair}-{part}"
        if kept.read(name) is not None:
            continue
        method = CrossEntropy() if part == ALONE else plan.method(part, config.epochs * (count // config.batch_size))
        given = data if part == ALONE else data._replace(teacher=LiveTeacher(of_teacher, variables))
        trained = _trained(name, config, dataset, given, method, progress, policy)
        kept.write(name, _found(trained, of_student, dataset, seeds, said))
        if policy.store is not None:
            policy.store.forget(f"{name}-0")


def _trained(
    name: str, config: Config, dataset: Dataset, data: Images, method: Method, progress: Progress,
    policy: CheckpointPolicy,
) -> TrainedTrials:  # fmt: skip
    """The teacher of a pair, or its students with a method."""
    of_teacher = name.endswith(f"-{TEACHER}")
    training, count = config.teacher_training if of_teacher else config.training, len(dataset.train_labels)
    network = recipes.networks(config, dataset)[not of_teacher]
    layers = recipes.places(config, dataset)[not of_teacher]
    seeds = (config.seed,) if of_teacher else tuple(range(config.seed, config.seed + config.seeds))
    setup = recipes.make_setup(network, training, count)
    role = Role.TEACHER if of_teacher else Role.STUDENT
    trials = Trials(name, setup, [Settings(training.learning_rate, method)], seeds, role, training.epochs, name)
    one = memory.needed(network, layers, examples=count, test_examples=len(dataset.test_labels))
    most = trainings_at_once(one, training.batch_size, beside=0)
    return train_trials(trials, data, progress, policy, most=most)


def _found(
    trained: TrainedTrials, network: Network, dataset: Dataset, seeds: tuple[int, ...], teacher: Any
) -> dict[str, Any]:
    """What is kept. Reads the test set, once."""
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), trained.variables)
    logits = of_images.predict_each(variables, jnp.asarray(dataset.test_images), network=network)
    labels = jnp.asarray(dataset.test_labels)
    measured: Evaluation = jax.vmap(evaluate_logits, in_axes=(0, None, None))(logits, labels, teacher)
    runs = [
        {"seed": seed} | run for seed, run in zip(seeds, runs_json(jax.tree.map(np.asarray, measured)), strict=True)
    ]
    return {"runs": runs, "train_s": trained.train_s}
