"""The zoo: sizes as published, initial values, features, training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import HOW

import kd_jax as kd
from kd_jax.errors import ShapeError
from kd_jax.models import count_parameters, zoo
from kd_jax.models.calling import path_name

pytestmark = pytest.mark.usefixtures("quick_compiling")

# Of 100 classes, counted in RepDistiller's networks; of 1000 classes, as torchvision and mdistiller have them; LeNet's
# of 10.
PARAMETERS = {
    "resnet8": 83_892, "resnet14": 181_108, "resnet20": 278_324, "resnet32": 472_756, "resnet44": 667_188,
    "resnet56": 861_620, "resnet110": 1_736_564, "resnet8x4": 1_233_540, "resnet32x4": 7_433_860,
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032,
    "wrn_16_1": 180_916, "wrn_16_2": 703_284, "wrn_40_1": 569_780, "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028, "vgg11": 9_277_284, "vgg13": 9_462_180, "vgg16": 14_774_436, "vgg19": 20_086_692,
    "mobilenet_v1": 4_231_976, "mobilenet_v2": 812_836, "shufflenet_v1": 949_258, "shufflenet_v2": 1_355_528,
    "lenet": 61_706,
}  # fmt: skip


def params(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@pytest.mark.parametrize("name", zoo.__all__)
def test_parameters_are_as_many_as_published(name):
    make = getattr(kd.models, name)
    shapes = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    assert count_parameters(params(shapes)) == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,} parameters" in make.__doc__


def test_every_network_is_asked_for_and_listed():
    assert sorted(PARAMETERS) == sorted(zoo.__all__)
    assert set(zoo.__all__) <= set(kd.models.__all__)


# Of images of 28 × 28 × 1.
FEATURES = {
    "resnet8": {
        "layer1": (28, 28, 16), "layer2": (14, 14, 32), "layer3": (7, 7, 64), "layer3.0.preact": (7, 7, 64),
        "avgpool": (64,),
    },
    "resnet18": {"layer4": (1, 1, 512), "maxpool": (7, 7, 64)},
    "wrn_16_2": {
        "block1": (28, 28, 32), "block2": (14, 14, 64), "block3": (7, 7, 128), "block3.layer.0.bn1": (14, 14, 64),
        "avgpool": (128,),
    },
    "vgg8": {"block3": (3, 3, 512), "block4": (3, 3, 512), "avgpool": (512,)},
    "mobilenet_v1": {"model.3": (7, 7, 128), "model.13": (1, 1, 1024)},
    "mobilenet_v2": {"blocks.1": (14, 14, 12), "blocks.6": (2, 2, 160), "avgpool": (1280,)},
    "shufflenet_v1": {"layer2": (7, 7, 480), "layer3.3.preact": (4, 4, 960)},
    "shufflenet_v2": {"layer1": (14, 14, 116), "avgpool": (1024,)},
    "lenet": {"fc2": (84,)},
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features_have_the_names_of_the_papers(name):
    model = kd.from_nnx(lambda rngs: getattr(kd.models, name)(num_classes=10, in_channels=1, rngs=rngs))
    found = kd.feature_names(model, jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32))
    assert {path: found[path].shape for path in FEATURES[name]} == {k: (2, *v) for k, v in FEATURES[name].items()}


@pytest.mark.parametrize(("name", "size"), [("vgg8", 7), ("lenet", 33)])
def test_an_image_that_does_not_fit_is_refused(name, size):
    model = kd.from_nnx(lambda rngs: getattr(kd.models, name)(in_channels=3, rngs=rngs))
    with pytest.raises(ShapeError, match="pixels") as error:
        kd.feature_names(model, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))
    assert "\n" not in str(error.value)


def test_a_pre_activation_is_what_the_relu_gets():
    model = kd.from_nnx(lambda rngs: kd.models.resnet8(num_classes=3, rngs=rngs))
    model = kd.Model(model.network, jax.jit(model.network.init)(jax.random.key(0)))
    features = model(np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32), features=[
        "layer1", "layer1.0.preact", "layer3", "avgpool"]).features  # fmt: skip
    assert (features["layer1.0.preact"] < 0).any()
    np.testing.assert_array_equal(features["layer1"], np.maximum(features["layer1.0.preact"], 0))
    np.testing.assert_allclose(features["avgpool"], features["layer3"].mean(axis=(1, 2)), rtol=1e-5)


# The deviations of the reference's initial values: of the kernel and of the biases, and whether they are normal.
STARTS = {
    "resnet8": {
        "layer3.0.conv2": ((2 / (9 * 64)) ** 0.5, None, True), "fc": ((3 * 64) ** -0.5, (3 * 64) ** -0.5, False),
    },
    "wrn_16_2": {"block3.layer.0.conv1": ((2 / (9 * 128)) ** 0.5, None, True), "fc": ((3 * 128) ** -0.5, 0, False)},
    "vgg8": {"block2.0": ((2 / (9 * 256)) ** 0.5, 0, True), "classifier": (0.01, 0, True)},
    "mobilenet_v2": {
        "blocks.5.0.conv.3": ((2 / (9 * 288)) ** 0.5, None, True), "classifier.0": (0.01, 0, True),
    },
    "shufflenet_v1": {
        "layer3.1.conv2": ((3 * 9) ** -0.5, None, False), "layer2.0.conv3": ((3 * 20) ** -0.5, None, False),
        "linear": ((3 * 960) ** -0.5, (3 * 960) ** -0.5, False),
    },
    "lenet": {"conv2": ((3 * 150) ** -0.5, (3 * 150) ** -0.5, False)},
}  # fmt: skip


def initial(name, seed):
    """A new network's parameters by their paths."""

    @jax.jit
    def made(key):
        return params(getattr(kd.models, name)(rngs=nnx.Rngs(key)))

    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(made(jax.random.key(seed)))}


