"""What is left of a benchmark: Markdown, JSON and the machine that the figures hold for."""

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from tabulate import tabulate

from benchmarks import kd_jax_ways, plots
from benchmarks.measure import Table, quartiles, ratios
from benchmarks.steps import has_torch

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "keras")


def markdown(table: Table) -> str:
    """Medians; beside each but the baseline's how many times better the baseline is, with the quartiles of that."""
    columns = table.columns()
    cells = [
        [row, *[_cell(table, by_column, column) for column in columns]] for row, by_column in table.figures.items()
    ]
    grid = [[table.unit, *columns], *cells]
    headers, *rows = zip(*grid, strict=True) if table.turned else grid
    align = ("left", *["right"] * (len(headers) - 1))
    text = tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"## {table.title}\n\n{text}\n\n{notes}\n"


def document(tables: Sequence[Table], facts: dict[str, Any], command: str) -> str:
    """All tables, and how and where they were made."""
    machine = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    explained = (
        "Medians. In brackets: how many times better kd_jax is, the median and the quartiles of the ratio within a "
        "round; against the limit, the part of it that kd_jax reaches."
    )
    parts = [f"`{command}`\n\n{explained}\n", *[markdown(table) for table in tables], f"## The machine\n\n{machine}\n"]
    return "\n".join(parts)


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": ", ".join(_versions()),
        **kd_jax_ways.environment(),
    }
    facts |= {name: os.environ[name] for name in ("XLA_FLAGS", "OMP_NUM_THREADS") if name in os.environ}
    if has_torch():
        from benchmarks import torch_ways

        facts |= torch_ways.environment()
    return facts


def write(tables: Sequence[Table], facts: dict[str, Any], command: str, folder: Path) -> None:
    """throughput.md, throughput.json with every round, and throughput.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "throughput.md").write_text(document(tables, facts, command), encoding="utf-8")
    content = {"command": command, "environment": facts, "tables": {one.name: one._asdict() for one in tables}}
    text = json.dumps(content, indent=1, ensure_ascii=False, default=dict)
    (folder / "throughput.json").write_text(text + "\n", encoding="utf-8")
    plots.write(tables, folder / "throughput.png")


def devices() -> str:
    """The devices that JAX uses, for a first line."""
    return ", ".join(device.device_kind for device in jax.devices())


def _cell(table: Table, by_column: dict[str, list[float]], column: str) -> str:
    values, baseline = by_column.get(column), by_column.get(table.baseline)
    if values is None:
        return "–"
    text = _number(quartiles(values)[1])
    if column == table.baseline or baseline is None:
        return text
    low, middle, high = quartiles(ratios(values, baseline, rate=table.rate))
    spread = f", {_ratio(low)} to {_ratio(high)}" if len(values) > 1 else ""
    return f"{text} ({_ratio(middle)}×{spread})"


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 1 else f"{value:.4g}"


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
