"""Teacher against student: size, operations, latency and accuracy; as a table, Markdown, JSON and a plot."""

import contextlib
import importlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tabulate import tabulate

from kd_jax.data.batch import Batch, as_batch, check_whole
from kd_jax.errors import ConfigError
from kd_jax.evaluate import evaluate, teacher_logits
from kd_jax.export import latency
from kd_jax.export.latency import Quartiles
from kd_jax.export.onnx import check_packages, to_int8, to_onnx
from kd_jax.export.program import traced, with_variables
from kd_jax.files.written import without_infinities, write_whole
from kd_jax.models import Model, count_parameters, from_function, from_onnx
from kd_jax.models.host import HostNetwork
from kd_jax.models.onnx import Session, open_session
from kd_jax.stats import proportion_interval
from kd_jax.teacher import as_whole_teacher, cached
from kd_jax.teachers.base import LiveTeacher
from kd_jax.version import __version__

PyTree = Any

BATCHES = (1, 32)
INT8 = "int8"


class Row(NamedTuple):
    """One model, or its ONNX file with int8 weights.

    parameters: trained numbers; None of a teacher that does not tell. size: of the ONNX file, in bytes; None without
    one. operations: floating-point ones for one example; None of int8, and of a teacher that is no program of JAX.
    measures: as of `kd.evaluate`. interval: 95 % of the accuracy, over examples; None without labels, and where an
    example has several, or its own weight. seconds: by runtime ("onnxruntime" on one thread, "XLA") and number of
    examples in a call.
    """

    parameters: int | None
    size: int | None
    operations: float | None
    measures: Mapping[str, float]
    interval: tuple[float, float] | None
    seconds: Mapping[tuple[str, int], Quartiles]


@dataclass(frozen=True)
class Report:
    """What `report` found: the rows by name, and on how many examples; `str(report)` is the table."""

    rows: Mapping[str, Row]
    examples: int
    rounds: int
    environment: Mapping[str, Any]

    def __str__(self) -> str:
        """The table, for a terminal."""
        return self._text("simple")

    __repr__ = __str__

    def markdown(self) -> str:
        """The table as Markdown."""
        return self._text("pipe")

    def as_dict(self) -> dict[str, Any]:
        """All numbers, as JSON holds them (None: not finite); latencies in seconds, by runtime and size of a batch."""
        rows = {
            name: {
                "parameters": row.parameters,
                "bytes": row.size,
                "operations": row.operations,
                "measures": dict(row.measures),
                "accuracy_ci95": None if row.interval is None else list(row.interval),
                "seconds": [
                    {"runtime": runtime, "batch": batch, **found._asdict()}
                    for (runtime, batch), found in row.seconds.items()
                ],
            }
            for name, row in self.rows.items()
        }
        known = {"examples": self.examples, "rounds": self.rounds, "environment": dict(self.environment)}
        return dict(without_infinities({"models": rows, **known}))

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `report.json`, `report.md` and `report.png` into a folder; gives their paths. Raises `DataError`."""
        folder = Path(folder).expanduser()
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"
        written = [write_whole(folder / "report.json", text.encode())]
        written.append(write_whole(folder / "report.md", f"{self.markdown()}\n".encode()))
        with tempfile.TemporaryDirectory() as beside:
            picture = Path(beside) / "report.png"
            self.plot().savefig(picture, dpi=150)
            written.append(write_whole(folder / "report.png", picture.read_bytes()))
        return written

    def plot(self) -> Any:
        """A figure of Matplotlib: how good each model is against its latency for one example.

        That is the accuracy, else the agreement with the teacher, the negative log-likelihood or the squared error:
        the first that is known; where none is, each model has a line. Bars are quartiles of the latency, and the 95 %
        interval of the accuracy.
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, StrMethodFormatter

        figure = Figure(figsize=(7.0, 4.4), layout="constrained")
        panel = figure.subplots()
        measure = self._measure()
        factor, label = _AXES.get(measure, (1, ""))
        for place, ((name, row), colour) in enumerate(zip(self.rows.items(), _COLOURS * len(self.rows), strict=False)):
            # A teacher agrees with itself.
            known = {"agreement": 1.0, **row.measures} if place == 0 else row.measures
            for (runtime, batch), found in row.seconds.items():
                if batch != BATCHES[0]:
                    continue
                value = factor * known[measure] if measure else place
                low, high = (value, value) if row.interval is None else (100 * part for part in row.interval)
                micro = [1e6 * part for part in found]
                panel.errorbar(
                    micro[1], value, xerr=[[micro[1] - micro[0]], [micro[2] - micro[1]]],
                    yerr=[[max(0.0, value - low)], [max(0.0, high - value)]] if measure == "accuracy" else None,
                    fmt=_MARKS[runtime], color=colour, capsize=3, markersize=7, label=f"{name}, {runtime}",
                )  # fmt: skip
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        panel.minorticks_off()
        panel.set_xlabel("microseconds for one example, median and quartiles")
        panel.set_ylabel(label)
        if not measure:
            panel.set_yticks(range(len(self.rows)), list(self.rows))
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
        return figure

    def _measure(self) -> str:
        """What the figure shows; nothing where no measure is known of every model."""
        several = [row.measures for row in self.rows.values()]
        # A teacher has no agreement, and alone there is none.
        asked = {name: several[1:] if name == "agreement" else several for name in _AXES}
        return next((name for name, of in asked.items() if of and all(name in one for one in of)), "")

    def _text(self, form: str) -> str:
        every = list({key: None for row in self.rows.values() for key in row.seconds})
        cells = [self._cells(name, row, every) for name, row in self.rows.items()]
        # A column for each model.
        table = [list(line) for line in zip(self._titles(every), *cells, strict=True)]
        table = [line for line in table[1:] if any(line[1:])]
        header = ["", *self.rows]
        align = ("left", *["right"] * len(self.rows))
        body = tabulate(table, header, tablefmt=form, colalign=align, disable_numparse=True)
        note = (
            f"Latencies are medians (quartiles) of {self.rounds} rounds in turn; onnxruntime has one thread. Measures "
            f"are of {self.examples:,} examples"
        )
        if any(row.interval for row in self.rows.values()):
            note += "; the interval (95 %, Wilson's) is about other examples."
        elif any("accuracy" in row.measures for row in self.rows.values()):
            note += ", without an interval: an example has several labels, or a weight of its own."
        else:
            note += "."
        if any(name.endswith(f", {INT8}") for name in self.rows):
            note += f" With int8 all examples of a call share a scale: they were measured {BATCHES[-1]} in a call."
        return f"{body}\n\n{note}"

    @staticmethod
    def _titles(every: list[tuple[str, int]]) -> list[str]:
        return [
            "", "parameters", "ONNX file (kB)", "operations (million)", "accuracy (%)", "95 % interval",
            "agrees with the teacher (%)", "KL to the teacher (nats)", "calibration error (%)",
            "negative log-likelihood (nats)", "mean squared error",
            *(f"{runtime}, {batch} in a call (µs)" for runtime, batch in every),
        ]  # fmt: skip

    @staticmethod
    def _cells(name: str, row: Row, every: list[tuple[str, int]]) -> list[str]:
        def per_cent(measure: str) -> str:
            return f"{100 * row.measures[measure]:.2f}" if measure in row.measures else ""

        def number(measure: str, form: str = ".4g") -> str:
            return format(row.measures[measure], form) if measure in row.measures else ""

        interval = "" if row.interval is None else f"{100 * row.interval[0]:.2f} to {100 * row.interval[1]:.2f}"
        times = (row.seconds.get(key) for key in every)
        return [
            name, "" if row.parameters is None else f"{row.parameters:,}",
            "" if row.size is None else f"{row.size / 1000:,.1f}",
            "" if row.operations is None else f"{row.operations / 1e6:,.3g}",
            per_cent("accuracy"), interval, per_cent("agreement"), number("kl_to_teacher", ".4f"), per_cent("ece"),
            number("nll"), number("mse"),
            *("" if one is None else _microseconds(one) for one in times),
        ]  # fmt: skip


