"""PyTorch's weights give PyTorch's logits in the zoo's networks, and go back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax.models import Model, load_state_dict, to_state_dict
from kd_jax.models.zoo.layers import BatchNorm

torch = pytest.importorskip("torch")

import torch_networks as there  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compiling")

CIFAR, WIDE = (16, 32, 64), (64, 128, 256)
NETWORKS = {
    "resnet8": lambda: there.ResNet((1, 1, 1), CIFAR, 16, 7),
    "resnet14": lambda: there.ResNet((2, 2, 2), CIFAR, 16, 7, 1),
    "resnet8x4": lambda: there.ResNet((1, 1, 1), WIDE, 32, 7),
    "resnet18": lambda: there.ResNet((2, 2, 2, 2), (64, 128, 256, 512), 64, 7, imagenet=True),
}
NAMES_ALONE = {
    "resnet110": lambda: there.ResNet((18, 18, 18), CIFAR, 16, 7),
    "resnet32x4": lambda: there.ResNet((5, 5, 5), WIDE, 32, 7),
    "resnet34": lambda: there.ResNet((3, 4, 6, 3), (64, 128, 256, 512), 64, 7, imagenet=True),
    "resnet50": lambda: there.ResNet((3, 4, 6, 3), (64, 128, 256, 512), 64, 7, imagenet=True, bottleneck=True),
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


def model_of(name, channels):
    return kd.from_nnx(lambda rngs: getattr(kd.models, name)(num_classes=7, in_channels=channels, rngs=rngs))


def channels_of(state_dict):
    return next(iter(state_dict.values())).shape[1]


def in_float64(model):
    shapes = jax.eval_shape(model.network.init, jax.random.key(0))
    return Model(model.network, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), shapes))


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_pytorch_and_weights_go_back(name):
    module = randomised(NETWORKS[name]())
    weights = module.state_dict()
    size = 33 if name.endswith("18") else 15
    x = np.random.default_rng(0).normal(size=(2, size, size + 1, channels_of(weights)))
    model = model_of(name, x.shape[-1])
    loaded = load_state_dict(model, {f"module.{key}": value for key, value in weights.items()})
    with torch.no_grad():
        single, double = (
            module.to(dtype)(torch.tensor(x).permute(0, 3, 1, 2).to(dtype)).numpy()
            for dtype in (torch.float32, torch.float64)
        )
    np.testing.assert_allclose(loaded(x.astype(np.float32)), single, rtol=1e-4, atol=1e-4 * np.abs(single).max())
    with jax.enable_x64(True):
        exact = load_state_dict(in_float64(model), module.state_dict())
        np.testing.assert_allclose(exact(x), double, rtol=1e-9, atol=1e-9 * np.abs(double).max())
    back = to_state_dict(loaded)
    assert back.keys() == weights.keys()
    fresh = NETWORKS[name]()
    fresh.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()}, strict=True)
    for key, value in fresh.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(value, module.state_dict()[key].float(), err_msg=key)


@pytest.mark.parametrize("name", NAMES_ALONE)
def test_large_networks_have_pytorchs_names_and_shapes(name):
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in NAMES_ALONE[name]().state_dict().items()}
    model = model_of(name, 3)
    shapes = jax.eval_shape(model.network.init, jax.random.key(0))
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    assert {key: value.shape for key, value in to_state_dict(Model(model.network, empty)).items()} == expected


def test_a_checkpoint_of_a_training_gives_its_weights(tmp_path):
    module = randomised(NETWORKS["resnet8"]())
    path = tmp_path / "student_best.pth"
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    torch.save(
        {"epoch": 240, "best_acc": 72.5, "optimizer": optimizer.state_dict(), "model": module.state_dict()}, path
    )
    found = to_state_dict(load_state_dict(model_of("resnet8", 3), path))
    given = load_state_dict(model_of("resnet8", 3), {"state_dict": module.state_dict()})
    for name, value in to_state_dict(given).items():
        np.testing.assert_array_equal(found[name], value)
    np.testing.assert_array_equal(found["fc.weight"], module.fc.weight.detach())


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
