"""A PyTorch module as a teacher, in compiled programs."""

import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import ConfigError
from kd_jax.models import as_model, count_parameters, feature_names, from_torch

torch = pytest.importorskip("torch")

X = np.asarray(jax.random.normal(jax.random.key(1), (8, 5, 5, 2)))


def last(module, images, train):
    return module(images.permute(0, 3, 1, 2))


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Dropout(0.5),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 3),
    )


def expected(module, images):
    module.eval()
    with torch.no_grad():
        return module(torch.tensor(images).permute(0, 3, 1, 2)).numpy()


def test_the_logits_are_those_of_pytorch_and_the_module_is_not_changed():
    module = net()
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = from_torch(module, call=last)
    logits = model(X)
    assert logits.dtype == jnp.float32
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    np.testing.assert_allclose(logits, expected(module, X), rtol=1e-5, atol=1e-6)
    module[4].bias.data += 1
    np.testing.assert_array_equal(model(X), logits)
    assert as_model(model) is model
    assert count_parameters(model) == 0


def test_it_is_called_within_jit_scan_vmap_and_beside_a_gradient():
    module = net()
    model = from_torch(module, call=last)
    want = expected(module, X)

    @jax.jit
    def logits(images):
        return model.network.apply(model.variables, images)[0].logits

    np.testing.assert_allclose(logits(X), want, rtol=1e-5, atol=1e-6)
    parts = jax.jit(lambda x: jax.lax.scan(lambda carry, part: (carry, logits(part)), 0, x)[1])(
        X.reshape(4, 2, 5, 5, 2)
    )
    np.testing.assert_allclose(parts.reshape(8, 3), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(logits)(X[:, None])[:, 0], want, rtol=1e-5, atol=1e-6)

    def loss(scale):
        return (scale * logits(X)).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(2.0), want.sum(), rtol=1e-4)


def test_there_is_neither_a_gradient_nor_a_training():
    model = from_torch(net(), call=last)
    with pytest.raises(ConfigError, match="has no gradient here"):
        jax.grad(lambda x: model(x).sum())(jnp.asarray(X))
    with pytest.raises(ConfigError, match="cannot be trained here: give it as the teacher"):
        model.network.apply({}, X, train=True)
    with pytest.raises(ConfigError, match="no features"):
        model(X, features=("0",))
    assert feature_names(model, X) == {}


def test_the_shape_is_asked_for_once_for_each_shape_of_inputs():
    batches = []

    def call(module, x, train):
        batches.append(tuple(x.shape))
        return module(x)

    model = from_torch(torch.nn.Linear(2, 3), call=call)
    for _ in range(3):
        model.network.apply({}, jnp.ones((4, 2)))
    model.network.apply({}, jnp.ones((5, 2)))
    assert batches == [*[(4, 2)] * 4, *[(5, 2)] * 2]
    one = from_torch(torch.nn.Linear(2, 3))
    assert one.network == as_model(one).network
    assert one.network != from_torch(torch.nn.Linear(2, 3)).network


class Two(torch.nn.Module):
    """Tokens and a mask, a dict with logits in half precision."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 3)

    def forward(self, tokens, mask):
        return {"logits": (self.embed(tokens) * mask[..., None]).to(torch.bfloat16), "hidden": None}


def test_inputs_are_arrays_tuples_or_dicts_of_any_type():
    module = Two()
    model = from_torch(module)
    tokens, mask = jnp.array([[1, 2], [3, 6]]), jnp.array([[True, False], [True, True]])
    want = module.embed.weight.detach().to(torch.bfloat16).float().numpy()[np.asarray(tokens)]
    want = want * np.asarray(mask)[..., None]
    for inputs in ((tokens, mask), {"mask": mask, "tokens": tokens}):
        np.testing.assert_array_equal(model(inputs), want)
    half = from_torch(torch.nn.Linear(2, 3))
    assert half(jnp.ones((4, 2), jnp.bfloat16)).shape == (4, 3)


def test_threads_and_large_batches():
    model = from_torch(torch.nn.Linear(2048, 3))
    x = jax.random.normal(jax.random.key(0), (1024, 2048))
    want = np.asarray(model(x))
    found = [None] * 4

    def work(place):
        found[place] = np.asarray(jax.jit(lambda x: model.network.apply({}, 1.0 * x)[0].logits)(x))

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for logits in found:
        np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "call", "says"),
    [
        (torch.nn.Conv2d(2, 4, 3), None, r"Conv2d cannot be called with inputs of the shape \(8, 5, 5, 2\).*permute"),
        (torch.nn.Identity(), lambda module, x, train: (x, x), "Identity gives a tuple and no tensor of logits"),
        (torch.nn.Identity(), lambda module, x, train: x > 0, r"gives a tensor of torch\.bool"),
        (torch.nn.Identity(), lambda module, x, train: None, "gives a NoneType"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(module, call, says):
    model = from_torch(module, call=call)
    with pytest.raises(ConfigError, match=says) as error:
        jax.eval_shape(lambda x: model.network.apply({}, x), X)
    assert "\n" not in str(error.value).partition("\n-----")[0]


def test_what_is_no_pytorch_module_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="a function is no PyTorch module"):
        from_torch(last)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="needs PyTorch, which is not installed"):
        from_torch(last)


def test_the_digest_tells_modules_apart():
    """By their values, buffers that no state_dict has, layers, settings of one's own, and the name of `call`."""

    class Own(torch.nn.Module):
        def __init__(self, by=1.0):
            super().__init__()
            self.by = by
            self.register_buffer("add", torch.zeros(3, dtype=torch.bfloat16), persistent=False)

        def forward(self, x):
            return self.by * x + self.add.float()

    added = Own()
    added.add += 1
    linear = [torch.nn.Sequential(torch.nn.Linear(2, 3), kind) for kind in (torch.nn.ReLU(), torch.nn.GELU())]
    linear[1][0].load_state_dict(linear[0][0].state_dict())
    models = [from_torch(net()), from_torch(net(), call=last), from_torch(Own()), from_torch(Own(2.0)),
              from_torch(added), *map(from_torch, linear)]  # fmt: skip
    assert len({model.network.host.digest for model in models}) == len(models)
    assert from_torch(net()).network.host.digest == models[0].network.host.digest


def test_a_module_that_cannot_be_copied_is_told():
    class Remembers(torch.nn.Linear):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    module = Remembers(6, 3)
    module(torch.zeros(1, 6))
    with pytest.raises(
        ConfigError, match=r"Remembers cannot be copied \(.*give one that keeps nothing of a call"
    ) as error:
        from_torch(module)
    assert "\n" not in str(error.value)
