"""Networks of one's own for the commands."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from kd_jax import run
from kd_jax.data.dataset import Dataset
from kd_jax.errors import ConfigError
from kd_jax.experiments.notebook import own
from kd_jax.models import Model

pytestmark = pytest.mark.usefixtures("quick_compiling", "without_plots")

FILE = """
from flax import linen as nn, nnx
import kd_jax as kd

class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.out = nnx.Conv(1, 3, (3, 3), rngs=rngs), nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.conv(x)).mean((1, 2)))

def load():
    return Net(nnx.Rngs(5))

class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(x.shape[0], -1))

linen = Wide()
five = 5

def broken():
    raise OSError("the weights are gone")

def four(rngs):
    return nnx.Sequential(lambda x: x.reshape(x.shape[0], -1), nnx.Linear(36, 4, rngs=rngs))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "my.py"
    path.write_text(FILE)
    return path


def source(dataset: Dataset, tmp_path: Path) -> str:
    path = tmp_path / "small.npz"
    np.savez(
        path, x_train=dataset.train_images, y_train=dataset.train_labels, x_test=dataset.test_images,
        y_test=dataset.test_labels,
    )  # fmt: skip
    return f"npz:{path}"


def test_a_class_is_made_anew_and_what_a_function_returns_has_its_values(place: Path) -> None:
    fresh, given = (own.load(f"{place}:{name}", "--student", (6, 6, 1), 3) for name in ("Net", "load"))
    assert fresh.variables is None
    assert given.variables is not None
    assert isinstance(own.load(f"{place}:linen", "--student", (6, 6, 1), 3), Model)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet21", "the nearest are resnet.*resnet20, .* and one of your own is package.module:name or file.py:name"),
        ("what", "which no network is called: the nearest are lenet, mobilenet_v1"),
        ("Net:", "name a network as package.module:name"),
        ("{}:Nte", "has no Nte, and has"),
        ("{}:broken", "OSError: the weights are gone"),
        ("{}:five", "five|int"),
        ("gone.py:Net", "there is no file gone.py"),
        ("kd_jax.gone:Net", "kd_jax.gone cannot be imported"),
    ],
)
def test_what_is_no_network_is_told_in_a_sentence(name: str, says: str, place: Path) -> None:
    with pytest.raises(ConfigError, match=says) as told:
        own.load(name.format(place), "--student", (6, 6, 1), 3)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_a_run_trains_ones_own_student_with_ones_own_teacher(
    place: Path, small_dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", source(small_dataset, tmp_path), "--epochs", "2", "--batch-size", "16", "--seeds", "2"]
    own_networks = ["--student", f"{place}:Net", "--teacher", f"{place}:load"]
    run.main([*options, *own_networks, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"teacher   {place}:load, as it is" in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["config"]["student"] == f"{place}:Net"
    assert [run["seed"] for run in found["models"]["distilled"]["runs"]] == [42, 43]
    assert found["models"]["teacher"]["training"] == {}
    assert found["models"]["student"]["parameters"] == 3 * 3 * 3 + 3 + 3 * 3 + 3
    assert sorted(path.name for path in (tmp_path / "out" / "parameters").iterdir()) == [
        *(f"distilled-seed{seed}.safetensors" for seed in (42, 43)),
        *(f"student-seed{seed}.safetensors" for seed in (42, 43)),
        "teacher-seed42.safetensors",
    ]


def test_a_run_trains_networks_of_the_zoo_by_their_names(
    small_dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", source(small_dataset, tmp_path), "--epochs", "1", "--batch-size", "60", "--seeds", "1"]
    run.main([*options, "--teacher", "lenet", "--student", "lenet", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert re.search(r"teacher +lenet\nstudents +lenet, 1 seed", printed)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("teacher", "student", "distilled"):
        # Of 3 classes in place of 10.
        assert found["models"][name]["parameters"] == 61_706 - 7 * 85
    assert found["models"]["teacher"]["training"]


@pytest.mark.parametrize(
    ("option", "name", "says"),
    [
        ("--student", "load", "which has values already, and each seed starts anew"),
        ("--student", "four", r"outputs of the shape \(4,\) for an image, and the data set has 3 classes"),
    ],
)
def test_a_network_that_does_not_fit_ends_the_command_with_a_sentence(
    option: str, name: str, says: str, place: Path, small_dataset: Dataset, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = [
        "--dataset",
        source(small_dataset, tmp_path),
        option,
        f"{place}:{name}",
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as ended:
        run.main(arguments)
    assert ended.value.code == 2
    assert re.search(says, capsys.readouterr().err)
