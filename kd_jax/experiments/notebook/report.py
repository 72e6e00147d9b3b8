"""What is left of an experiment: the table, results.json, the parameters and the plots."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from kd_jax.data.dataset import Dataset
from kd_jax.evaluate import Evaluation
from kd_jax.experiments.notebook import plots, views
from kd_jax.experiments.notebook.conclusion import conclude
from kd_jax.experiments.notebook.config import Config, Training
from kd_jax.experiments.notebook.experiment import TITLES, Result, TrainedModels, models
from kd_jax.experiments.notebook.methods import METHODS
from kd_jax.experiments.notebook.recipes import given_teacher, layer_sizes
from kd_jax.experiments.shell import environment
from kd_jax.experiments.shell.folder import RESULTS, TABLE, not_written, write_whole
from kd_jax.experiments.shell.parameters import safetensors
from kd_jax.experiments.shell.text import counted, json_text, listed, plain, spread
from kd_jax.version import __version__


def header(config: Config, dataset: Dataset, folder: Path) -> str:
    """What will be trained, how, and where its results go."""
    lines = set_up(config, dataset) | {
        "device": environment.device_line(environment.describe()),
        "results": f"{folder}/",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def set_up(config: Config, dataset: Dataset) -> dict[str, str]:
    """What is trained, on what, and how, by name."""
    last = config.seed + config.seeds - 1
    seeds = f"{config.seeds} seeds ({config.seed} to {last})" if config.seeds > 1 else f"1 seed ({config.seed})"
    own = config.teacher_training != config.training
    return {
        "data": data_line(dataset),
        "teacher": _teacher_line(config, dataset),
        "students": f"{config.student or _layers(config.student_hidden, dataset)}, {seeds}, alone and distilled",
        "method": _method_line(config),
        "training": training_line(config.training, dataset),
        **({"teacher's": training_line(config.teacher_training, dataset)} if own else {}),
    }


def _method_line(config: Config) -> str:
    options = [text.replace("=", " ") for text in config.method_option or ()]
    if config.method in METHODS:
        options = [f"alpha {config.alpha:g}", f"temperature {config.temperature:g}", *options]
    return ", ".join([config.method, *(options or ["as it comes"])])


def data_line(dataset: Dataset) -> str:
    """The data set in one line."""
    image = " × ".join(map(str, dataset.image_shape))
    return (
        f"{dataset.name}, {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images "
        f"of {image}, {dataset.classes} classes"
    )


def training_line(training: Training, dataset: Dataset) -> str:
    """How one kind of model is trained, in one line."""
    steps = len(dataset.train_labels) // training.batch_size
    line = f"{counted(training.epochs, 'epoch')} of {counted(steps, 'step')}, "
    line += (
        f"batch {training.batch_size}, {'Adam' if training.optimizer == 'adam' else 'SGD'} {training.learning_rate:g}"
    )
    line += f", momentum {training.momentum:g}" if training.optimizer == "sgd" else ""
    line += f", weight decay {training.weight_decay:g}" if training.weight_decay else ""
    line += f", warm-up in {100 * training.warmup:g} % of the steps" if training.warmup else ""
    line += ", cosine decay" if training.schedule == "cosine" else ""
    if training.schedule == "steps":
        line += f", times {training.milestone_factor:g} after epochs {', '.join(map(str, training.milestones))}"
    if training.augment != "none":
        mean, std = ("/".join(f"{number:.4f}" for number in numbers) for numbers in views.moments(dataset))
        named = {"crop-flip": f"crops of images with {views.PADDING} pixels of 0 around, flips"}
        named |= {name: f"{name} of alpha {alpha:g}" for name, alpha in views.ALPHAS.items()}
        line += f", {', '.join(named[name] for name in training.augment.split('+'))}, normalised by {mean} and {std}"
    if training.shift:
        line += f", shifts of up to {counted(training.shift, 'pixel')}"
        line += f" of {100 * training.shift_share:g} % of the images" if training.shift_share < 1 else ""
    return line


def _teacher_line(config: Config, dataset: Dataset) -> str:
    if config.teacher is None:
        return f"{_layers(config.teacher_hidden, dataset)}{regularisation(config)}"
    return config.teacher + (", as it is" if given_teacher(config, dataset) is not None else "")


def _layers(hidden: tuple[int, ...], dataset: Dataset) -> str:
    return "-".join(map(str, layer_sizes(hidden, dataset)))


def regularisation(config: Config) -> str:
    """What else the teacher is trained with, as the end of a line."""
    parts = {"dropout": config.teacher_dropout, "input dropout": config.teacher_input_dropout}
    parts["squared norms of at most"] = config.teacher_max_norm
    return "".join(f", {name} {value:g}" for name, value in parts.items() if value)


def table(result: Result, *, markdown: bool = False) -> str:
    """The result as a table: means ± standard deviations over the seeds; Markdown, or plain for a terminal."""
    of = result.teacher.answers.shape[1]
    columns = {"": _measures_of_rows(of)} | {TITLES[name]: _column(trained) for name, trained in models(result).items()}
    rows = list(zip(*columns.values(), strict=True))
    style = "pipe" if markdown else "simple"
    align = ("left", "right", "right", "right")
    return tabulate(rows, list(columns), tablefmt=style, colalign=align, disable_numparse=True)


def _measures_of_rows(of: int) -> list[str]:
    return [
        "parameters", "seeds", f"correct of {of:,}", f"errors of {of:,}", "accuracy (%)", "agrees with the teacher (%)",
        "KL to the teacher (nats)", "negative log-likelihood (nats)", "calibration error (%)",
        "training (s, all seeds together)", "steps/s (all seeds together)",
    ]  # fmt: skip


def _column(trained: TrainedModels) -> list[str]:
    found, taught = trained.evaluations, trained.evaluations.teacher_agreement is not None
    return [
        f"{trained.parameters:,}",
        f"{len(trained.seeds)}",
        spread(found.correct, ".0f"),
        spread(found.errors, ".0f"),
        spread(found.accuracy, ".2f", per_cent=True),
        spread(found.teacher_agreement, ".1f", per_cent=True) if taught else "",
        spread(found.kl_to_teacher, ".3f") if taught else "",
        spread(found.nll, ".3f"),
        spread(found.ece, ".1f", per_cent=True),
        f"{trained.timing.train_s:.1f}" if trained.history else "",
        ""
        if not trained.history
        else f"{trained.timing.steps_per_s:,.0f}"
        if trained.timing.steps_per_s >= 10
        else f"{trained.timing.steps_per_s:.2g}",
    ]


def conclusion(result: Result) -> str:
    """The sentence on what distillation changed."""
    return conclude(result.comparison, of=result.teacher.answers.shape[1])


def explanation(result: Result) -> str:
    """What the table's ± and the conclusion's interval are; empty for a single seed, which has neither."""
    if len(result.student.seeds) == 1:
        return ""
    return (
        "± is the standard deviation over the seeds: how much one run differs from the next. The interval below is of\n"
        "the mean difference, seed by seed, between the student distilled and the same student alone (paired t-test)."
    )


def as_json(result: Result, dataset: Dataset) -> dict[str, Any]:
    """The content of results.json."""
    timing: dict[str, Any] = {
        "total_s": result.total_s,
        "compile_s": result.compile_s,
        "teacher_outputs_s": result.teacher_outputs_s,
    }
    timing |= {name: trained.timing._asdict() for name, trained in models(result).items()}
    data, config = data_json(dataset), result.config
    if {config.augment, config.teacher_training.augment} != {"none"}:
        data["normalisation"] = dict(zip(("mean", "std"), map(list, views.moments(dataset)), strict=True))
    return {
        "config": config.as_dict(),
        "data": data,
        "environment": environment.describe(),
        "models": {name: _model_json(trained) for name, trained in models(result).items()},
        "comparison": result.comparison._asdict(),
        "conclusion": conclusion(result),
        "timing": timing,
    }


def data_json(dataset: Dataset) -> dict[str, Any]:
    """The data set, as results.json keeps it."""
    return {
        "name": dataset.name,
        "sha256": dataset.digest(),
        "train": len(dataset.train_labels),
        "test": len(dataset.test_labels),
        "image_shape": list(dataset.image_shape),
        "classes": dataset.classes,
    }


def write(result: Result, dataset: Dataset, folder: Path) -> list[str]:
    """Writes every file of a result into `folder`, results.json last, and returns their names.

    Raises `OutputError` where the folder no longer takes them.
    """
    try:
        _remove_older(folder)
        written = _write_parameters(result, folder)
        written += plots.write(result, dataset, folder)
        how = listed(set_up(result.config, dataset))
        parts = (table(result, markdown=True), explanation(result), conclusion(result), how)
        text = "\n\n".join(part for part in parts if part) + "\n"
        write_whole(folder / TABLE, text)
        write_whole(folder / RESULTS, json_text(as_json(result, dataset)))
    except OSError as error:
        raise not_written(folder, error) from None
    return [RESULTS, TABLE, *written]


def _remove_older(folder: Path) -> None:
    """What an earlier experiment left: files of seeds that this one lacks would seem to belong to it."""
    (folder / RESULTS).unlink(missing_ok=True)
    for name in TITLES:
        for path in (folder / "parameters").glob(f"{name}-seed*.safetensors"):
            path.unlink()


def _write_parameters(result: Result, folder: Path) -> list[str]:
    """One safetensors file for each trained model; kernels are `[inputs, outputs]`."""
    (folder / "parameters").mkdir(exist_ok=True)
    for name, trained in models(result).items():
        variables = jax.tree.map(np.asarray, trained.variables)
        for place, seed in enumerate(trained.seeds):
            description = {"model": name, "seed": seed, "version": __version__}
            content = safetensors(variables, (place,), description)
            write_whole(folder / "parameters" / f"{name}-seed{seed}.safetensors", content)
    return ["parameters/*.safetensors"]


def runs_json(measured: Evaluation) -> list[dict[str, Any]]:
    """The measures of each seed."""
    named = {name: plain(values) for name, values in measured._asdict().items() if values is not None}
    return [dict(zip(named, run, strict=True)) for run in zip(*named.values(), strict=True)]


def _model_json(trained: TrainedModels) -> dict[str, Any]:
    runs = [{"seed": seed} | run for seed, run in zip(trained.seeds, runs_json(trained.evaluations), strict=True)]
    history = {"epoch": plain(trained.epochs)}
    if trained.history is None:
        return {"parameters": trained.parameters, "runs": runs, "training": {}}
    history |= {name: plain(values) for name, values in trained.history._asdict().items()}
    return {"parameters": trained.parameters, "runs": runs, "training": history}
