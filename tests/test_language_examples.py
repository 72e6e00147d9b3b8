"""The examples of language models: a published teacher says what it said before, and both programs end in a table."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from pages import ROOT

import kd_jax as kd
from kd_jax.models import count_parameters

pytestmark = pytest.mark.usefixtures("quick_compiling")


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folder_of(package: str) -> Path:
    """Where a package lies, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(found.origin).parent


@pytest.fixture
def g2p_en(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package's own code, without what it imports and downloads for its dictionary."""
    folder = folder_of("g2p_en")
    for name in ("nltk", "nltk.corpus", "nltk.tokenize", "nltk.data", "g2p_en", "g2p_en.expand"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    def stub(module: str, **values: object) -> None:
        for name, value in values.items():
            setattr(sys.modules[module], name, value)

    stub("nltk.data", find=lambda name: name)
    stub("nltk", data=sys.modules["nltk.data"], pos_tag=None)
    stub("nltk.corpus", cmudict=type("Words", (), {"dict": staticmethod(dict)}))
    stub("nltk.tokenize", TweetTokenizer=type("Tokenizer", (), {"tokenize": None}))
    stub("g2p_en.expand", normalize_numbers=None)
    stub("g2p_en", __path__=[str(folder)])
    monkeypatch.delitem(sys.modules, "g2p_en.g2p", raising=False)
    with warnings.catch_warnings():
        # Of its regular expressions.
        warnings.simplefilter("ignore")
        return importlib.import_module("g2p_en.g2p")


# It leaves its file open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_checkpoint_of_g2p_en_says_the_same_phonemes(g2p_en: ModuleType) -> None:
    theirs, example = g2p_en.G2p(), loaded("g2p")
    assert theirs.phonemes[4:] == example.PHONEMES[4:]
    teacher = example.load_teacher(Path(str(g2p_en.__file__)).parent / "checkpoint20.npz")
    assert count_parameters(kd.models.as_model(teacher)) == 834_890
    words = ["activationist", "zyzzyva", "kubernetes", "x", "qwerty", "pneumonoultramicroscopic", "o'brien", "jax"]
    assert example.phonemes(teacher, words) == [theirs.predict(word) for word in words]


def test_errors_are_counted_as_edits() -> None:
    example = loaded("g2p")
    assert example.distance("kitten", "sitting") == 3
    assert example.distance("", "abc") == example.distance("abc", "") == 3
    assert example.error_rate([["a", "b"], ["c"]], [["a", "c"], ["c"]]) == pytest.approx(1 / 3)


def test_the_pronunciation_example_ends_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("g2p_en", "cmudict", "names"):
        folder_of(package)
    example = loaded("g2p")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        example.main(64, tested=8, epochs=1, seeds=1, width=8, out=str(tmp_path / "g2p"))
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "g2p" / "results.json").read_text())
    assert len(found["error_rates"]) == 9
    assert all(name in printed for name in found["error_rates"])
    assert all(np.isfinite(of["surnames"]).all() for of in found["error_rates"].values())
    assert "| teacher" in printed


@pytest.mark.slow
def test_the_language_model_example_ends_in_a_table_and_goes_on_after_a_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = (ROOT / "LICENSE").read_bytes()[:8192], tmp_path / "bytes"
    sizes = {"layers": (1, 1), "seeds": 2, "epochs": 1, "width": 16, "length": 32, "batch_size": 64}
    example = loaded("byte_language_model")

    def printed() -> str:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            example.main(text, **sizes, out=str(out))
        return capsys.readouterr().out

    said = printed()
    table = (out / "results.md").read_text()
    assert table in said
    assert "bits per byte" in table
    assert "'And the " in said
    file = json.loads((out / "results.json").read_text())
    values = file["bits_per_byte"]
    assert [len(values[name]) for name in ("teacher", "alone", "KD", "JSD")] == [1, 2, 2, 2]
    pair = kd.paired_comparison(values["alone"], values["KD"], metric="bits", comparisons=2)
    assert pair.ci95 is not None
    assert f"{pair.mean_difference:+.4f} ({pair.ci95[0]:+.4f} to {pair.ci95[1]:+.4f})" in table
    # As a kill leaves it before the last training: that one alone is done again, with the teacher that was kept.
    trained = []
    distill = kd.distill
    monkeypatch.setattr(kd, "distill", lambda *given, **how: trained.append(how["key"]) or distill(*given, **how))
    file["bits_per_byte"] = values | {"JSD": values["JSD"][:1]}
    (out / "results.json").write_text(json.dumps(file))
    assert printed() == said
    assert trained == [1]
    assert json.loads((out / "results.json").read_text())["bits_per_byte"] == values
    with pytest.raises(SystemExit, match="give another folder"):
        example.main(text[:-1], **sizes, out=str(out))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("g2p", {"seeds": 0}),
        ("byte_language_model", {"text": b"a" * 9, "seeds": 0}),
        ("crepe_smaller", {"count": 0, "font": "none.sf2"}),
        ("magika_smaller", {"count": 0}),
        ("recogniser_smaller", {"epochs": 0}),
    ],
)
def test_an_example_is_asked_for_at_least_one_of_each(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(kd.ConfigError, match=r"(seeds|notes|files|epochs) is 0: it must be a whole number of at least"):
        loaded(name).main(**given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["missing.txt"], "No such file or directory: 'missing.txt'"),
        (["short.txt"], "the text has 3 bytes: give at least 4,608"),
        (["text.txt", "--out", "text.txt/out"], "Not a directory: 'text.txt/out'"),
        (["short.txt", "--seeds", "0"], "seeds is 0: it must be a whole number of at least 1"),
    ],
)
def test_the_language_model_example_says_in_one_sentence_what_it_cannot_use(
    given: list[str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("hi\n")
    (tmp_path / "text.txt").write_text("a" * 4608)
    script = str(ROOT / "examples" / "byte_language_model.py")
    ended = subprocess.run([sys.executable, script, *given], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1
