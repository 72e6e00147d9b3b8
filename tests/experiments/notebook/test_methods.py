"""`--method` and `--method-option`, in run and in sweep."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from slowly import all_but_first

import kd_jax as kd
from kd_jax import run, sweep
from kd_jax.data.dataset import Dataset
from kd_jax.errors import ConfigError
from kd_jax.experiments.notebook import methods, report
from kd_jax.experiments.notebook.config import make_config
from kd_jax.experiments.sweep import grid, plan
from kd_jax.methods import catalogue

pytestmark = pytest.mark.usefixtures("quick_compiling", "without_plots")

SMALL = ["--teacher-hidden", "8", "--student-hidden", "4", "--epochs", "1", "--batch-size", "8"]
SMALL += ["--learning-rate", "0.01", "--seeds", "2", "--quiet"]


@pytest.fixture
def source(tmp_path: Path, small_dataset: Dataset) -> str:
    path = tmp_path / "small.npz"
    np.savez(
        path, x_train=small_dataset.train_images[:80], y_train=small_dataset.train_labels[:80],
        x_test=small_dataset.test_images, y_test=small_dataset.test_labels,
    )  # fmt: skip
    return f"npz:{path}"


def test_the_list_has_the_numbers_that_a_run_has_by_default() -> None:
    known = make_config()
    [line] = [one for one in methods.listing().splitlines() if one.startswith("kd ")]
    assert line.split()[-4:] == ["--alpha", f"{known.alpha:g}", "--temperature", f"{known.temperature:g}"]


def test_a_run_with_another_method_keeps_its_numbers_and_goes_on(source: str, tmp_path: Path) -> None:
    """One that learns and carries: its results have the same keys but for the numbers of `kd`."""
    out = tmp_path / "out"
    how = ["--dataset", source, *SMALL, "--out", str(out)]
    run.main([*how, "--method", "CTKD", "--method-option", "span=6", "warmup=3"])
    kept = json.loads((out / "results.json").read_text())
    assert kept["config"]["method"] == "ctkd"
    assert kept["config"]["method_option"] == ["span=6", "warmup=3"]
    assert not {"alpha", "temperature"} & set(kept["config"])
    assert set(kept["models"]) == {"teacher", "student", "distilled"}
    run.main(["--out", str(out), "--resume", "--method", "ctkd", "--quiet"])
    assert json.loads((out / "results.json").read_text())["models"] == kept["models"]


@pytest.mark.slow
def test_an_array_of_a_method_is_a_file(source: str, small_dataset: Dataset, tmp_path: Path) -> None:
    """It is the same for all seeds, side by side."""
    np.save(tmp_path / "alike.npy", np.eye(small_dataset.classes, dtype=np.float32))
    how = ["--dataset", source, *SMALL, "--out", str(tmp_path / "out")]
    run.main([*how, "--method", "wkd", "--method-option", f"similarity={tmp_path / 'alike.npy'}", "gamma=1"])
    assert "distilled" in json.loads((tmp_path / "out" / "results.json").read_text())["models"]


@pytest.mark.parametrize("command", [run, sweep])
def test_the_list_is_printed_and_nothing_is_trained(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--method", "list"])
    lines = capsys.readouterr().out.splitlines()
    table = lines[: lines.index("")]
    assert "student= stands for feature, hint, first or features" in lines[-1]
    assert "Several features are joined by commas, student=PATH,PATH." in lines[-1]
    assert len(table) == len(methods.known()) + 1
    assert {"kd", "kd-without-t2", "kd-as-written", "dkd", "crd"} <= {line.split()[0] for line in table}
    assert all("alpha=" not in line for line in table if line.startswith("kd"))
    assert "kdwithouttsquared" not in {line.split()[0] for line in table}


def test_a_method_of_features_stands_beside_the_cross_entropy_with_its_weight() -> None:
    assert methods.make("at", 0.5, 20.0, ("student=a",)) == kd.CrossEntropy() + kd.AT("a")
    assert methods.make("at", 0.5, 20.0, ("weight=10", "student=a")) == kd.CrossEntropy() + 10 * kd.AT("a")
    assert methods.make("dkd", 0.5, 20.0, ()) == kd.DKD()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "dkdd"], "unknown method 'dkdd': use dkd or another that --method list shows"),
        (["--method", "dkd", "--method-option", "betta=2"], "unknown option 'betta' of dkd: did you mean beta?"),
        (["--method", "dkd", "--temperature", "2"], "--temperature is of kd, kd-without-t2, kd-as-written, and"),
        (["--method", "kd", "--method-option", "alpha=0.2"], "the numbers of kd are --alpha and --temperature"),
        (["--method-option", "alpha=0.2"], "the numbers of kd-without-t2 are"),
        (["--method", "sp"], "sp compares features: name them, --method-option student=PATH teacher=PATH"),
        (["--method", "sp", "--method-option", "student=hidden.9"], "--method is sp: the feature 'hidden.9' does not"),
        (["--method", "sp", "--method-option", "student=a", "weight=-1"], "weight must be at least 0, and finite"),
        (["--method", "sp", "--method-option", "student=a", "weight=x"], "'weight=x': weight must be a number"),
        (
            ["--method", "sp", "--method-option", "student=a", "weight=1", "weight=2"],
            "--method-option has weight twice",
        ),
        (["--method", "kd", "--method-option", "standardised=yes"], "'standardised=yes': standardised must be true or"),
        (["--method-option", "standardised=true", "standardised=true"], "--method-option has standardised twice"),
        (["--method", "sp", "--method-option", "standardised=true"], "sp does not compare a teacher's logits"),
        (["--method", "wkd"], "wkd needs similarity: give --method-option similarity"),
        (["--method", "binarykd"], "--method is binarykd: the labels of BinaryKD are int32"),
        (["--method", "topkkl"], "--method is topkkl: k is 64: it must be from 1 to 3, the number of classes"),
    ],
)
def test_what_the_command_cannot_do_is_told(
    arguments: list[str], says: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--dataset", source, *SMALL, *arguments, "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert says in told
    assert told.count("\n") == 1


@pytest.mark.slow
def test_every_method_of_logits_is_one_that_the_command_trains() -> None:
    """With its defaults, but those that ask for what images do not have."""
    student, teacher = kd.mlp([4, 3, 100]), kd.mlp([4, 5, 100])
    refused = set()
    for name, known in methods.known().items():
        if "features" in catalogue.entry(name, known).needs:
            continue
        try:
            methods.check(make_config(method=name).make_method(), name, student, teacher, (2, 2, 1), 4)
        except ConfigError:
            refused.add(name)
    assert refused == {"binarykd", "wkd", "taid", "dml"}


@pytest.mark.parametrize(
    ("name", "options"),
    all_but_first(
        [
            ("crd", ["student=hidden.0", "examples=80", "width=4", "negatives=3"]),
            ("pkt", ["student=hidden.0"]),
            ("reviewkd", ["student=hidden.0,hidden.1", "teacher=hidden.0,hidden.1", "width=4"]),
        ]
    ),
)
def test_features_are_compared_where_their_paths_are_given(
    name: str, options: list[str], source: str, tmp_path: Path
) -> None:
    """What is learned and carried is made from the networks' shapes, and the teacher answers inside the step."""
    out, how = tmp_path / "out", ["--student-hidden", "4,4", "--teacher-hidden", "8,8", "--shift", "1"]
    run.main(["--dataset", source, *SMALL, *how, "--out", str(out), "--method", name, "--method-option", *options])
    kept = json.loads((out / "results.json").read_text())
    assert kept["config"]["method_option"] == options
    runs = kept["models"]["distilled"]["runs"]
    assert len(runs) == 2
    assert runs[0] != kept["models"]["student"]["runs"][0]


