"""What carries or wraps, through whole trainings: CRD's memory, SimKD's classifier, learned blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import PICTURES, scale

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError, MethodError

pytestmark = pytest.mark.usefixtures("quick_compiling")
RNG = np.random.default_rng(1)
DATA = kd.Batch(PICTURES.inputs, PICTURES.labels, indices=np.arange(16))
HOW: dict[str, Any] = {"optimizer": optax.sgd(0.01), "epochs": 1, "batch_size": 8, "prepare": scale}


class Net(nnx.Module):
    """Two convolutions and a head."""

    def __init__(self, channels: int = 3, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, channels, (3, 3), strides=4, rngs=rngs)
        self.second = nnx.Conv(channels, 2 * channels, (1, 1), rngs=rngs)
        self.head = nnx.Linear(2 * channels, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        maps = self.second(nnx.relu(self.first(x)))
        return self.head(jnp.mean(maps, axis=(1, 2)))


TEACHER = Net(4, rngs=nnx.Rngs(1))
ALL = (
    kd.OFD("first") + kd.MGD("first") + kd.ReviewKD(("first", "second"), width=2)
    + kd.CRD("second", examples=16, width=4, negatives=5)
)  # fmt: skip


def test_all_of_them_add_up_and_learn_in_one_training() -> None:
    """With the memory, the keys and the blocks of each."""
    result = kd.distill(Net, TEACHER, DATA, method=kd.KD() + 0.01 * ALL, key=0, **HOW)
    names = {"hard", "soft", "ofd", "mgd", "reviewkd", "crd", "loss", "seconds"}
    assert names <= set(result.history)
    assert all(np.isfinite(values).all() for values in result.history.values())
    bank = jax.tree.leaves(result.state.carried)
    assert any(leaf.shape == (16, 4) for leaf in bank)


def test_rows_of_the_bank_are_those_of_the_examples() -> None:
    """Whatever the order of the batches: an epoch moves every row that has its turn, and no other."""
    method = kd.CRD("second", examples=20, width=4, negatives=3)
    shuffled = np.random.default_rng(0).permutation(16)
    result = kd.distill(Net, TEACHER, DATA._replace(indices=shuffled), method=kd.CrossEntropy() + method, key=0, **HOW)
    lengths = np.linalg.norm(np.asarray(result.state.carried[1]["bank"].student), axis=-1)
    np.testing.assert_allclose(lengths[:16], 1, rtol=1e-5)
    assert (np.abs(lengths[16:] - 1) > 1e-3).any()


def test_crd_without_rows_is_told_before_anything_is_compiled() -> None:
    method = kd.CRD("second", examples=16)
    with pytest.raises(MethodError, match=r"indices=np.arange\(16\)"):
        kd.distill(Net, TEACHER, PICTURES, method=kd.KD() + method, key=0, **HOW)
    with pytest.raises(DataError, match="16 examples and indices of 3"):
        kd.distill(Net, TEACHER, DATA._replace(indices=np.arange(3)), method=method, key=0, **HOW)


def reused(student: Any = Net, **changed: Any) -> kd.Model:
    shapes = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)
    head = {"kernel": TEACHER.head.kernel[...], "bias": TEACHER.head.bias[...]}
    return kd.with_classifier(
        student, TEACHER, shapes, **({"feature": "first", "teacher_feature": "second"} | head | changed)
    )


def test_simkds_student_keeps_the_teachers_classifier() -> None:
    """Its logits are the classifier's of what is projected; the classifier does not move, the projector does."""
    student = reused()
    method = kd.SimKD(teacher_feature="second")
    result = kd.distill(student, TEACHER, DATA, method=method, key=0, validation=DATA, best="accuracy", **HOW)
    assert set(result.history) >= {"simkd", "validation_accuracy"}
    variables = result.model.variables
    classifier = variables["state"]["classifier"]
    np.testing.assert_array_equal(classifier["kernel"], TEACHER.head.kernel[...])
    first = student.init(0).variables
    assert (np.asarray(variables["params"]["projector"][0]["convolution"]["kernel"]) != 0).any()
    assert jax.tree.structure(variables) == jax.tree.structure(first)
    images = jnp.asarray(DATA.inputs, jnp.float32) / 255
    output = result.model(images, features=("projected", "second"))
    assert output.features["projected"].shape == (16, 2, 2, 8)
    wanted = np.float64(output.features["projected"]).mean((1, 2)) @ np.float64(classifier["kernel"])
    np.testing.assert_allclose(output.logits, wanted + np.float64(classifier["bias"]), rtol=1e-4, atol=1e-5)
    means = np.asarray(variables["state"]["moments"][0][0])
    assert (means != 0).all()


def test_a_trained_student_keeps_its_own_values_in_simkd() -> None:
    own = Net(rngs=nnx.Rngs(5))
    model = reused(own)
    found = model.network.student.merge(model.variables["params"]["student"], model.variables["state"]["student"])
    images = jnp.asarray(DATA.inputs[:2], jnp.float32) / 255
    output, _ = model.network.student.apply(found, images, features=("first",))
    np.testing.assert_allclose(output.logits, own(images), rtol=1e-5, atol=1e-6)
    assert reused(own).network == model.network
    assert hash(reused().network) == hash(reused().network)
    assert reused(bias=np.ones(4, np.float32)).network != model.network


def test_simkds_student_can_be_kept_in_a_file(tmp_path: Any) -> None:
    model = reused().init(3)
    kd.save(model, tmp_path / "student.safetensors")
    again = kd.restore(reused(), tmp_path / "student.safetensors")
    images = jnp.asarray(DATA.inputs[:2], jnp.float32) / 255
    np.testing.assert_array_equal(again(images), model(images))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"kernel": np.ones((3, 4))}, r"kernel of the shape \(3, 4\)"),
        ({"bias": np.ones(3)}, r"a bias of \(3,\)"),
        ({"feature": "head"}, "choose two with the same number of axes"),
        ({"feature": "third"}, "third"),
    ],
)
def test_a_classifier_that_does_not_fit_is_told(changed: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        reused(**changed)


def test_indices_travel_with_their_examples() -> None:
    seen = np.concatenate([batch.indices for batch in kd.batches(DATA, key=0, batch_size=4, epochs=1)])
    assert sorted(seen) == list(range(16))
    first = next(kd.batches(DATA, key=0, batch_size=4, epochs=1))
    np.testing.assert_array_equal(first.inputs, DATA.inputs[np.asarray(first.indices)])
