"""What a user's model returns, and what may be given as a model."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from kd_jax.errors import ConfigError
from kd_jax.models import Model, Output, as_model, as_output, from_function, from_linen, from_nnx, mlp

LOGITS, X = jnp.ones((2, 3)), jnp.ones((2, 4))


class Named(NamedTuple):
    hidden: Any
    logits: Any


@dataclasses.dataclass
class Attribute:
    logits: Any
    loss: Any = None


@pytest.mark.parametrize(
    ("result", "features"),
    [
        (LOGITS, {}),
        (np.ones((2, 3)), {}),
        (Output(LOGITS), {}),
        (Output(LOGITS, {"a": X}), {"a"}),
        ({"logits": LOGITS, "loss": None, "states": (X, {"b": X})}, {"states.0", "states.1.b"}),
        (Named([X], LOGITS), {"hidden.0"}),
        (Attribute(LOGITS), {}),
    ],
)
def test_logits_are_found(result, features):
    output = as_output(result)
    assert isinstance(output, Output)
    assert output.logits.shape == (2, 3)
    assert set(output.features) == set(features)


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (None, "gives None and no logits"),
        ((LOGITS, X), "gives a tuple of 2 and no logits"),
        ([LOGITS], "gives a list of 1 and no logits"),
        ({"scores": LOGITS}, "gives a dict with scores and no logits"),
        ({}, "gives a dict with nothing"),
        (1.5, "gives a float and no logits"),
        ({"logits": (LOGITS,)}, "gives a tuple of 1 where its logits should be"),
        (jnp.ones((2, 3), jnp.int32), "logits of type int32"),
        (jnp.ones((2, 3), bool), "logits of type bool"),
        (jnp.ones(()), "gives a single number"),
    ],
)
def test_what_has_no_logits_is_refused_with_the_remedy(result, says):
    with pytest.raises(ConfigError, match=says) as error:
        as_output(result, "MyNet")
    assert str(error.value).startswith("MyNet gives")
    assert "call=lambda module, inputs, train: …" in str(error.value)
    assert "\n" not in str(error.value)


class Module(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.inner(x)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x)


def test_models_are_taken_in_every_form():
    model = mlp([4, 3])
    assert as_model(model) is model
    assert as_model(model.network).network is model.network
    for given in (Module, lambda rngs: Module(rngs)):
        assert as_model(given).init(0)(X).shape == (2, 3)
        assert as_model(given).variables is None
    module = Module(nnx.Rngs(3))
    np.testing.assert_allclose(as_model(module)(X), module(X), rtol=1e-6)
    assert isinstance(as_model(from_linen(Linen(), X)), Model)


@pytest.mark.parametrize(
    "door", [lambda call: from_nnx(Module, call=call), lambda call: from_linen(Linen(), X, call=call)]
)
def test_a_call_of_a_users_own_takes_the_three_that_it_is_given(door):
    with pytest.raises(ConfigError, match=r"too many positional arguments.*call\(module, inputs, train\)"):
        door(lambda module, inputs: module(inputs))


class Torch:
    def state_dict(self):
        return {}

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (Linen(), r"Linen is a Linen module.*kd\.from_linen\(module, inputs\)"),
        (Linen, r"Linen\(…\) is a Linen module.*kd\.from_linen"),
        (Torch(), r"Torch is a PyTorch module.*kd\.from_torch\(module\)"),
        (3, r"a int is no model.*kd\.from_function"),
        (None, "a NoneType is no model"),
        (lambda: Module(nnx.Rngs(0)), "cannot be called with nnx.Rngs alone"),
        (lambda inputs: 3, "gives a int and no nnx.Module"),
    ],
)
def test_what_is_no_model_is_refused_with_the_remedy(given, says):
    with pytest.raises(ConfigError, match=says) as error:
        as_model(given)
    assert "\n" not in str(error.value)


def test_functions_are_called_by_their_signature():
    params = jnp.arange(12.0).reshape(4, 3)
    plain = from_function(lambda params, x: x @ params, params)
    assert plain.variables is params
    np.testing.assert_allclose(plain(X), X @ params)

    def moded(params, x, train, key=None):
        return x @ params + (1.0 if train and key is not None else 0.0)

    model = from_function(moded, init=lambda key: params)
    output, state = model.network.apply(params, X, train=True, key="a key")
    np.testing.assert_allclose(output.logits, X @ params + 1)
    assert state == {}
    np.testing.assert_allclose(model.init(0)(X), X @ params)
    assert model.network == from_function(moded, init=model.network.make).network
    assert model.network != plain.network


def test_a_function_with_a_state_carries_it():
    def counted(params, state, x):
        return x @ params, state + 1

    params = jnp.ones((4, 3))
    model = from_function(counted, params, state=jnp.zeros(()))
    assert set(model.variables) == {"params", "state"}
    assert float(model.network.apply(model.variables, X, train=True)[1]) == 1
    assert float(model.network.apply(model.variables, X)[1]) == 0
    with pytest.raises(ConfigError, match="a dict with params and state"):
        model.network.apply(params, X)
    with pytest.raises(ConfigError, match=r"return \(logits, state\)"):
        from_function(lambda params, state, x: x @ params, params, state=jnp.zeros(()))(X)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: from_function(lambda params, x: x), r"from_function\(apply, init=init\)"),
        (lambda: from_function(lambda params, x: x, X, init=lambda key: X), "either parameters or what makes them"),
        (lambda: from_function(lambda key: X, lambda params, x: x), "params is a function"),
        (lambda: from_function(lambda x: x, X)(X), "cannot be called with these inputs"),
        (lambda: from_function(lambda params, x: x, X).init(0), r"kd\.from_function\(apply, init=init\)"),
    ],
)
def test_what_is_no_function_of_parameters_is_refused(make, says):
    with pytest.raises(ConfigError, match=says) as error:
        make()
    assert "\n" not in str(error.value).partition("\n-----")[0]