def test_a_method_of_the_notebook_is_made_as_ever() -> None:
    assert make_config(alpha=0.3).make_method() == kd.KDWithoutTSquared(0.3, 20.0)
    assert make_config(method="kd", temperature=3.0).make_method() == kd.KD(0.5, 3.0)
    assert "method_option" not in make_config().as_dict()
    assert {"alpha", "temperature"} <= set(make_config().as_dict())
    with pytest.raises(ConfigError, match="--alpha is of kd"):
        make_config(method="dkd", alpha=0.3)


def test_logits_are_standardised_around_any_method_that_compares_them() -> None:
    assert methods.make("dkd", 0.5, 20.0, ("beta=2", "standardised=true")) == kd.standardised(kd.DKD(beta=2.0))
    assert methods.make("dkd", 0.5, 20.0, ("standardised=false",)) == kd.DKD()
    assert methods.make("uld", 0.5, 20.0, ("standardised=true",)) == kd.standardised(kd.ULD())
    assert make_config(method="kd", method_option=("standardised=true",)).make_method() == kd.standardised(
        kd.KD(0.5, 20.0)
    )
    asked = given("--method", "kd", "--method-option", "standardised=true", "standardised=false", "--alpha", "0.1")
    found = [plan._settings(one).method for one in grid.distilled(sweep._grid(asked))]
    assert found == [kd.standardised(kd.KD(0.1, 20.0)), kd.KD(0.1, 20.0)]
    config = make_config(method="kd", method_option=("standardised=true",))
    assert report._method_line(config) == "kd, alpha 0.5, temperature 20, standardised true"


def given(*arguments: str) -> dict[str, tuple[object, ...]]:
    return sweep._given(sweep._parser().parse_args(list(arguments)))


def test_a_sweep_takes_a_list_for_each_number() -> None:
    asked = given("--method", "dkd", "--method-option", "beta=2", "beta=8", "temperature=1", "temperature=4")
    settings = grid.distilled(sweep._grid(asked))
    found = [plan._settings(one).method for one in settings]
    assert found == [kd.DKD(beta=b, temperature=t) for b in (2.0, 8.0) for t in (1.0, 4.0)]
    assert grid.label(settings[0], sweep._grid(asked)) == "distilled, method option beta=2,temperature=1"
    several = sweep._grid(given("--method", "kd", "reverse-kl", "dist"))
    assert [type(plan._settings(one).method) for one in grid.distilled(several)] == [kd.KD, kd.ReverseKL, kd.DIST]
    with pytest.raises(ConfigError, match="sp, which compares features, and a sweep keeps the teacher's logits"):
        sweep._grid(given("--method", "sp", "--method-option", "student=hidden.0"))
    with pytest.raises(ConfigError, match="--temperature is of kd"):
        given("--method", "kd", "dkd", "--temperature", "1", "2")


@pytest.mark.slow
def test_a_sweep_over_a_methods_numbers_names_the_best(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sweep.main(
        ["--dataset", source, *SMALL, "--out", str(out), "--method", "dkd", "--method-option", "beta=1", "beta=4"]
    )
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"python -m kd_jax.run .*--method dkd .*--method-option beta=[14]$", told)
    sweep.main(["--out", str(out), "--resume", "--quiet", "--method-option", "beta=1", "beta=4"])


def test_numbers_of_a_method_are_leaves_of_float32_in_a_stage() -> None:
    method = jax.tree.map(np.float32, make_config(method="mlkd").make_method())
    assert [leaf.dtype for leaf in jax.tree.leaves(method)] == [np.float32] * 6
