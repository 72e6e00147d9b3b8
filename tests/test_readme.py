import json
import re
from pathlib import Path

import pytest
from pages import ROOT, blocks, few_images, run

import kd_jax

README = ROOT / "README.md"
MOST_LINES = 120


def shape_of(line: str) -> list[str]:
    """The words of a line of a table; numbers are those of the data, and lines as wide as they."""
    return re.findall(r"[a-z_]+", line.lower())


@pytest.mark.usefixtures("quick_compiling")
def test_the_code_runs_on_a_few_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One block after the other, and the output has the form of what is printed there."""
    few = few_images()
    monkeypatch.setattr(kd_jax, "load", lambda source: few)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = []
    for block in blocks(README):
        run(README, block, names)
        assert block.output is not None
        printed.append((capsys.readouterr().out.strip().splitlines(), block.output.strip().splitlines()))
    (distilled, comparison) = printed
    assert [shape_of(line) for line in distilled[0]] == [shape_of(line) for line in distilled[1]]
    table, wanted = ([shape_of(line) for line in lines if line] for lines in comparison)
    # The sentence of the conclusion ends as the data says, and examples and parameters are as many.
    assert table[:5] == wanted[:5]
    assert [line[:7] for line in table[5:]] == [line[:7] for line in wanted[5:]]


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize(("folder", "preset"), [("run", "tuned"), ("without-shifts", "tuned-without-shifts")])
def test_kept_runs_are_of_the_presets_as_they_are(folder: str, preset: str) -> None:
    kept = json.loads((ROOT / "results" / "tuned" / folder / "results.json").read_text())["config"]
    config = kd_jax.make_config(preset, seeds=kept["seeds"], seed=kept["seed"])
    earlier = {"warmup": 0.0, "teacher_warmup": 0.0, "shift_share": 1.0, "teacher_shift_share": 1.0}
    assert earlier | kept | {"preset": preset} == json.loads(json.dumps(config.as_dict()))
