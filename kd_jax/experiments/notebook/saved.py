"""The models of a run, from the files that it left: for use elsewhere."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.data.dataset import Dataset
from kd_jax.data.load import load
from kd_jax.errors import ConfigError, DataError
from kd_jax.experiments.notebook import recipes
from kd_jax.experiments.notebook.config import Config
from kd_jax.experiments.notebook.experiment import TITLES
from kd_jax.experiments.shell.folder import RESULTS
from kd_jax.files import open_regular
from kd_jax.models import Model
from kd_jax.models import parameters as of_files


class SavedRun(NamedTuple):
    """A run that is finished. models: by name, those of `seed`; the teacher's is the first seed."""

    config: Config
    dataset: Dataset
    seed: int
    models: dict[str, Model]


def read(folder: Path, seed: int | None = None) -> SavedRun:
    """The run in a folder of `python -m kd_jax.run`, with the models of one seed, or of its first.

    Raises `DataError` where the folder has none, or its data set has changed, and `ConfigError` for another seed.
    """
    content = _results(folder)
    try:
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content["config"].items()}
        config, digest = Config(**fields), content["data"]["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"{folder / RESULTS} is not of python -m kd_jax.run, or of another version: name the folder of such a run"
        ) from None
    last = config.seed + config.seeds - 1
    seed = config.seed if seed is None else seed
    if not config.seed <= seed <= last:
        raise ConfigError(f"--seed is {seed}: the run in {folder} has the seeds {config.seed} to {last}")
    dataset = load(config.dataset)
    if dataset.digest() != digest:
        raise DataError(
            f"the data set {config.dataset} is not what the run in {folder} was trained on: give it the same files"
        )
    teacher, student = recipes.networks(config, dataset)
    networks = {"teacher": teacher, "student": student, "distilled": student}
    models = {}
    for name in TITLES:
        of_seed = config.seed if name == "teacher" else seed
        path = folder / "parameters" / f"{name}-seed{of_seed}.safetensors"
        network = networks[name]
        models[name] = Model(network, network.merge(*of_files.load(path, network)))
    return SavedRun(config, dataset, seed, models)


def is_run(folder: Path) -> bool:
    """Whether a folder has results."""
    return (folder / RESULTS).is_file()


def _results(folder: Path) -> dict[str, Any]:
    with open_regular(folder / RESULTS) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except ValueError:
        raise DataError(f"{folder / RESULTS} is damaged: run it again") from None
    return content if isinstance(content, dict) else {}