@pytest.mark.parametrize("name", STARTS)
def test_initial_values_have_the_deviation_of_the_reference(name):
    values = initial(name, 0)
    kernels = {path.removesuffix(".kernel"): np.asarray(leaf, np.float64) for path, leaf in values.items()}
    for path, (deviation, of_bias, is_normal) in STARTS[name].items():
        kernel = kernels[path]
        # Within 5 standard deviations of an estimated standard deviation.
        assert kernel.std() == pytest.approx(deviation, rel=5 / (2 * kernel.size) ** 0.5)
        assert abs(kernel.mean()) < 5 * deviation / kernel.size**0.5
        if is_normal:
            assert np.abs(kernel).max() > 3 * deviation
        else:
            assert 1.6 * deviation < np.abs(kernel).max() <= 3**0.5 * deviation * (1 + 1e-6)
        if of_bias is None:
            assert f"{path}.bias" not in values
        elif of_bias == 0:
            assert (values[f"{path}.bias"] == 0).all()
        else:
            assert 0 < np.abs(values[f"{path}.bias"]).max() <= 3**0.5 * of_bias * (1 + 1e-6)


def test_no_two_initial_values_are_of_one_number():
    one, two = (
        [leaf for path, leaf in initial("resnet8", seed).items() if path.endswith("kernel") and path != "fc.kernel"]
        for seed in (0, 1)
    )
    drawn = np.concatenate(
        [(leaf * (leaf[..., 0].size // leaf.shape[2] * leaf.shape[3]) ** 0.5).ravel() for leaf in one]
    )
    # Some of so many float32 numbers are equal by chance.
    assert len(np.unique(drawn)) > 0.98 * len(drawn)
    assert all((first != second).any() for first, second in zip(one, two, strict=True))


@pytest.mark.slow
def test_a_student_learns_from_a_teachers_stage_with_batch_statistics():
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    network = kd.from_nnx(lambda rngs: kd.models.resnet8(num_classes=4, rngs=rngs)).network
    teacher, start = (kd.Model(network, jax.jit(network.init)(jax.random.key(seed))) for seed in (0, 1))
    given = kd.to_module(start)
    result = kd.distill(
        given, teacher, kd.Batch(images, np.arange(16) % 4), method=kd.KD() + kd.FitNet("layer2", "layer2"),
        prepare=lambda key, x, train: x.astype(jnp.float32) / 255, **HOW,
    )  # fmt: skip
    assert type(result.student) is type(given)
    assert (result.student.bn1.mean[...] != 0).all()
    assert (given.bn1.mean[...] == 0).all()
    assert np.isfinite(result.history["loss"]).all()
    assert result.student.bn1.use_running_average
