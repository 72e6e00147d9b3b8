"""The whole notebook in PyTorch, as a process: teacher, student, distilled student, each trained and evaluated.

`python -m benchmarks.torch_run --way WAY --data FILE.npz --epochs N`. It imports nothing of kd_jax that imports JAX.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks import torch_ways

NOTEBOOK = "notebook"
FIRST_STEP = "first step done"


def main() -> None:
    """Prints a line after the first step, and at the end the counts of right answers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=[NOTEBOOK, *torch_ways.TUNED], required=True)
    parser.add_argument("--data", type=Path, required=True, help="npz file with x_train, y_train, x_test, y_test")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(42)
    print(json.dumps(whole(options.way, _load(options.data), options.epochs)), flush=True)


def whole(way: str, data: Any, epochs: int) -> dict[str, int]:
    """Right answers of the three models."""
    steps, first = len(data.train_labels) // 32, True
    correct: dict[str, int] = {}
    teacher = None
    for row in ("teacher", "student", "distilled"):
        job = torch_ways.Job(row, data, teacher)
        train = job.notebook() if way == NOTEBOOK else job.tuned(way)
        fewest = torch_ways.fewest_steps(way, steps)
        train(fewest)
        if first:
            torch_ways.wait()
            print(FIRST_STEP, flush=True)
            first = False
        train(epochs * steps - fewest)
        correct[row] = int(torch_ways.evaluation(job.model, data, tuned=way != NOTEBOOK).run())  # type: ignore[call-overload]
        teacher = job.model if row == "teacher" else teacher
    if torch_ways.device() == "cuda":
        correct["peak device bytes"] = torch.cuda.max_memory_allocated()
    return correct


def _load(path: Path) -> Any:
    with np.load(path) as file:
        return SimpleNamespace(
            train_images=file["x_train"], train_labels=file["y_train"],
            test_images=file["x_test"], test_labels=file["y_test"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
