"""`reproduce cifar100` with small networks in the place of the papers' and a few images."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_jax import reproduce
from kd_jax.data.dataset import Dataset
from kd_jax.experiments.cifar100 import plan as table
from kd_jax.experiments.cifar100 import rows
from kd_jax.experiments.cifar100.plan import METHODS, PAIRS, PUBLISHED, Plan
from kd_jax.models import zoo
from kd_jax.stats import paired_comparison

pytestmark = pytest.mark.usefixtures("quick_compiling")

NET = """
from flax import nnx

class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.head = nnx.Linear(36, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(x.reshape(len(x), -1))
"""


@pytest.fixture
def options(tmp_path: Path, small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of a table with one small pair; its networks are the test's own, and so is its number of epochs."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.setitem(PAIRS, "small", (f"{tmp_path / 'net.py'}:Net",) * 2)
    monkeypatch.setitem(PUBLISHED, ("small", "kd"), 12.34)
    monkeypatch.setattr(table, "QUICK", 30)
    data = small_dataset
    np.savez(
        tmp_path / "small.npz",
        x_train=data.train_images, y_train=data.train_labels, x_test=data.test_images, y_test=data.test_labels,
    )  # fmt: skip
    given = ["cifar100", "--quick", "--seeds", "2", "--pairs", "small", "--methods", "kd", "dkd"]
    return [*given, "--dataset", f"npz:{tmp_path / 'small.npz'}", "--out", str(tmp_path / "out")]


def test_a_table_is_what_its_rows_say_and_goes_on_from_them(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    train = rows._trained

    def watched(name: str, *arguments: Any) -> Any:
        if name == "small-dkd" and "small-alone" in trained and not trained.count("stopped"):
            trained.append("stopped")
            raise ZeroDivisionError
        trained.append(name)
        return train(name, *arguments)

    monkeypatch.setattr(rows, "_trained", watched)
    with pytest.raises(ZeroDivisionError):
        reproduce.main(options)
    reproduce.main(["--out", str(tmp_path / "out"), "--resume"])
    # A teacher and rows that are done are read.
    assert trained == ["small-teacher", "small-alone", "small-kd", "stopped", "small-dkd"]
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [line.split()[:2] for line in printed.splitlines() if "12.34" in line] == [["kd", "12.34"]]
    assert [run["seed"] for run in found["rows"]["small-kd"]["runs"]] == [42, 43]
    assert found["configs"]["small"]["milestones"] == [5, 6, 7]
    correct = {name: [run["correct"] for run in found["rows"][f"small-{name}"]["runs"]] for name in ("alone", "kd")}
    wanted = paired_comparison(correct["alone"], correct["kd"], metric="correct", comparisons=2)
    assert found["gains"]["small-kd"]["mean_difference"] == wanted.mean_difference
    assert (tmp_path / "out" / "results.md").read_text().count("| small") == 1

    # A row that is damaged is trained anew, and nothing else.
    path = tmp_path / "out" / "rows" / "small-kd.json"
    path.write_text(path.read_text().replace("43", "44"))
    shutil.rmtree(tmp_path / "out" / "checkpoints", ignore_errors=True)
    (tmp_path / "out" / "results.json").unlink()
    trained.clear()
    reproduce.main([*options, "--resume"])
    assert trained == ["small-kd"]
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["rows"]["small-kd"]["runs"] == found["rows"]["small-kd"]["runs"]


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_are_networks_of_the_zoo_with_the_protocol_of_the_papers(pair: str) -> None:
    config = Plan((pair,), ("kd",), 3, 42, False, "tfds:cifar100").config(pair)
    assert {config.teacher, config.student} <= set(zoo.__all__)
    slow = config.student in ("mobilenet_v2", "shufflenet_v1", "shufflenet_v2")
    assert (config.learning_rate, config.teacher_training.learning_rate) == (0.01 if slow else 0.05, 0.05)
    assert (config.epochs, config.milestones, config.augment) == (240, (150, 180, 210), "crop-flip")
    quick = Plan((pair,), ("kd",), 3, 42, True, "tfds:cifar100").config(pair)
    assert (quick.epochs, quick.milestones) == (24, (15, 18, 21))


def test_published_numbers_are_where_the_papers_have_them() -> None:
    assert PUBLISHED["resnet32x4-resnet8x4", "kd"] == 73.33
    assert PUBLISHED["resnet110-resnet20", "dkd"] == 71.06
    assert PUBLISHED["resnet56-resnet20", "dist"] == 71.75
    assert PUBLISHED["vgg13-mobilenet_v2", "kd-standardised"] == 68.61
    assert PUBLISHED["resnet32x4-shufflenet_v1", "nkd"] == 76.31
    assert {method for _, method in PUBLISHED} == set(METHODS)
    plan = Plan((), (), 3, 42, False, "mnist")
    # 20 and 10 of 240 epochs of 781 steps.
    assert plan.method("dkd", 240 * 781).warmup == 20 * 781
    assert plan.method("ctkd", 240 * 781).warmup == 10 * 781


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["cifar100", "--pairs", "resnet20-resnet8"], "--pairs has 'resnet20-resnet8', which the table has not: use"),
        (["cifar100", "--methods", "kd,crd"], "--methods has 'crd', which the table has not: use some of kd, ctkd"),
        (["cifar100", "--methods"], "--methods is given without a name"),
        (["cifar100", "--rows", "alone"], "--rows is of the table hinton2015: cifar100 has --pairs and --methods"),
        (["hinton2015", "--pairs", "vgg13-vgg8"], "--pairs is of the table cifar100: leave it out"),
    ],
)
def test_what_the_table_does_not_have(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        reproduce.main(given)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
