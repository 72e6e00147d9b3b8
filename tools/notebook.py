"""Runs examples/reference_notebook.ipynb, and keeps it with its outputs: `python -m tools.notebook`.

What is kept says of which cells it is: `tests/test_notebook.py` fails where they were changed afterwards.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "reference_notebook.ipynb"


def read(path: Path = NOTEBOOK) -> Any:
    """A notebook, as nbformat has it."""
    return nbformat.read(path, as_version=4)


def execute(notebook: Any, folder: Path) -> Any:
    """Runs a notebook on a CPU, in `folder`, in a kernel that keeps nothing; the notebook with its new outputs.

    Raises `nbclient.exceptions.CellExecutionError` at the first cell that fails.
    """
    own = {"IPYTHONDIR": str(folder / "ipython"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
        record_timing=False, coalesce_streams=True,
    )  # fmt: skip
    return client.execute(env={**os.environ, **own})


def digest(notebook: Any) -> str:
    """SHA-256 of the cells, without their outputs."""
    cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def main() -> None:
    """Runs the notebook, and writes it."""
    notebook = read()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "cells_sha256": digest(notebook)}
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
