"""What is left of an experiment: the table, results.json, the parameters and the plots."""

import itertools
import json
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save
from tabulate import tabulate

import kd_jax
from kd_jax.data.dataset import Dataset
from kd_jax.evaluate import Evaluation
from kd_jax.experiments.notebook import plots
from kd_jax.experiments.notebook.config import Config, Training
from kd_jax.experiments.notebook.experiment import Result, Trained, layer_sizes, models
from kd_jax.experiments.stage import TITLES
from kd_jax.models.parameters import tensor_name
from kd_jax.stats import conclude, summarise

RESULTS, TABLE = "results.json", "results.md"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


class OutputError(OSError):
    """An output folder that cannot be used; one sentence with the remedy."""


def claim(folder: Path) -> bool:
    """Makes `folder` ready for results, before anything is trained; tells whether it had to be made.

    Raises `OutputError` where it cannot be written.
    """
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".kd_jax-can-write"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"--out {folder} cannot be written ({reason}): choose another folder") from None
    return made


def new_folder(name: str) -> Path:
    """A folder `runs/name` that nobody else has, made at once, or `runs/name-2` and so on. Raises `OutputError`."""
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be made ({error.strerror or error}): choose a folder by --out"
            ) from None
        return folder
    raise AssertionError("numbers do not end")


def header(config: Config, dataset: Dataset, folder: Path) -> str:
    """What will be trained, how, and where its results go."""
    lines = recipe(config, dataset) | {"device": device_line(environment()), "results": f"{folder}/"}
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def recipe(config: Config, dataset: Dataset) -> dict[str, str]:
    """What is trained, on what, and how, by name."""
    last = config.seed + config.seeds - 1
    seeds = f"{config.seeds} seeds ({config.seed} to {last})" if config.seeds > 1 else f"1 seed ({config.seed})"
    own = config.teacher_training != config.training
    return {
        "data": data_line(dataset),
        "teacher": f"{_layers(config.teacher_hidden, dataset)}{regularisation(config)}",
        "students": f"{_layers(config.student_hidden, dataset)}, {seeds}, alone and distilled",
        "method": f"{config.method}, alpha {config.alpha:g}, temperature {config.temperature:g}",
        "training": training_line(config.training, dataset),
        **({"teacher's": training_line(config.teacher_training, dataset)} if own else {}),
    }


def listed(lines: Mapping[str, str]) -> str:
    """Lines by name as a list of Markdown."""
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def data_line(dataset: Dataset) -> str:
    """The data set in one line."""
    image = " × ".join(map(str, dataset.image_shape))
    return (
        f"{dataset.name}, {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images "
        f"of {image}, {dataset.classes} classes"
    )


def counted(number: int, word: str) -> str:
    """So many of something."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def training_line(training: Training, dataset: Dataset) -> str:
    """How one kind of model is trained, in one line."""
    steps = len(dataset.train_labels) // training.batch_size
    line = f"{counted(training.epochs, 'epoch')} of {counted(steps, 'step')}, "
    line += f"batch {training.batch_size}, Adam {training.learning_rate:g}"
    line += f", warm-up in {100 * training.warmup:g} % of the steps" if training.warmup else ""
    line += ", cosine decay" if training.schedule == "cosine" else ""
    if training.shift:
        line += f", shifts of up to {counted(training.shift, 'pixel')}"
        line += f" of {100 * training.shift_share:g} % of the images" if training.shift_share < 1 else ""
    return line


def device_line(known: Mapping[str, Any]) -> str:
    """The device of an `environment` in one line."""
    devices = known["devices"]
    of = f", the first of {len(devices)}" if len(devices) > 1 else ""
    return f"{devices[0]}{of} ({known['cpus']} CPUs), jax {known['packages']['jax']}"


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


def _column(trained: Trained) -> list[str]:
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
        f"{trained.timing.train_s:.1f}",
        f"{trained.timing.steps_per_s:,.0f}"
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


def environment() -> dict[str, Any]:
    """Versions, platform and devices, as results.json keeps them."""
    return {
        "python": platform.python_version(),
        # Of the code that runs: an editable install knows what it was when it was installed.
        "packages": {"kd-jax": kd_jax.__version__} | {name: metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
    }


def as_json(result: Result, dataset: Dataset) -> dict[str, Any]:
    """The content of results.json."""
    timing: dict[str, Any] = {
        "total_s": result.total_s,
        "compile_s": result.compile_s,
        "teacher_outputs_s": result.teacher_outputs_s,
    }
    timing |= {name: trained.timing._asdict() for name, trained in models(result).items()}
    return {
        "config": result.config.as_dict(),
        "data": data_json(dataset),
        "environment": environment(),
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
        how = listed(recipe(result.config, dataset))
        parts = (table(result, markdown=True), explanation(result), conclusion(result), how)
        text = "\n\n".join(part for part in parts if part) + "\n"
        (folder / TABLE).write_text(text, encoding="utf-8")
        write_whole(folder / RESULTS, as_text(as_json(result, dataset)))
    except OSError as error:
        raise not_written(folder, error) from None
    return [RESULTS, TABLE, *written]


def as_text(content: Any, indent: int | None = 2) -> str:
    """JSON, without numbers that are none. A list of numbers is one line."""
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    # No string of JSON has a line break.
    return re.sub(r"\[\n([-+.\de,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def plain(values: Any) -> Any:
    """Python's numbers, of an array of any rank; of float32 with no more digits than it has."""
    array = np.asarray(values)
    return (array.astype(str).astype(np.float64) if array.dtype == np.float32 else array).tolist()


def write_whole(path: Path, content: str | bytes) -> None:
    """All of it or nothing. Raises `OSError`."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def not_written(path: Path, error: OSError) -> OutputError:
    """What to raise where results cannot be written."""
    return OutputError(
        f"the results cannot be written to {path} ({error.strerror or error}): make room, and go on with --resume"
    )


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
        leaves = jax.tree.leaves_with_path(jax.tree.map(np.asarray, (trained.params, trained.state)))
        named = {tensor_name(path[1:]): leaf for path, leaf in leaves}
        for i, seed in enumerate(trained.seeds):
            tensors = {key: np.array(leaf[i], order="C") for key, leaf in named.items()}
            description = {"model": name, "seed": seed, "version": kd_jax.__version__}
            # One entry: safetensors writes several in an order that changes from process to process.
            content = save(tensors, metadata={"kd_jax": json.dumps(description)})
            (folder / "parameters" / f"{name}-seed{seed}.safetensors").write_bytes(content)
    return ["parameters/*.safetensors"]


def runs_json(measured: Evaluation) -> list[dict[str, Any]]:
    """The measures of each seed."""
    named = {name: plain(values) for name, values in measured._asdict().items() if values is not None}
    return [dict(zip(named, run, strict=True)) for run in zip(*named.values(), strict=True)]


def _model_json(trained: Trained) -> dict[str, Any]:
    runs = [{"seed": seed} | run for seed, run in zip(trained.seeds, runs_json(trained.evaluations), strict=True)]
    history = {"epoch": plain(trained.epochs)}
    history |= {name: plain(values) for name, values in trained.history._asdict().items()}
    return {"parameters": trained.parameters, "runs": runs, "training": history}


def spread(values: Any, form: str, *, per_cent: bool = False) -> str:
    """Mean ± standard deviation over the seeds, or the one value there is."""
    summary = summarise(np.asarray(values, np.float64) * (100 if per_cent else 1))
    mean = format(summary.mean, form)
    return mean if summary.sd is None else f"{mean} ± {format(summary.sd, form)}"