def _microseconds(found: Quartiles) -> str:
    first, median, third = (1e6 * part for part in found)
    digits = 0 if median >= 100 else 1
    return f"{median:,.{digits}f} ({first:,.{digits}f} to {third:,.{digits}f})"


_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
# What a figure can show, the best first: by which factor, and how its axis is called.
_AXES = {
    "accuracy": (100, "accuracy (%)"), "agreement": (100, "agrees with the teacher (%)"),
    "nll": (1, "negative log-likelihood (nats)"), "mse": (1, "mean squared error"),
}  # fmt: skip
_MARKS = {"onnxruntime": "o", "XLA": "s"}


def report(
    models: Any, data: Any, *, prepare: Any = None, onnx: bool = True, int8: bool = True, rounds: int = 30,
    batches: tuple[int, ...] = BATCHES,
) -> Report:  # fmt: skip
    """Teacher against student, each measured in onnxruntime and XLA on this computer.

    models: by name; the first is the teacher, with which the others agree or not: whatever teaches, also
        `kd.from_onnx(path)` and `kd.cached(teacher, data)`. Each other is a model, which is exported as ONNX first.
    data: a `Batch` in memory of held-out examples, with labels or without. prepare: as of the training.
    onnx: whether onnxruntime is measured; without it the rows have no file. A teacher that cannot be exported has none.
    int8: whether each but the first is measured with int8 weights, too, with 32 examples in a call: all of a call share
        a scale. rounds: in each of which every model, runtime and number of examples in `batches` is timed once.

    Raises `ConfigError` as `to_onnx`, and where there is nothing to measure.
    """
    if not isinstance(models, Mapping) or not models or next(iter(models.values())) is None:
        raise ConfigError(
            "the report needs models by name, the teacher first: {'teacher': teacher, 'student': student}"
        )
    check_whole(rounds, "rounds")
    if onnx:
        check_packages()
    first, *others = models
    asked = as_whole_teacher(models[first])
    known = {first: _model_of(asked)} | {name: with_variables(models[name]) for name in others}
    batch = as_batch(data)
    count = jax.tree.leaves(batch.inputs)[0].shape[0]
    if asked is None or not count:
        raise ConfigError("there are no examples to measure on: give at least one")
    taught = np.asarray(teacher_logits(asked, batch, prepare=prepare), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        calls: dict[tuple[str, str, int], Any] = {}
        work: dict[str, float | None] = {}
        for place, (name, model) in enumerate(known.items()):
            work[name] = None
            if model is None:
                continue
            if isinstance(model.network, HostNetwork):
                files |= _of_host(name, model.network.host, batch.inputs, prepare, batches, calls)
                continue
            work[name] = latency.operations(traced(model, batch.inputs, prepare=prepare, batch=1))
            for size in batches:
                program = traced(model, batch.inputs, prepare=prepare, batch=size)
                calls[name, "XLA", size] = latency.in_xla(program, _some(batch.inputs, size))
            made = {}
            if onnx:
                with contextlib.suppress(*([] if place else [ConfigError])):
                    made[name] = to_onnx(model, Path(folder) / f"{place}.onnx", batch.inputs, prepare=prepare)
            if onnx and int8 and place:
                own = f"{name}, {INT8}"
                made[own], work[own] = to_int8(made[name], Path(folder) / f"{place}-int8.onnx"), None
            for own, file in made.items():
                for size in batches:
                    calls[own, "onnxruntime", size] = latency.in_onnxruntime(file, _some(batch.inputs, size))
            files |= made
        seconds = latency.interleaved(calls, rounds=rounds)
        rows = {}
        for label in [*known, *(one for one in work if one not in known)]:
            measures = _measured(label, known, files, batch, taught, prepare)
            times = {(of, size): each for (one, of, size), each in seconds.items() if one == label}
            model = known.get(label, known.get(label.removesuffix(f", {INT8}")))
            rows[label] = Row(
                None if model is None or isinstance(model.network, HostNetwork) else count_parameters(model),
                files[label].stat().st_size if label in files else None, work[label], measures,
                _interval(measures, batch),
                dict(sorted(times.items(), key=lambda item: (item[0][0] == "XLA", item[0][1]))),
            )  # fmt: skip
    return Report(rows, count, rounds, _environment())


def _model_of(teacher: Any) -> Model | None:
    """The model of a teacher that has one."""
    return Model(teacher.network, teacher.variables) if isinstance(teacher, LiveTeacher) else None


def _of_host(
    name: str, host: Any, inputs: PyTree, prepare: Any, batches: tuple[int, ...], calls: dict[Any, Any]
) -> dict[str, Path]:
    """The file of a teacher that is one, whose calls are added to `calls` for each number of examples that it takes."""
    if not (isinstance(host, Session) and Path(host.name).expanduser().is_file()):
        return {}
    session = open_session(host.name, output=host.output, threads=1)
    for size in batches:
        given = _some(inputs, size)
        given = given if prepare is None else jax.tree.map(np.asarray, prepare(jax.random.key(0), given, False))
        with contextlib.suppress(ConfigError):
            session.logits(given)
            calls[name, "onnxruntime", size] = partial(session.logits, given)
    return {name: Path(host.name).expanduser()}


def _measured(
    label: str, known: Mapping[str, Model | None], files: Mapping[str, Path], batch: Batch, taught: Any, prepare: Any
) -> dict[str, float]:
    """The measures of a row; the teacher's are of its logits."""
    # They are in the examples' order.
    batch = batch._replace(indices=None)
    if label == next(iter(known)):
        return dict(evaluate(from_function(lambda params, logits: logits, {}), batch._replace(inputs=taught)))
    model = known.get(label)
    if model is None:
        # The file has `prepare` in it; a model has not.
        return dict(evaluate(from_onnx(files[label]), batch, teacher=cached(taught), batch_size=BATCHES[-1]))
    return dict(evaluate(model, batch, teacher=cached(taught), prepare=prepare))


def _interval(measures: Mapping[str, float], batch: Batch) -> tuple[float, float] | None:
    """Of the accuracy, where each example counts as one trial."""
    labelled = int(measures.get("correct", 0) + measures.get("errors", 0))
    weights = np.ones(1) if batch.weights is None else np.asarray(batch.weights)
    if not labelled or np.ndim(batch.labels) != 1 or len(np.unique(weights[weights != 0])) > 1:
        return None
    return proportion_interval(int(measures["correct"]), labelled)


def _some(inputs: PyTree, size: int) -> PyTree:
    """So many examples, again from the first where there are too few."""
    return jax.tree.map(lambda leaf: np.resize(np.asarray(leaf), (size, *np.shape(leaf)[1:])), inputs)


def _environment() -> dict[str, Any]:
    versions = {"kd_jax": __version__, "jax": jax.__version__}
    with contextlib.suppress(ImportError):
        versions["onnxruntime"] = importlib.import_module("onnxruntime").__version__
    return {**versions, "device": jax.devices()[0].device_kind, "machine": platform.machine(), "cpus": os.cpu_count()}
