"""The programs of examples/ run on a few images, and end in a table."""

import importlib.util
from pathlib import Path
from types import ModuleType

import jax
import pytest
from pages import ROOT

# Of language models: tests/test_language_examples.py.
OTHERS = ("g2p", "byte_language_model")
ALL = sorted((ROOT / "examples").glob("*.py"))
EXAMPLES = [path for path in ALL if path.stem not in OTHERS]
FASTER = {"compare_methods": {"width": 16}}
NEEDS = {"grain_random_crops": "grain", "pytorch_teacher": "torch"}

pytestmark = pytest.mark.usefixtures("quick_compiling")


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_ends_in_a_table(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip(NEEDS.get(path.stem, "jax"))
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        loaded(path).main(128, **FASTER.get(path.stem, {}))
    printed = capsys.readouterr().out
    assert "teacher" in printed
    assert "accuracy" in printed
    assert "---" in printed
    if path.stem == "compare_methods":
        assert sorted(one.name for one in (tmp_path / "runs" / "compare-methods").iterdir()) == [
            "comparison.png", "learning-curves.png", "results.json", "results.md", "size.png",
        ]  # fmt: skip


def test_the_page_of_examples_names_each() -> None:
    text = (ROOT / "docs" / "examples.md").read_text()
    assert EXAMPLES
    every = [*ALL, *(ROOT / "examples").glob("*.ipynb")]
    assert [path.name for path in every if f"(../examples/{path.name})" not in text] == []
