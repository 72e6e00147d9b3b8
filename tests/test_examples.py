"""The programs of examples/ run on a few images, and end in a table."""

import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pages import ROOT
from slowly import all_but

import kd_jax as kd

# Of language models: tests/test_language_examples.py.
OTHERS = ("g2p", "byte_language_model")
ALL = sorted((ROOT / "examples").glob("*.py"))
EXAMPLES = [path for path in ALL if path.stem not in OTHERS]
FASTER = {
    "compare_methods": {"width": 16},
    "magika_smaller": {
        "epochs": 1,
        "students": {"a small one": (4, 4)},
        "small": {"one at random": (4, 8)},
        "roots": [str(ROOT)],
    },
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


@pytest.mark.parametrize("path", all_but(lambda path: path.stem == "own_cnn", EXAMPLES), ids=lambda path: path.stem)
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
    count = 128
    if path.stem == "recogniser_smaller":
        if not importlib.util.find_spec("rapidocr"):
            pytest.skip("rapidocr is missing")
        # Each of its lines has 20 positions of 18,710 outputs.
        count, more = 16, {"epochs": 1, "seeds": 1, "width": 4}
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        loaded(path).main(count, **more)
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


def of_bytes(files: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 257, (files, 2048)).astype(np.int32)


def test_a_factorised_student_of_all_ranks_is_its_teacher() -> None:
    example = loaded(ROOT / "examples" / "magika_smaller.py")
    teacher = example.ByteCNN(epsilon=1e-6, rngs=nnx.Rngs(1))
    seen = of_bytes(8)
    whole, low = example.factorised(teacher, (512, 214), seen[:6]), example.factorised(teacher, (64, 80), seen[:6])
    logits = np.asarray(teacher(seen))
    assert np.abs(np.asarray(whole(seen)) - logits)[:6].max() < 1e-3 * np.abs(logits).max()
    assert 0.01 < np.abs(np.asarray(low(seen)) - logits).max() / np.abs(logits).max() < 2
    ranks = example.FACTORISED["a quarter"]
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(example.Factorised(ranks, rngs=nnx.Rngs(0))))) == 191_990
    assert 191_990 < 784_214 / 4


def test_a_low_rank_is_nearest_on_the_inputs_that_were_seen() -> None:
    example, rng = loaded(ROOT / "examples" / "magika_smaller.py"), np.random.default_rng(0)
    x, matrix = rng.normal(size=(200, 12)) * 3.0 ** -np.arange(12), rng.normal(size=(12, 7))

    def error(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.square(x @ (one @ other - matrix)).sum())

    def plain(rank: int) -> tuple[np.ndarray, np.ndarray]:
        left, size, right = np.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank] * size[:rank], right[:rank]

    for rank in (1, 3, 6):
        found = example.low_rank(matrix, x.T @ x, rank)
        assert found[0].shape == (12, rank)
        assert found[1].shape == (rank, 7)
        # Of what is left out, in squares: the singular values of `x @ matrix`, by Eckart and Young.
        left_out = np.square(np.linalg.svd(x @ matrix, compute_uv=False)[rank:]).sum()
        np.testing.assert_allclose(error(*found), left_out, rtol=1e-4)
        assert error(*found) < 0.9 * error(*plain(rank))
    assert error(*example.low_rank(matrix, x.T @ x, 7)) < 1e-9 * np.square(x @ matrix).sum()


def test_a_gradient_through_the_places_that_count_is_that_through_all() -> None:
    example = loaded(ROOT / "examples" / "magika_smaller.py")
    student, seen = example.Factorised((4, 3), rngs=nnx.Rngs(0)), of_bytes(3)
    student.table[...] = jax.random.normal(jax.random.key(1), (257, 64))

    def through_all(one: nnx.Module, tokens: np.ndarray) -> jax.Array:
        x = example.normalised(tokens, one.table[...], one.scale[...], one.shift[...], 1e-6)
        return one.head(one.small(one.norm(nnx.gelu(one.conv(one.narrow(x)).max(1)))))

    graph, trained, fixed = nnx.split(student, nnx.Param, ...)

    def loss(trained: nnx.State, forward: Any) -> jax.Array:
        return (forward(nnx.merge(graph, trained, fixed), jnp.asarray(seen)) ** 2).sum()

    own = jax.value_and_grad(loss)(trained, lambda one, tokens: one(tokens))
    other = jax.value_and_grad(loss)(trained, through_all)
    for one, two in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-4 * float(jnp.abs(two).max()))
        assert float(jnp.abs(two).max()) > 0


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


