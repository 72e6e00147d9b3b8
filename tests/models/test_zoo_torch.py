"""PyTorch's weights give PyTorch's logits in the zoo's networks, and go back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slowly import all_but

import kd_jax as kd
from kd_jax.models import Model, load_state_dict, to_state_dict
from kd_jax.models.zoo.layers import BatchNorm

torch = pytest.importorskip("torch")

from benchmarks import torch_networks as there  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compiling")

IMAGENET = (64, 128, 256, 512)
CIFAR, WIDE = (16, 32, 64), (64, 128, 256)

# Each with the height of the images that it is asked about.
NETWORKS = {
    "resnet8": (15, lambda: there.ResNet((1, 1, 1), CIFAR, 16, 7, 1)),
    "resnet14": (16, lambda: there.ResNet((2, 2, 2), CIFAR, 16, 7)),
    "resnet8x4": (8, lambda: there.ResNet((1, 1, 1), WIDE, 32, 7)),
    "resnet18": (33, lambda: there.ResNet((2, 2, 2, 2), IMAGENET, 64, 7, imagenet=True)),
    "wrn_16_2": (13, lambda: there.WideResNet(16, 2, 7)),
    "vgg8": (14, lambda: there.VGG((1, 1, 1, 1, 1), 7)),
    "mobilenet_v1": (33, lambda: there.MobileNetV1(7)),
    "mobilenet_v2": (17, lambda: there.MobileNetV2(7)),
    "shufflenet_v1": (15, lambda: there.ShuffleNet(1, 7)),
    "shufflenet_v2": (15, lambda: there.ShuffleNet(2, 7)),
    "lenet": (28, lambda: there.LeNet(7, 1, padding=2)),
}
# Those whose logits are also compared in float32.
SINGLE = ("resnet8", "mobilenet_v2", "shufflenet_v1", "lenet")
NAMES_ALONE = {
    "resnet20": lambda: there.ResNet((3, 3, 3), CIFAR, 16, 7),
    "resnet32x4": lambda: there.ResNet((5, 5, 5), WIDE, 32, 7),
    "resnet34": lambda: there.ResNet((3, 4, 6, 3), IMAGENET, 64, 7, imagenet=True),
    "resnet50": lambda: there.ResNet((3, 4, 6, 3), IMAGENET, 64, 7, imagenet=True, bottleneck=True),
    "wrn_40_1": lambda: there.WideResNet(40, 1, 7),
    "vgg11": lambda: there.VGG((1, 1, 2, 2, 2), 7),
    "vgg13": lambda: there.VGG((2, 2, 2, 2, 2), 7),
    "vgg16": lambda: there.VGG((2, 2, 3, 3, 3), 7),
    "vgg19": lambda: there.VGG((2, 2, 4, 4, 4), 7),
}


def randomised(module):
    """The module in evaluation mode, with statistics and scales that a mistake would show in."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.3, generator=generator)
    return module.eval()


@pytest.fixture(autouse=True)
def one_thread():
    """PyTorch's threads wait for one another where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(name, channels):
    """A model with zeros, whose shapes and type are what counts."""
    network = kd.from_nnx(lambda rngs: getattr(kd.models, name)(num_classes=7, in_channels=channels, rngs=rngs)).network
    return Model(network, jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), network.shapes))


def channels_of(state_dict):
    return next(value for value in state_dict.values() if value.ndim == 4).shape[1]


# Of a large one the logits are slow.
ALL = NETWORKS | {name: (33 if "resnet" in name else 16, make) for name, make in NAMES_ALONE.items()}


@pytest.mark.parametrize("name", all_but(lambda name: name in NETWORKS, [*ALL]))
def test_logits_are_those_of_pytorch_and_weights_go_back(name):
    size, make = ALL[name]
    module = randomised(make())
    weights = module.state_dict()
    width = size if name == "lenet" else size + 1
    x = np.random.default_rng(0).normal(size=(2, size, width, channels_of(weights)))
    model = model_of(name, x.shape[-1])
    inputs = torch.tensor(x).permute(0, 3, 1, 2)
    loaded = load_state_dict(model, {f"module.{key}": value for key, value in weights.items()})
    if name in SINGLE or name in NAMES_ALONE:
        with torch.no_grad():
            expected = module(inputs.float()).numpy()
        found = loaded(x.astype(np.float32))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    with jax.enable_x64(True), torch.no_grad():
        expected = module.double()(inputs).numpy()
        double = Model(model.network, jax.tree.map(np.float64, model.variables))
        exact = load_state_dict(double, module.state_dict())
        np.testing.assert_allclose(exact(x), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    back = to_state_dict(loaded)
    assert back.keys() == weights.keys()
    fresh = make()
    fresh.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()}, strict=True)
    for key, value in fresh.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(value, module.state_dict()[key].float(), err_msg=key)


@pytest.mark.parametrize("name", NAMES_ALONE)
def test_large_networks_have_pytorchs_names_and_shapes(name):
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in NAMES_ALONE[name]().state_dict().items()}
    found = to_state_dict(model_of(name, 3))
    assert {key: value.shape for key, value in found.items()} == expected


def test_a_checkpoint_of_a_training_gives_its_weights(tmp_path):
    module = randomised(NETWORKS["resnet14"][1]())
    path = tmp_path / "student_best.pth"
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    torch.save(
        {"epoch": 240, "best_acc": 72.5, "optimizer": optimizer.state_dict(), "model": module.state_dict()}, path
    )
    found = to_state_dict(load_state_dict(model_of("resnet14", 3), path))
    given = load_state_dict(model_of("resnet14", 3), {"state_dict": module.state_dict()})
    for name, value in to_state_dict(given).items():
        np.testing.assert_array_equal(found[name], value)
    np.testing.assert_array_equal(found["fc.weight"], module.fc.weight.detach())


@pytest.mark.slow
def test_a_training_step_moves_the_statistics_as_pytorch_does():
    x = np.random.default_rng(0).normal(1, 2, (3, 4, 5, 6)).astype(np.float32)
    mine, other = BatchNorm(6), torch.nn.BatchNorm2d(6)
    for _ in range(2):
        found = mine(jnp.asarray(x))
        expected = other(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mine.mean[...], other.running_mean, rtol=1e-5)
    np.testing.assert_allclose(mine.var[...], other.running_var, rtol=1e-5)
    mine.eval()
    before = mine.var[...]
    np.testing.assert_allclose(mine(jnp.asarray(x)), other.eval()(torch.tensor(x).permute(0, 3, 1, 2))
                               .permute(0, 2, 3, 1).detach(), rtol=1e-4, atol=1e-5)  # fmt: skip
    assert (mine.var[...] == before).all()
    assert mine(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
