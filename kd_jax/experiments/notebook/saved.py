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
from kd_jax.models import Model, zoo
from kd_jax.models import parameters as of_files


class SavedRun(NamedTuple):
    """A run that is finished. models: by name, those of `seed`; the teacher's is the first seed."""

    config: Config
    dataset: Dataset
    seed: int
    models: dict[str, Model]

    def settings(self, name: str) -> dict[str, Any]:
        """How the model of this name was trained; of the teacher and of students alone without what others need."""
        known = self.config.as_dict()
        del known["seeds"]
        left_out = {"teacher_hidden", "teacher_dropout", "teacher_input_dropout"} if self.config.teacher else set()
        left_out |= {"student_hidden"} if self.config.student else set()
        if name == "teacher":
            left_out |= {one for one in known if one not in ("dataset", "preset") and not one.startswith("teacher")}
        elif name == "student":
            left_out |= {one for one in known if one.startswith("teacher")}
            left_out |= {"method", "alpha", "temperature", "method_option"}
        seed = self.config.seed if name == "teacher" else self.seed
        return {one: value for one, value in known.items() if one not in left_out} | {"seed": seed}

    def how_made(self, name: str) -> dict[str, Any]:
        """`made` and `arguments` of `kd.export.to_safetensors`; nothing of a network that is not kd_jax's alone."""
        config, dataset = self.config, self.dataset
        own = config.teacher if name == "teacher" else config.student
        if (config.teacher_training if name == "teacher" else config.training).augment != "none":
            return {}
        if own:
            sizes = {"num_classes": dataset.classes, "in_channels": dataset.image_shape[-1]}
            return {"made": f"kd_jax.models:{own}", "arguments": sizes} if own in zoo.__all__ else {}
        hidden = config.teacher_hidden if name == "teacher" else config.student_hidden
        known: dict[str, Any] = {"sizes": list(recipes.layer_sizes(hidden, dataset))}
        if name == "teacher":
            known |= {"dropout": config.teacher_dropout, "input_dropout": config.teacher_input_dropout}
        return {"made": "kd_jax.models:mlp", "arguments": known}


def read(folder: Path, seed: int | None = None) -> SavedRun:
    """The run in a folder of `python -m kd_jax.run`, with the models of one seed, or of its first.

    Networks of the run's own, `package.module:name` or `file.py:name`, are imported and called, as by the run itself.

    Raises `DataError` where the folder has none, or its data set has changed, and `ConfigError` for another seed.
    """
    content = _results(folder)
    try:
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content["config"].items()}
        config, digest = Config(**fields), content["data"]["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"{folder / RESULTS} is not of python -m kd_jax.run, or of another version: name the folder of such a run, "
            "or export a model from Python, kd.export.to_folder(model, folder, test)"
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
    except (ValueError, RecursionError):
        raise DataError(f"{folder / RESULTS} is damaged: run it again") from None
    return content if isinstance(content, dict) else {}
