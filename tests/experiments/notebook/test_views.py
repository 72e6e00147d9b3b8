"""What networks of an experiment see: crops, flips, normalisation; and the preset that trains so, from end to end."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import run, sweep
from kd_jax.data import augment
from kd_jax.data.batch import Batch
from kd_jax.data.dataset import Dataset, make_dataset
from kd_jax.data.mixing import Mixed, prepared
from kd_jax.experiments import images as of_images
from kd_jax.experiments.images import Images, Settings
from kd_jax.experiments.notebook import recipes, views
from kd_jax.experiments.notebook.config import Training, make_config
from kd_jax.experiments.notebook.options import config_of
from kd_jax.methods import KD
from kd_jax.models import mlp
from kd_jax.teacher import LiveTeacher

pytestmark = pytest.mark.usefixtures("quick_compiling", "without_plots")

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 200, (24, 6, 5, 3)).astype(np.uint8)
PIXELS[..., 2] = 9
DATA = make_dataset("few", PIXELS, np.arange(24) % 3, PIXELS[:6], np.arange(6) % 3)
CROPPED = Training(epochs=2, batch_size=8, learning_rate=0.1, schedule="constant", shift=0, augment="crop-flip")


def as_npz(dataset: Dataset, folder: Path) -> str:
    names = {"train_images": "x_train", "train_labels": "y_train", "test_images": "x_test", "test_labels": "y_test"}
    np.savez(folder / "small.npz", **{name: getattr(dataset, part) for part, name in names.items()})
    return f"npz:{folder / 'small.npz'}"


def test_means_and_deviations_are_those_of_the_training_pixels() -> None:
    pixels = PIXELS.astype(np.float64) / 255
    mean, std = views.moments(DATA)
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], pixels.std(axis=(0, 1, 2))[:2], rtol=1e-12)
    # A channel that does not vary stays in its place.
    assert std[2] == 1.0
    assert views.moments(DATA._replace(train_images=PIXELS // 2))[0][0] < mean[0]


def test_a_network_normalises_what_it_is_given() -> None:
    model = mlp([90, 3]).init(0)
    network = views.seen(model, CROPPED, DATA).network
    mean, std = views.moments(DATA)
    pixels = jnp.asarray(PIXELS / 255, jnp.float32)
    found = network.apply(model.variables, pixels)[0].logits
    wanted = model.network.apply(model.variables, jnp.asarray((PIXELS / 255 - mean) / std, jnp.float32))[0].logits
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    again = views.seen(model, CROPPED, DATA).network
    assert network == again
    assert hash(network) == hash(again)
    assert views.seen(model, CROPPED._replace(augment="none"), DATA) is model


@pytest.mark.parametrize("name", ["mixup", "cutmix", "crop-flip+mixup", "crop-flip+cutmix"])
def test_a_step_mixes_images_and_their_labels(name: str) -> None:
    """As `kd.augment` does, behind crops and flips; in evaluation nothing is mixed."""
    change = views.prepare(CROPPED._replace(augment=name))
    assert change is not None
    parts = {"crop-flip": [augment.random_crop(4), augment.random_flip()], "mixup": [augment.mixup()],
             "cutmix": [augment.cutmix()]}  # fmt: skip
    wanted = augment.chain(*(one for part in name.split("+") for one in parts[part]))
    batch = Batch(jnp.asarray(PIXELS[:8] / 255, jnp.float32), jnp.arange(8) % 3)
    key = jax.random.key(5)
    found, expected = prepared(change, batch, key), prepared(wanted, batch, key)
    np.testing.assert_array_equal(found.inputs, expected.inputs)
    assert isinstance(found.labels, Mixed)
    np.testing.assert_array_equal(found.labels.other, expected.labels.other)
    np.testing.assert_array_equal(change(key, batch.inputs, False), batch.inputs)


@pytest.mark.parametrize(
    ("method", "name"),
    [("kd", "mixup"), pytest.param("kd-as-written", "crop-flip+cutmix", marks=pytest.mark.slow)],
)
def test_a_run_mixes_images(
    method: str, name: str, small_dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", as_npz(small_dataset, tmp_path), "--epochs", "2", "--batch-size", "40", "--seeds", "2"]
    options += ["--student-hidden", "3", "--teacher-hidden", "4", "--method", method, "--augment", name]
    run.main([*options, "--out", str(tmp_path / "out")])
    strength = {"mixup": "mixup of alpha 0.2", "cutmix": "cutmix of alpha 1"}[name.split("+")[-1]]
    assert f", {strength}, normalised by" in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["config"]["augment"] == found["config"]["teacher_augment"] == name
    assert "mean" in found["data"]["normalisation"]
    assert 0 < found["models"]["distilled"]["runs"][0]["correct"] <= 60


def test_the_teacher_of_a_step_sees_what_its_student_sees() -> None:
    """A teacher that is the student itself has nothing to teach, unless its images are others."""
    network = views.seen(mlp([90, 3]), CROPPED, DATA).network
    setup = recipes.make_setup(network, CROPPED, 24)
    settings, key = Settings(0.1, KD(alpha=0.0, temperature=2.0)), jax.random.key(0)
    data = Images(jnp.asarray(DATA.train_images), jnp.asarray(DATA.train_labels))
    state = of_images.init(key, settings, setup=setup)
    rows = jnp.arange(8)
    step = jax.jit(of_images.train_step, static_argnames="setup")

    def loss(teacher: Any) -> float:
        given = data._replace(teacher=LiveTeacher(teacher, state.variables))
        return float(step(state, key, given, rows, settings, setup=setup)[1].loss)

    assert loss(network) < 1e-10
    assert loss(views.seen(mlp([90, 3]), CROPPED, DATA._replace(train_images=PIXELS // 2)).network) > 1e-3
    plain = step(state, key, data._replace(teacher=LiveTeacher(network, state.variables)), rows, settings,
                 setup=setup._replace(prepare=None))[1]  # fmt: skip
    assert float(plain.loss) < 1e-10
    cropped = step(
        state, key, data._replace(teacher=LiveTeacher(network, state.variables)), rows, settings, setup=setup
    )
    assert float(cropped[1].cross_entropy) != float(plain.cross_entropy)


NETWORKS = """
from flax import nnx

