"""Section `memory`: the largest resident and device memory of whole runs, as processes, and of 1,000 students."""

import json
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import processes, seeds
from benchmarks.end_to_end import kd_jax_command, save, torch_command
from benchmarks.measure import Figures, Setting, Table
from benchmarks.steps import NO_TORCH, has_torch

_MIB = 2**20


def memory(setting: Setting) -> list[Table]:
    """MiB, one run each."""
    students, of_students = (32, 1_600) if setting.quick else (1000, 6_400)
    images = 1_600 if setting.quick else len(setting.data.train_labels)
    host, device = "resident", "on the device"
    figures: Figures = {}
    seconds: dict[str, float] = {}
    notes = [
        f"1 epoch of {images:,} training images, with many students {of_students:,}; more epochs do not change the "
        "memory, and every further image takes 8 bytes for each student; resident: the largest of the "
        "process (VmHWM), Python and libraries included; on the device: what the framework's allocator tells",
        *([] if has_torch() else [NO_TORCH]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = save(setting.data, images, place / "data.npz")
        runs = {("the whole notebook", "kd_jax"): _kd_jax(data, 1, place)}
        runs |= {("the whole notebook", column): command for column, command in _torch(data).items()}
        refused = seeds.why_not(students, setting.data)
        if refused:
            notes.append(refused)
        else:
            few = save(setting.data, of_students, place / "few.npz")
            runs[f"{students:,} students of both kinds", "kd_jax"] = _kd_jax(few, students, place)
        for (row, column), command in tqdm(runs.items(), desc="memory", leave=False, disable=None):
            one = processes.run(command, mark="", environment={"KD_JAX_CACHE": str(place / "cache")})
            if one.peak_bytes:
                figures.setdefault(f"{row}, {host}", {})[column] = [one.peak_bytes / _MIB]
            seconds[f"{row}, {column}"] = one.seconds
            peak = _device_bytes(one.output)
            if peak:
                figures.setdefault(f"{row}, {device}", {})[column] = [peak / _MIB]
    notes.append("these runs took " + ", ".join(f"{value:.0f} s ({name})" for name, value in seconds.items()))
    if not any(row.endswith(device) for row in figures):
        notes.append("this device has no memory of its own, or does not tell what it used")
    return [Table("memory", "Peak memory", "MiB", figures, tuple(notes), details={"seconds": seconds})]


def _kd_jax(data: Path, students: int, place: Path) -> list[str]:
    command = kd_jax_command(data, 1, place / f"out-{students}", seeds=students)
    return ["-m", "benchmarks.kd_jax_run", *command[2:], "--quiet"]


def _torch(data: Path) -> dict[str, list[str]]:
    if not has_torch():
        return {}
    from benchmarks import torch_run, torch_ways

    way = "CUDA graphs" if torch_ways.device() == "cuda" else "eager"
    return {
        "notebook": torch_command(data, 1, torch_run.NOTEBOOK),
        "tuned PyTorch": torch_command(data, 1, way),
    }


def _device_bytes(output: list[str]) -> int | None:
    """What the last line, if it is JSON, says of the device's memory."""
    try:
        said: Any = json.loads(output[-1])
    except (IndexError, ValueError):
        return None
    return said.get("peak device bytes") if isinstance(said, dict) else None
