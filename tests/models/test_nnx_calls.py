"""How modules of Flax NNX are called: by their signature, with their modes and random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from kd_jax.errors import ConfigError
from kd_jax.models import from_nnx, mlp

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


class Normed(nnx.Module):
    """Batch statistics and dropout, with modes of its own."""

    def __init__(self, rngs: nnx.Rngs, width: int = 5):
        self.first = nnx.Linear(6, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.first(x))))


def dropped(model, **named):
    """Whether training differs from evaluation and from another key, and the state."""
    variables = model.init(KEY).variables if model.variables is None else model.variables

    def logits(train, seed):
        return np.asarray(
            model.network.apply(variables, named.get("x", X), train=train, key=jax.random.key(seed))[0].logits
        )

    assert (logits(True, 1) != logits(True, 2)).any()
    same(logits(True, 1), logits(True, 1))
    same(logits(False, 1), logits(False, 2))
    return logits(False, 1)


class TakesRngs(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.dropout = nnx.Linear(6, 3, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x, *, rngs):
        return self.dropout(self.inner(x), rngs=rngs)


class MayTakeRngs(TakesRngs):
    def __call__(self, x, rngs=None):
        x = self.inner(x)
        if rngs is None:
            return x
        return x + jax.random.normal(rngs.noise(), x.shape) + jax.random.normal(rngs.dropout(), x.shape)


class TakesTrain(TakesRngs):
    def __init__(self, rngs):
        self.inner, self.dropout = nnx.Linear(6, 3, rngs=rngs), nnx.Dropout(0.5, deterministic=None, rngs=rngs)

    def __call__(self, x, *, train):
        return self.dropout(self.inner(x), deterministic=not train)


class TakesTraining(TakesTrain):
    def __call__(self, x, training=False):
        return self.dropout(self.inner(x), deterministic=not training)


class TakesDeterministic(TakesTrain):
    def __call__(self, x, deterministic: bool):
        return self.dropout(self.inner(x), deterministic=deterministic)


class HasTrain(TakesTrain):
    """An attribute hides the method."""

    def __init__(self, rngs):
        self.inner, self.dropout = nnx.Linear(6, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.train = True

    def __call__(self, x):
        return self.dropout(self.inner(x))


@pytest.mark.parametrize(
    "kind", [TakesRngs, MayTakeRngs, TakesTrain, TakesTraining, TakesDeterministic, HasTrain, Normed]
)
def test_modes_and_random_streams_are_given_as_the_signature_has_them(kind):
    model = from_nnx(kind)
    if kind is not Normed:
        variables = model.init(KEY).variables["params"]["inner"]
        np.testing.assert_allclose(dropped(model), X @ variables["kernel"] + variables["bias"][None], rtol=1e-5)
    else:
        dropped(model)


@pytest.mark.parametrize("kind", [TakesRngs, Normed])
def test_training_with_random_streams_needs_a_key(kind):
    model = from_nnx(kind).init(KEY)
    with pytest.raises(ConfigError, match=r"key=jax\.random\.key"):
        model.network.apply(model.variables, X, train=True)


def test_a_module_without_random_streams_trains_without_a_key():
    model = mlp([6, 3]).init(KEY)
    same(
        model.network.apply(model.variables, X, train=True)[0].logits, model.network.apply(model.variables, X)[0].logits
    )


def test_batch_norm_alone_by_use_running_average():
    class Takes(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(6, use_running_average=None, rngs=rngs)

        def __call__(self, x, *, use_running_average):
            return self.norm(x, use_running_average=use_running_average)

    model = from_nnx(Takes).init(KEY)
    output, state = model.network.apply(model.variables, X, train=True)
    np.testing.assert_allclose(output.logits.mean(axis=0), np.zeros(6), atol=1e-6)
    np.testing.assert_allclose(state["norm"]["mean"], 0.01 * X.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(model(X), X / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_inputs_are_an_array_a_tuple_or_a_dict():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, tokens, mask=None):
            return self.inner(tokens if mask is None else jnp.where(mask[:, None], tokens, 0))

    model, mask = from_nnx(Two).init(KEY), jnp.array([True, False, True, False])
    expected = model(jnp.where(mask[:, None], X, 0))
    same(model((X, mask)), expected)
    same(model({"mask": mask, "tokens": X}), expected)
    assert (model(X) != expected).any()
    with pytest.raises(ConfigError, match=r"Two cannot be called with these inputs .*call=lambda"):
        model({"words": X})


def test_a_linen_module_within_the_bridge_of_nnx():
    class Bridged(nnx.Module):
        def __init__(self, rngs):
            self.linen = nnx.bridge.ToNNX(linen.Dense(3), rngs=rngs).lazy_init(X)

        def __call__(self, x):
            return self.linen(x)

    model = from_nnx(Bridged(nnx.Rngs(0)))
    params = model.variables["params"]["linen"]
    np.testing.assert_allclose(model(X), X @ params["kernel"] + params["bias"][None], rtol=1e-5)
    assert model(X, features="linen").features["linen"].shape == (4, 3)


def test_call_says_how_a_module_is_called():
    class Encoder(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(6, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def encode(self, x, *, noisy):
            return {"hidden": x}, self.dropout(self.inner(x), deterministic=not noisy)

    def call(module, inputs, train):
        return module.encode(inputs, noisy=train)[1]

    model = from_nnx(Encoder, call=call)
    assert dropped(model).shape == (4, 3)
    assert model.network == from_nnx(Encoder, call=call).network
    assert model.network != from_nnx(Encoder, call=lambda module, inputs, train: call(module, inputs, train)).network
    with pytest.raises(ConfigError, match=r"Encoder has no __call__.*call=lambda"):
        from_nnx(Encoder).init(KEY)(X)
