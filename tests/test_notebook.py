"""The reference notebook of examples/: what is kept is of its cells, and it runs on a few images."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from tools import notebook as tool

FEWER = {
    "IMAGES = 60_000": "IMAGES = 640",
    "(data.test_images / 255.0, data.test_labels)": "(data.test_images[:500] / 255.0, data.test_labels[:500])",
    "range(42, 47)": "range(42, 44)",
}


@pytest.fixture(scope="module")
def kept() -> Any:
    return tool.read()


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def text(notebook: Any) -> str:
    """All that is shown, pictures aside."""
    shown = [output.get("text", "") for output in outputs(notebook)]
    shown += [part for output in outputs(notebook) for kind, part in output.get("data", {}).items() if "text" in kind]
    return "\n".join(shown)


def kinds(notebook: Any) -> list[list[tuple[str, ...]]]:
    """Of each cell, what it shows."""
    return [
        [(one.output_type, one.get("name", ""), *sorted(one.get("data", ()))) for one in cell.get("outputs", ())]
        for cell in notebook.cells
    ]


def test_what_is_kept_is_of_the_cells_as_they_are(kept: Any) -> None:
    """Where this fails, run `python -m tools.notebook`."""
    assert kept.metadata["cells_sha256"] == tool.digest(kept)
    counts = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_nothing_of_the_machine_no_error_and_no_warning_is_kept(kept: Any) -> None:
    assert {output.output_type for output in outputs(kept)} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs(kept) if output.output_type == "stream"} == {"stdout"}
    assert not re.search(r"(?i)warning|error\b|(?<![\w<.])(?:/[\w.-]+){2,}|[A-Z]:\\", text(kept))
    assert "\r" not in text(kept)


def test_what_is_kept_is_of_the_whole_experiment(kept: Any) -> None:
    """The students alone are those of `results/notebook`, and the teacher is as good as that one."""
    shown, found = text(kept), json.loads((ROOT / "results" / "notebook" / "results.json").read_text())["models"]
    assert shown.count("9375/9375") == 3
    assert "2395210 parameters" in shown
    assert f"{found['student']['parameters']} parameters" in shown
    alone = [run["accuracy"] for run in found["student"]["runs"]]
    mean = float(re.search(r">alone</td><td[^>]*>\s*([\d.]+) ±", shown)[1])  # type: ignore[index]
    assert mean == pytest.approx(100 * sum(alone) / len(alone), abs=0.02)
    teacher = int(re.search(r"<td>teacher\s*</td><td[^>]*>\s*(\d{4})<", shown)[1])  # type: ignore[index]
    assert abs(teacher - found["teacher"]["runs"][0]["correct"]) < 50
    assert "no evidence of a difference" in shown


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiling")
def test_it_runs_on_a_few_images(kept: Any, tmp_path: Path) -> None:
    fewer = tool.read()
    for whole, part in FEWER.items():
        (cell,) = [cell for cell in fewer.cells if cell.cell_type == "code" and whole in cell.source]
        cell.source = cell.source.replace(whole, part)
    tool.execute(fewer, tmp_path)
    assert kinds(fewer) == kinds(kept)
    assert text(fewer).count("100/100") == 3
