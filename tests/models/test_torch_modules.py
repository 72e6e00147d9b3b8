"""A PyTorch `state_dict` read into an NNX module of the same structure gives the same logits."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kd_jax.errors import DataError
from kd_jax.models import Model, from_nnx
from kd_jax.models.torch_modules import load_state_dict

torch = pytest.importorskip("torch")


class Net(nnx.Module):
    """Two-, one- and three-dimensional convolutions, groups, norms, an embedding, a bare linear layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 2), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.grouped = nnx.Conv(4, 6, (2, 2), padding="VALID", feature_group_count=2, use_bias=False, rngs=rngs)
        self.line = nnx.Conv(6, 5, (3,), padding="VALID", rngs=rngs)
        self.cube = nnx.Conv(1, 3, (2, 2, 2), padding="VALID", rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs)])
        self.embed = nnx.Embed(7, 4, rngs=rngs)

    def __call__(self, x):
        x = self.grouped(nnx.relu(self.norm(self.conv(x))))
        x = self.line(x.mean(axis=2))
        x = x.mean(axis=1)[:, :2, None, None, None].repeat(2, 2).repeat(2, 3)
        x = self.cube(x).mean(axis=(1, 2, 3))
        return self.layers[1](self.layers[0](x)) @ self.embed.embedding[...].T


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, (3, 2))
        self.norm = torch.nn.BatchNorm2d(4)
        self.grouped = torch.nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.line = torch.nn.Conv1d(6, 5, 3)
        self.cube = torch.nn.Conv3d(1, 3, 2)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)])
        self.embed = torch.nn.Embedding(7, 4)

    def forward(self, x):
        x = self.grouped(torch.relu(self.norm(self.conv(x))))
        x = self.line(x.mean(dim=3)).mean(dim=2)[:, None, :2, None, None].repeat(1, 1, 1, 2, 2)
        x = self.cube(x).mean(dim=(2, 3, 4))
        return self.layers[1](self.layers[0](x)) @ self.embed.weight.T


def trained():
    torch.manual_seed(0)
    model = TorchNet()
    for _ in range(3):  # the statistics of the norm move
        model(torch.randn(8, 2, 9, 8))
    return model.eval()


X = np.random.default_rng(0).normal(size=(4, 9, 8, 2)).astype(np.float32)


def expected(model):
    with torch.no_grad():
        return model(torch.tensor(X).permute(0, 3, 1, 2)).numpy()


@pytest.mark.parametrize("suffix", ["mapping", ".safetensors", ".pt"])
def test_the_same_logits(suffix, tmp_path):
    from safetensors.torch import save_file

    model = trained()
    source = model.state_dict()
    assert int(source["norm.num_batches_tracked"]) == 3
    if suffix != "mapping":
        path = tmp_path / f"weights{suffix}"
        save_file(source, path) if suffix == ".safetensors" else torch.save(source, path)
        source = path
    given = Net(nnx.Rngs(0))
    module = load_state_dict(given, source)
    assert type(module) is Net
    assert module is not given
    assert (given.norm.mean[...] == 0).all()
    np.testing.assert_allclose(module(jnp.asarray(X)), expected(model), rtol=1e-4, atol=1e-5)
    back = load_state_dict(from_nnx(Net), source)
    assert isinstance(back, Model)
    np.testing.assert_allclose(back(X), expected(model), rtol=1e-4, atol=1e-5)


def test_layers_of_other_names_are_renamed():
    model = trained()
    source = {f"body.{name}": value for name, value in model.state_dict().items()}
    source = {name.replace("body.line", "head.0"): value for name, value in source.items()}
    for rename in (
        {"body": "x", "body.layers": "layers", "head.0": "line"}
        | {f"body.{n}": n for n in ("conv", "norm", "grouped", "cube", "embed")},
        lambda layer: {"head.0": "line"}.get(layer, layer.removeprefix("body.")),
    ):
        module = load_state_dict(Net, source, rename=rename)
        np.testing.assert_allclose(module(jnp.asarray(X)), expected(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"other.weight": np.ones(2)}, r"has other\.weight, for which the module has no other\.kernel or other\.scale"),
        (
            {"conv.weight": np.ones((4, 2, 2, 2))},
            r"as conv\.kernel, has the shape \(2, 2, 2, 4\): it must have \(3, 2, 2, 4\)",
        ),
        ({"conv.weight": np.full((4, 2, 3, 2), np.nan)}, "has NaN or infinite"),
        ({"conv.bias": None}, r"lacks conv\.bias of the module"),
        ({"conv.bias": np.ones(4, int)}, "must hold floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    source = {**trained().state_dict(), **change}
    source = {name: value for name, value in source.items() if value is not None}
    with pytest.raises(DataError, match=says) as error:
        load_state_dict(Net, source)
    assert "\n" not in str(error.value)