class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))
"""


def build(place: Path) -> str:
    """A data set of 32 × 32 × 3 images that TFDS prepares: 96 and 24 of four colours with noise. Returns its source."""
    public_api = pytest.importorskip("tensorflow_datasets.public_api")
    pytest.importorskip("tensorflow")

    def info(self: Any) -> Any:
        image = public_api.features.Image(shape=(32, 32, 3), encoding_format="png")
        features = {"image": image, "label": public_api.features.ClassLabel(num_classes=4)}
        return public_api.core.DatasetInfo(
            builder=self, features=public_api.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def examples(self: Any, count: int) -> Any:
        rng = np.random.default_rng(count)
        for index in range(count):
            colour = np.array([(60, 60, 60), (180, 60, 60), (60, 180, 60), (60, 60, 180)][index % 4])
            yield index, {"image": (colour + rng.integers(0, 60, (32, 32, 3))).astype(np.uint8), "label": index % 4}

    parts = {
        "__module__": __name__,
        "VERSION": public_api.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": lambda self, downloads: {"train": examples(self, 96), "test": examples(self, 24)},
        "_generate_examples": examples,
    }
    (place / "networks.py").write_text(NETWORKS)
    return "tfds:" + type("KdJaxColours", (public_api.core.GeneratorBasedBuilder,), parts).name


@pytest.mark.slow
def test_the_preset_of_cifar100_trains_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    source, net = build(tmp_path), f"{tmp_path / 'networks.py'}:Net"
    options = ["--preset", "cifar100", "--dataset", source, "--teacher", net, "--student", net, "--seeds", "2"]
    options += ["--epochs", "3", "--batch-size", "16", "--milestones", "1", "2", "--out", str(tmp_path / "out")]
    run.main(options)
    printed = capsys.readouterr().out
    assert (
        "3 epochs of 6 steps, batch 16, SGD 0.05, momentum 0.9, weight decay 0.0005, times 0.1 after epochs 1, 2"
        in (" ".join(printed.split()))
    )
    assert "crops of images with 4 pixels of 0 around, flips, normalised by " in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    protocol = {
        "method": "kd", "alpha": 0.1, "temperature": 4.0, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4,
        "schedule": "steps", "milestones": [1, 2], "milestone_factor": 0.1, "augment": "crop-flip",
    }  # fmt: skip
    assert {name: found["config"][name] for name in protocol} == protocol
    assert found["config"]["teacher_augment"] == "crop-flip"
    assert found["data"]["normalisation"]["mean"] == pytest.approx([0.471, 0.471, 0.471], abs=0.01)
    # Colours are told apart, if the test images are normalised as those of the training.
    assert found["models"]["teacher"]["runs"][0]["correct"] == 24
    # At once, as it is finished; with options that are the run's own.
    run.main([*options, "--resume", "--weight-decay", "0.0005"])
    with pytest.raises(SystemExit):
        run.main([*options, "--resume", "--teacher-augment", "none"])
    assert "--teacher-augment is none, and the run in" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_the_same_whether_or_not_it_was_stopped_between(tmp_path: Path, small_dataset: Dataset) -> None:
    """A teacher and students of a step whose view the key and the number of the step tell."""
    config = make_config(augment="crop-flip", epochs=2, batch_size=40, student_hidden=(3,), teacher_hidden=(3,))
    setup = recipes.make_setup(recipes.networks(config, small_dataset)[1], config.training, 240)
    settings, key = Settings(0.1, KD(alpha=1.0)), jax.random.key(0)
    data = Images(jnp.asarray(small_dataset.train_images), jnp.asarray(small_dataset.train_labels))
    order = jax.random.permutation(jax.random.key(1), 240).reshape(6, 40)
    steps = jax.jit(of_images.scan_steps, static_argnames="setup")
    state = of_images.init(key, settings, setup=setup)
    data = data._replace(teacher=LiveTeacher(setup.network, state.variables))
    whole, _ = steps(state, key, data, order, settings, setup=setup)
    half, _ = steps(state, key, data, order[:3], settings, setup=setup)
    again, _ = steps(half, key, data, order[3:], settings, setup=setup)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_a_sweep_mixes_images(
    small_dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_plots: None
) -> None:
    options = ["--dataset", as_npz(small_dataset, tmp_path), "--epochs", "1", "--batch-size", "40", "--seeds", "1"]
    options += ["--student-hidden", "3", "--teacher-hidden", "4", "--augment", "mixup", "--quiet"]
    sweep.main([*options, "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["config"]["augment"] == "mixup"
    with pytest.raises(SystemExit) as ended:
        sweep.main([*options, "--method", "dkd", "--out", str(tmp_path / "other")])
    assert ended.value.code == 2
    assert "and --augment mixup mixes images (then " in capsys.readouterr().err
    assert not (tmp_path / "other" / "results.json").exists()


def test_what_mixes_is_part_of_what_is_trained() -> None:
    """Of the setup that every training of the experiments has; without it there is nothing that mixes."""
    for name in ("mixup", "crop-flip+cutmix"):
        setup = recipes.make_setup(mlp([90, 3]).network, CROPPED._replace(augment=name), 24)
        batch = Batch(jnp.asarray(PIXELS[:8] / 255, jnp.float32), jnp.arange(8) % 3)
        assert setup.prepare is not None
        assert isinstance(prepared(setup.prepare, batch, jax.random.key(0)).labels, Mixed)
    assert recipes.make_setup(mlp([90, 3]).network, CROPPED._replace(augment="none"), 24).prepare is None


@pytest.mark.slow
def test_a_sweep_crops_too(tmp_path: Path, small_dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dataset", as_npz(small_dataset, tmp_path), "--epochs", "1", "--batch-size", "40", "--seeds", "1"]
    options += ["--student-hidden", "3", "--teacher-hidden", "4", "--label-smoothing", "--optimizer", "sgd"]
    options += ["--schedule", "steps", "--milestones", "1", "1,2", "--augment", "crop-flip"]
    sweep.main([*options, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "optimizer sgd" in printed
    assert "augment crop-flip" in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["config"]["augment"] == "crop-flip"
    with pytest.raises(SystemExit):
        sweep.main([*options[:-4], "--milestones", "--augment", "crop-flip"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--milestones", "3"], "--milestones is 3, and of no use without --schedule steps: add that"),
        (["--teacher-momentum", "0.5"], "--teacher-momentum is 0.5, and of no use without --optimizer sgd: add that"),
        (["--augment", "crop-flip", "--shift", "1"], "--augment is crop-flip and --shift 1: both change images"),
        (["--schedule", "steps"], "--schedule is steps, without --milestones: give epochs, such as 150,180,210"),
        (["--milestones", "3,x"], "'3,x' are no epochs: give whole numbers joined by commas"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(options)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("method", [["dkd"], ["crd", "--method-option", "student=hidden.0", "examples=240"]])
def test_a_method_that_does_not_take_mixed_images_is_told_before_anything_is_trained(
    method: list[str], small_dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", as_npz(small_dataset, tmp_path), "--epochs", "1", "--seeds", "1", "--batch-size", "40"]
    with pytest.raises(SystemExit) as ended:
        run.main([*options, "--augment", "cutmix", "--out", str(tmp_path / "out"), "--method", *method])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    reason = {"dkd": "then labels are float32 [40, 3], and this takes whole numbers [40]",
              "crd": "then CRD needs the rows of the examples, and the batch has none"}[method[0]]  # fmt: skip
    assert f"{method[0]}, and --augment cutmix mixes images ({reason}): choose another of them\n" in printed.err
    assert "Compiling" not in printed.out


def test_a_sweep_does_not_take_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["--preset", "cifar100"])
    assert "--preset is cifar100, which has networks of its own" in capsys.readouterr().err


def test_what_is_given_for_the_students_may_be_of_use_to_the_teacher_alone() -> None:
    config = config_of({"teacher_optimizer": "sgd", "momentum": 0.8, "teacher_schedule": "steps", "milestones": (1, 2)})
    assert config.training.optimizer == "adam"
    assert config.teacher_training.momentum == 0.8
    assert config.teacher_training.milestones == (1, 2)
