"""The contract of a `Network`, for every door."""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from kd_jax.distill import Result
from kd_jax.errors import ConfigError
from kd_jax.evaluate import predict
from kd_jax.models import MLP, Model, Output, count_parameters, from_function, from_linen, from_nnx, mlp

KEY = jax.random.key(0)


def images(count: int = 4) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (count, 6, 6, 1))


class ConvNet(nnx.Module):
    """A model of a user's: convolution, batch statistics, dropout, plain logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))
        return self.head(self.dropout(x))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = linen.Dense(8)(x.reshape(x.shape[0], -1))
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not train)(x))


def start(key):
    return {"w": jax.random.normal(key, (36, 3)), "b": [jnp.zeros(3)]}


def noisy(params, state, x, *, train, key):
    x = x.reshape(x.shape[0], -1)
    if train:
        x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)
        state = {"mean": 0.9 * state["mean"] + x.mean(axis=0)}
    return (x - state["mean"][None]) @ params["w"] + params["b"][0][None], state


MODELS = {
    "nnx": lambda: from_nnx(ConvNet),
    "linen": lambda: from_linen(LinenNet(), images()),
    "function": lambda: from_function(noisy, init=start, state=STATE),
}
STATE = {"mean": jnp.zeros(36)}
STATEFUL = pytest.mark.parametrize("door", MODELS)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def differ(one, other):
    return any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@STATEFUL
def test_variables_are_split_and_merged_without_loss(door):
    network = MODELS[door]().network
    variables = network.init(KEY)
    params, state = network.split(variables)
    assert count_parameters(params) == count_parameters(Model(network, variables)) > 0
    assert jax.tree.leaves(state)
    same(network.merge(params, state), variables)
    same(network.init(KEY), variables)
    assert differ(network.init(jax.random.key(1)), variables)


@STATEFUL
def test_networks_made_alike_are_equal_and_compile_once(door):
    networks = [MODELS[door]().network for _ in range(3)]
    traces = []

    @partial(jax.jit, static_argnums=0)
    def logits(network, key):
        traces.append(key)
        return network.apply(network.init(key), images())[0].logits

    found = [logits(network, KEY) for network in networks]
    assert len(traces) == 1
    assert networks[0] == networks[1]
    assert hash(networks[0]) == hash(networks[2])
    same(found[0], found[2])


@pytest.mark.slow
@STATEFUL
def test_the_random_numbers_are_those_of_the_key_and_none_in_evaluation(door):
    network = MODELS[door]().network
    variables = network.init(KEY)

    def logits(seed, train):
        return np.asarray(network.apply(variables, images(), train=train, key=jax.random.key(seed))[0].logits)

    same(logits(1, True), logits(1, True))
    assert (logits(1, True) != logits(2, True)).any()
    same(logits(1, False), logits(2, False))
    same(network.apply(variables, images())[0].logits, logits(1, False))


@STATEFUL
def test_the_state_moves_in_training_alone(door):
    network = MODELS[door]().network
    variables = network.init(KEY)
    state = network.split(variables)[1]
    _, trained = network.apply(variables, images(), train=True, key=KEY)
    _, evaluated = network.apply(variables, images(), key=KEY)
    assert jax.tree.structure(trained) == jax.tree.structure(state)
    assert differ(trained, state)
    same(evaluated, state)


@STATEFUL
def test_networks_are_pure_functions_that_scan_and_vmap_over_seeds(door):
    network = MODELS[door]().network

    def train(key):
        params, state = network.split(network.init(key))

        def step(carry, key):
            def loss(params):
                output, state = network.apply(network.merge(params, carry[1]), images(), train=True, key=key)
                return jnp.square(output.logits).mean(), state

            (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(carry[0])
            return (jax.tree.map(lambda p, g: p - 0.1 * g, carry[0], gradient), state), value

        return jax.lax.scan(step, (params, state), jax.random.split(key, 3))

    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(train))(keys)
    for seed in range(2):
        jax.tree.map(
            lambda one, other, seed=seed: np.testing.assert_allclose(one[seed], other, rtol=1e-4, atol=1e-5),
            together,
            jax.jit(train)(keys[seed]),
        )


@STATEFUL
def test_a_model_gives_the_logits_of_evaluation(door):
    model = MODELS[door]()
    with pytest.raises(ConfigError, match="has no variables yet"):
        model(images())
    made = model.init(3)
    assert made.network is model.network
    assert model.variables is None
    expected = model.network.apply(model.network.init(jax.random.key(3)), images())[0].logits
    np.testing.assert_allclose(made(images()), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made(np.asarray(images())), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made(images().tolist()), expected, rtol=1e-5, atol=1e-6)
    assert differ(made(images(), train=True, key=KEY), made(images()))
    assert f"{count_parameters(made)} parameters" in repr(made)


@STATEFUL
def test_threads_do_not_meet(door):
    model = MODELS[door]().init(KEY)
    found = [None] * 8

    def work(place):
        network = MODELS[door]().network
        found[place] = network.apply(model.variables, images(), train=place % 2 == 1, key=KEY)[0].logits

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(8):
        same(found[place], found[place % 2])


@STATEFUL
def test_networks_differ_in_what_they_are_made_of(door):
    others = {
        "nnx": from_nnx(lambda rngs: MLP([36, 3], rngs=rngs)),
        "linen": from_linen(LinenNet(), images(), mutable=()),
        "function": from_function(noisy, init=start, state={"mean": jnp.ones(36)}),
    }
    assert others[door].network != MODELS[door]().network
    assert MODELS[door]().network != "a network"


def test_an_output_is_a_pytree_with_and_without_features():
    assert jax.tree.map(jnp.shape, Output(jnp.zeros((2, 3)))) == Output((2, 3), {})
    together = jax.vmap(lambda x: Output(x, {"a": 2 * x}))(jnp.ones((2, 3)))
    assert together.features["a"].shape == (2, 3)


def test_parameters_are_counted():
    assert count_parameters({"a": np.zeros((2, 3)), "b": [jax.ShapeDtypeStruct((4,), jnp.float32), 1.0]}) == 11
    with pytest.raises(ConfigError, match=r"model\.init"):
        count_parameters(mlp([3, 2]))


def test_a_key_that_may_be_missing_is_of_training_alone():
    """None means evaluation, as Equinox has it."""

    def apply(params, x, key=None):
        return x if key is None else x + jax.random.normal(key, x.shape)

    model, x = from_function(apply, {}), np.ones((4, 6), np.float32)
    np.testing.assert_array_equal(predict(model, x), x)
    np.testing.assert_array_equal(model(x), x)
    assert not np.allclose(model(x, train=True, key=jax.random.key(0)), x)
    always = from_function(lambda params, x, key: apply(params, x, key), {})
    assert not np.allclose(predict(always, x), x)


def test_parameters_of_whatever_is_a_model_are_counted():
    """Not its batch statistics and streams."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.head, self.norm = nnx.Linear(6, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.head(x)))

    module = Net(nnx.Rngs(0))
    result = Result(module, {}, from_nnx(module), None, None)
    assert [count_parameters(one) for one in (module, result, from_nnx(module))] == [27, 27, 27]
    variables = {"params": {"kernel": np.zeros((6, 3))}, "batch_stats": {"mean": np.zeros(3)}}
    assert count_parameters(variables) == 18
    assert count_parameters(from_function(lambda params, x: x, variables)) == 21, "all of it is trained"
