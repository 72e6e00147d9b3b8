"""Teacher against student: size, operations, latency and accuracy; as a table, Markdown, JSON and a plot."""

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tabulate import tabulate

from kd_jax.data.batch import Batch, as_batch, check_whole
from kd_jax.errors import ConfigError
from kd_jax.evaluate import evaluate, predict
from kd_jax.export import latency
from kd_jax.export.latency import Quartiles
from kd_jax.export.onnx import to_int8, to_onnx
from kd_jax.export.program import traced, with_variables
from kd_jax.files.written import write_whole
from kd_jax.models import Model, count_parameters, from_onnx
from kd_jax.stats import proportion_interval
from kd_jax.teacher import cached
from kd_jax.version import __version__

PyTree = Any

BATCHES = (1, 32)
INT8 = "int8"


class Row(NamedTuple):
    """One model, or its ONNX file with int8 weights.

    parameters: trained numbers. size: of the ONNX file, in bytes. operations: floating-point ones for one example; None
    of int8. measures: as of `kd.evaluate`. interval: 95 % of the accuracy, over examples; None without labels.
    seconds: by runtime ("onnxruntime" on one thread, "XLA") and number of examples in a call.
    """

    parameters: int
    size: int
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
        """All numbers, as JSON holds them; latencies in seconds, by runtime and number of examples."""
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
        return {"models": rows, **known}

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
        """A figure of Matplotlib: accuracy, or agreement without labels, against the latency of one example.

        Bars are quartiles of the latency, and the 95 % interval of the accuracy.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.0, 4.4), layout="constrained")
        panel = figure.subplots()
        measure = "accuracy" if all(row.interval for row in self.rows.values()) else "agreement"
        for (name, row), colour in zip(self.rows.items(), _COLOURS * len(self.rows), strict=False):
            for (runtime, batch), found in row.seconds.items():
                if batch != BATCHES[0]:
                    continue
                value = 100 * row.measures.get(measure, 1.0)
                low, high = (value, value) if row.interval is None else (100 * part for part in row.interval)
                micro = [1e6 * part for part in found]
                panel.errorbar(
                    micro[1], value, xerr=[[micro[1] - micro[0]], [micro[2] - micro[1]]],
                    yerr=[[max(0.0, value - low)], [max(0.0, high - value)]] if measure == "accuracy" else None,
                    fmt=_MARKS[runtime], color=colour, capsize=3, markersize=7, label=f"{name}, {runtime}",
                )  # fmt: skip
        panel.set_xscale("log")
        panel.set_xlabel("microseconds for one example, median and quartiles")
        panel.set_ylabel("accuracy (%)" if measure == "accuracy" else "agrees with the teacher (%)")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
        return figure

    def _text(self, form: str) -> str:
        columns = list(next(iter(self.rows.values())).seconds)
        every = list({key: None for row in self.rows.values() for key in row.seconds} or columns)
        cells = [self._cells(name, row, every) for name, row in self.rows.items()]
        # A column for each model.
        table = [list(line) for line in zip(self._titles(every), *cells, strict=True)]
        table = [line for line in table[1:] if any(line[1:])]
        header = ["", *self.rows]
        align = ("left", *["right"] * len(self.rows))
        body = tabulate(table, header, tablefmt=form, colalign=align, disable_numparse=True)
        note = (
            f"Latencies are medians (quartiles) of {self.rounds} rounds in turn; onnxruntime has one thread. Accuracy "
            f"and agreement are of {self.examples:,} examples; the interval (95 %, Wilson's) is about other examples."
        )
        return f"{body}\n\n{note}"

    @staticmethod
    def _titles(every: list[tuple[str, int]]) -> list[str]:
        return [
            "", "parameters", "ONNX file (kB)", "operations (million)", "accuracy (%)", "95 % interval",
            "agrees with the teacher (%)", "KL to the teacher (nats)", "calibration error (%)",
            *(f"{runtime}, {batch} in a call (µs)" for runtime, batch in every),
        ]  # fmt: skip

    @staticmethod
    def _cells(name: str, row: Row, every: list[tuple[str, int]]) -> list[str]:
        def per_cent(measure: str) -> str:
            return f"{100 * row.measures[measure]:.2f}" if measure in row.measures else ""

        kl = row.measures.get("kl_to_teacher")
        interval = "" if row.interval is None else f"{100 * row.interval[0]:.2f} to {100 * row.interval[1]:.2f}"
        times = (row.seconds.get(key) for key in every)
        return [
            name, f"{row.parameters:,}", f"{row.size / 1000:,.1f}",
            "" if row.operations is None else f"{row.operations / 1e6:,.3g}",
            per_cent("accuracy"), interval, per_cent("agreement"), "" if kl is None else f"{kl:.4f}", per_cent("ece"),
            *("" if one is None else _microseconds(one) for one in times),
        ]  # fmt: skip


def _microseconds(found: Quartiles) -> str:
    first, median, third = (1e6 * part for part in found)
    digits = 0 if median >= 100 else 1
    return f"{median:,.{digits}f} ({first:,.{digits}f} to {third:,.{digits}f})"


_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
_MARKS = {"onnxruntime": "o", "XLA": "s"}


def report(
    models: Any, data: Any, *, prepare: Any = None, int8: bool = True, rounds: int = 30,
    batches: tuple[int, ...] = BATCHES,
) -> Report:  # fmt: skip
    """Teacher against student, each measured in onnxruntime and XLA on this computer.

    models: by name; the first is the teacher, with which the others agree or not. Each is exported as ONNX first.
    data: a `Batch` in memory of held-out examples, with labels or without. prepare: as of the training.
    int8: whether each but the first is measured with int8 weights, too. rounds: in each of which every model, runtime
        and number of examples in `batches` is timed once.

    Raises `ConfigError` as `to_onnx`, and where there is nothing to measure.
    """
    if not isinstance(models, Mapping) or not models:
        raise ConfigError(
            "the report needs models by name, the teacher first: {'teacher': teacher, 'student': student}"
        )
    check_whole(rounds, "rounds")
    known = {name: with_variables(model) for name, model in models.items()}
    batch = as_batch(data)
    count = jax.tree.leaves(batch.inputs)[0].shape[0]
    if not count:
        raise ConfigError("there are no examples to measure on: give at least one")
    teacher = next(iter(known.values()))
    with tempfile.TemporaryDirectory() as folder:
        files, parameters, calls = {}, {}, {}
        work: dict[str, float | None] = {}
        for place, (name, model) in enumerate(known.items()):
            files[name] = to_onnx(model, Path(folder) / f"{place}.onnx", batch.inputs, prepare=prepare)
            parameters[name], work[name] = (
                count_parameters(model),
                latency.operations(traced(model, batch.inputs, prepare=prepare, batch=1)),
            )
            for size in batches:
                program = traced(model, batch.inputs, prepare=prepare, batch=size)
                calls[name, "XLA", size] = latency.in_xla(program, _some(batch.inputs, size))
            if int8 and place:
                own = f"{name}, {INT8}"
                files[own] = to_int8(files[name], Path(folder) / f"{place}-int8.onnx")
                parameters[own], work[own] = parameters[name], None
        for name, file in files.items():
            for size in batches:
                calls[name, "onnxruntime", size] = latency.in_onnxruntime(file, _some(batch.inputs, size))
        seconds = latency.interleaved(calls, rounds=rounds)
        rows = {}
        for label, file in files.items():
            # The file has `prepare` in it; a model has not.
            measured, by_hand = (known[label], prepare) if label in known else (from_onnx(file), None)
            measures = _measured(measured, by_hand, batch, teacher, prepare, is_teacher=measured is teacher)
            right = measures.get("correct")
            labelled = None if right is None else int(right + measures["errors"])
            times = {(of, size): each for (one, of, size), each in seconds.items() if one == label}
            rows[label] = Row(
                parameters[label], file.stat().st_size, work[label], measures,
                None if right is None or not labelled else proportion_interval(int(right), labelled),
                dict(sorted(times.items(), key=lambda item: (item[0][0] == "XLA", item[0][1]))),
            )  # fmt: skip
    return Report(rows, count, rounds, _environment())


def _measured(
    model: Model, own: Any, batch: Batch, teacher: Model, prepare: Any, *, is_teacher: bool
) -> dict[str, float]:
    """The measures of a model whose `prepare` is its own, beside a teacher's."""
    taught = None if is_teacher else cached(np.asarray(predict(teacher, batch.inputs, prepare=prepare)))
    return dict(evaluate(model, batch._replace(indices=None), teacher=taught, prepare=own))


def _some(inputs: PyTree, size: int) -> PyTree:
    """So many examples, again from the first where there are too few."""
    return jax.tree.map(lambda leaf: np.resize(np.asarray(leaf), (size, *np.shape(leaf)[1:])), inputs)


def _environment() -> dict[str, Any]:
    import onnxruntime

    versions = {"kd_jax": __version__, "jax": jax.__version__, "onnxruntime": onnxruntime.__version__}
    return {**versions, "device": jax.devices()[0].device_kind, "machine": platform.machine(), "cpus": os.cpu_count()}