def recogniser_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int = 50) -> tuple[ModuleType, str]:
    """The example for few outputs, and a wheel of a network that has as many, and 50 characters with none and space."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    example = loaded(ROOT / "examples" / "recogniser_smaller.py")
    monkeypatch.setattr(example, "CLASSES", 50)
    known = {
        "shape": np.array([0, 18, -1]),
        "weights": np.random.default_rng(0).normal(size=(18, classes)).astype(np.float32),
    }
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("AveragePool", ["x"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
            node("Reshape", ["pooled", "shape"], ["rows"]),
            node("Transpose", ["rows"], ["places"], perm=[0, 2, 1]),
            node("MatMul", ["places", "weights"], ["logits"]),
            node("Softmax", ["logits"], ["probabilities"], axis=2),
        ],
        "small",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 3, 48, "width"])],
        [value("probabilities", onnx.TensorProto.FLOAT, ["batch", "positions", classes])],
        [onnx.numpy_helper.from_array(array, name) for name, array in known.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.helper.set_model_props(model, {"character": "\n".join(map(chr, range(65, 113)))})
    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"rapidocr/{example.MODEL}", model.SerializeToString())
    return example, str(wheel)


@pytest.mark.slow
def test_a_recogniser_goes_on_after_the_trainings_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, wheel = recogniser_of(tmp_path, monkeypatch)
    how: dict[str, Any] = {"where": wheel, "epochs": 1, "width": 4, "budgets": (14,), "out": str(tmp_path / "out")}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = example.main(16, seeds=1, **how)
        assert list(found["runs"])[:4] == [
            "all logits",
            "its most probable class",
            "top 3, renormalised",
            "top 3, tail",
        ]
        drawn = list(found["runs"])[4]
        sizes = {name: of[0]["bytes"] for name, of in found["runs"].items()}
        # Of 50 outputs a class is one byte in a cache.
        assert sizes["all logits"] == pytest.approx(100, rel=0.05)
        assert sizes["top 3, tail"] == sizes["top 3, renormalised"] == pytest.approx(11, rel=0.2)
        assert 10 < sizes[drawn] < 16
        assert found["teacher"]["KL"] == pytest.approx(0, abs=1e-6)
        assert found["teacher"]["agreement"] == 1
        assert all(0 < of[0]["KL"] < 10 for of in found["runs"].values())
        # Each way trains another student.
        assert len({of[0]["KL"] for of in found["runs"].values()}) == 5

        # As it is after a kill in the last training.
        file = tmp_path / "out" / "results.json"
        kept = json.loads(file.read_text())
        assert kept["runs"] == found["runs"]
        (ended,) = kept["runs"].pop(drawn)
        file.write_text(json.dumps(kept))
        more = example.main(16, seeds=1, **how)["runs"]
        (again,) = more.pop(drawn)
        assert more == kept["runs"]
        assert again | {"seconds": 0} == ended | {"seconds": 0}
        with pytest.raises(SystemExit, match=r"results\.json is of .* give another folder"):
            example.main(16, seeds=1, **how | {"epochs": 2})
    printed = capsys.readouterr().out
    assert printed.count(f"{drawn}, seed 0: ") == 2
    assert printed.count(", seed 0: ") == 6
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in printed
    assert table.count("\n") == 8
    assert (tmp_path / "out" / "recogniser.png").stat().st_size > 10_000


def test_what_a_recogniser_reads_and_how_many_draws_fit() -> None:
    example = loaded(ROOT / "examples" / "recogniser_smaller.py")
    assert example.decoded(np.array([0, 1, 1, 0, 1, 2, 2, 0]), ["", "a", "b"]) == "aab"
    assert example.distance("kitten", "sitting") == 3
    assert example.distance("", "abc") == 3
    words, others = example.of_text(None)
    fonts = example.fonts_in(example.FONTS)
    images, texts = example.lines(words, 8, fonts, seed=0)
    again, same = example.lines(words, 8, fonts, seed=0)
    assert (images == again).all()
    assert images.shape == (8, 48, 160)
    assert images.dtype == np.uint8
    assert texts == same
    assert len(set(texts)) == 8
    assert set(" ".join(texts).split()) <= set(words)
    assert texts[0] not in example.lines(words, 8, fonts, seed=0, but={texts[0]})[1]
    assert len(others) == pytest.approx(len(words) / 4, abs=2)
    # Sure of one class, an entry of 3 bytes and their number.
    sure = np.eye(18_710, dtype=np.float32)[:5]
    assert example.draws_for(3.9, [sure]) == 2  # up to which an entry has 2 bytes
    assert example.draws_for(4, [sure, sure[:2]]) == 255
    # Of two alike, N draws are of 2 - 2^(1 - N) classes in the mean.
    even = np.zeros((5, 18_710), np.float32)
    even[:, :2] = 0.5
    assert example.draws_for(1 + 3 * 1.9, [even]) == 4
    with pytest.raises(SystemExit, match=r"1 bytes a position are asked for: a draw takes 3\.0"):
        example.draws_for(1, [sure])
    with pytest.raises(SystemExit, match=r"5 bytes a position .* give at least 6"):
        example.ways([5], [sure])


def test_a_package_that_is_no_recognisers_and_a_folder_without_fonts_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example, wheel = recogniser_of(tmp_path, monkeypatch, classes=49)
    with pytest.raises(SystemExit, match=r"has the shapes .*49.* name a wheel of that version"):
        example.package(wheel, tmp_path)
    with pytest.raises(SystemExit, match=r"has no models/PP-OCRv6_rec_small\.onnx, as rapidocr 3\.10\.0 has"):
        example.package(str(tmp_path / "none"), tmp_path)
    other = tmp_path / "other"
    (other / "models").mkdir(parents=True)
    (other / example.MODEL).write_bytes(b"no model")
    with pytest.raises(SystemExit, match=r"onnxruntime cannot open"):
        example.package(str(other), tmp_path)
    with pytest.raises(SystemExit, match=r"has no \.ttf or \.otf font with Latin letters"):
        example.fonts_in(str(tmp_path))
    (tmp_path / "a.ttf").write_bytes(b"no font")
    with pytest.raises(SystemExit, match=r"has no \.ttf or \.otf font with Latin letters"):
        example.fonts_in(str(tmp_path))
    (tmp_path / "a.txt").write_text("a few words")
    with pytest.raises(SystemExit, match="has 3 words: give at least 1000"):
        example.of_text(str(tmp_path / "a.txt"))
    with pytest.raises(SystemExit, match=r"cannot be read as UTF-8 text"):
        example.of_text(str(tmp_path / "none.txt"))
    with pytest.raises(SystemExit, match=r"the text gives .* lines that differ, and 99 are asked for"):
        example.lines(["same"] * 1000, 99, example.fonts_in(example.FONTS), seed=0)


def test_the_page_of_examples_names_each() -> None:
    text = (ROOT / "docs" / "examples.md").read_text()
    assert EXAMPLES
    every = [*ALL, *(ROOT / "examples").glob("*.ipynb")]
    assert [path.name for path in every if f"(../examples/{path.name})" not in text] == []


def test_magikas_students_go_on_from_the_files_and_trainings_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("magika")
    example = loaded(ROOT / "examples" / "magika_smaller.py")
    more = FASTER["magika_smaller"] | {"out": str(tmp_path / "out")}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        first = example.main(64, **more)
        capsys.readouterr()
        # Other files are there now, and those of before count.
        monkeypatch.setattr(example, "files", None)
        again = example.main(64, **more, seeds=2)
        with pytest.raises(SystemExit, match=r"is of .*'epochs': 1.*, and not of .*'epochs': 2.*: give another folder"):
            example.main(64, **(more | {"epochs": 2}))
        with pytest.raises(SystemExit, match=r"pieces\.npz has pieces of other files, .*: give another folder"):
            example.main(64, **more, each=2)
    printed = capsys.readouterr().out
    assert "seed 0" not in printed
    assert printed.count("seed 1") == 4
    for label, of in first["models"].items():
        assert again["models"][label]["runs"][0] == of["runs"][0]
        assert len(again["models"][label]["runs"]) == (1 if label == "teacher" else 2)
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "a-small-one-hard-answers-alone.onnx", "a-small-one-kd-and-fitnet.onnx", "a-small-one-kd.onnx", "answers",
        "files.npz", "magika.png", "models.json", "one-at-random-kd.onnx", "pieces.npz", "results.json", "results.md",
        "taught", "types.md",
    ]  # fmt: skip
