"""Modules of Flax Linen as users write them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax.core import freeze

from kd_jax.data.batch import Batch
from kd_jax.errors import ConfigError
from kd_jax.models import count_parameters, feature_names, from_linen

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


class Keyword(linen.Module):
    @linen.compact
    def __call__(self, x, *, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(5)(x))
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not train)(x))


class Training(linen.Module):
    @linen.compact
    def __call__(self, x, training: bool = False):
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not training)(x))


class Positional(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not train)(x))


class Deterministic(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic=True):
        return linen.Dense(3)(linen.Dropout(0.5)(x, deterministic=deterministic))


class Averages(linen.Module):
    @linen.compact
    def __call__(self, x, *, use_running_average):
        x = linen.BatchNorm(use_running_average=use_running_average)(x)
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=use_running_average)(x))


class Field(linen.Module):
    train: bool = True

    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not self.train)(x))


class Stream(linen.Module):
    """A random stream of its own, which Flax draws from `params` where it is not given."""

    @linen.compact
    def __call__(self, x, train):
        if train:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return linen.Dense(3)(x)


class Plain(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x)


PLAIN = Plain().init(KEY, X)


@pytest.mark.parametrize("kind", [Keyword, Training, Positional, Deterministic, Averages, Field, Stream])
def test_modes_and_random_streams_are_given_as_the_signature_has_them(kind):
    model = from_linen(kind(), X).init(KEY)

    def logits(train, seed):
        return np.asarray(model.network.apply(model.variables, X, train=train, key=jax.random.key(seed))[0].logits)

    assert (logits(True, 1) != logits(True, 2)).any()
    same(logits(True, 1), logits(True, 1))
    same(logits(False, 1), logits(False, 2))
    same(logits(False, 1), np.asarray(model.network.apply(model.variables, X)[0].logits))
    with pytest.raises(ConfigError, match=r"key=jax\.random\.key"):
        model.network.apply(model.variables, X, train=True)


def test_a_module_of_one_mode_needs_no_key():
    model = from_linen(Plain(), X).init(KEY)
    params = model.variables["params"]["Dense_0"]
    output, state = model.network.apply(model.variables, X, train=True)
    np.testing.assert_allclose(output.logits, X @ params["kernel"] + params["bias"][None], rtol=1e-5)
    assert state == {}


def test_examples_are_arrays_or_shapes_and_variables_those_of_flax():
    shape = jax.ShapeDtypeStruct((2, 6), jnp.float32)
    one, other = from_linen(Keyword(), X), from_linen(Keyword(), shape)
    same(one.init(KEY).variables["params"], other.init(KEY).variables["params"])
    given = Keyword().init(KEY, X, train=False)
    model = from_linen(Keyword(), variables=freeze(given))
    same(model.variables, given)
    assert type(model.variables) is dict
    np.testing.assert_allclose(model(X), Keyword().apply(given, X, train=False), rtol=1e-5, atol=1e-6)
    assert count_parameters(model) == 6 * 5 + 5 + 2 * 5 + 5 * 3 + 3
    assert jax.tree.map(jnp.shape, one.init(KEY).variables) == jax.tree.map(jnp.shape, given)
    with pytest.raises(ConfigError, match=r"from_linen\(module, inputs\)"):
        model.init(KEY)


def test_examples_of_float64_are_those_of_float32():
    model = from_linen(Keyword(), np.asarray(X, np.float64))
    same(model.init(KEY).variables["params"], from_linen(Keyword(), X).init(KEY).variables["params"])


def test_equal_modules_are_equal_networks():
    assert from_linen(Keyword(), X).network == from_linen(Keyword(), np.asarray(X)).network
    assert from_linen(Field(True), X).network != from_linen(Field(False), X).network
    assert from_linen(Keyword(), X).network != from_linen(Keyword(), X[:2]).network

    class Listed(linen.Module):
        sizes: list
        options: dict
        table: object = None

        @linen.compact
        def __call__(self, x):
            for size in self.sizes:
                x = linen.Dense(size)(x)
            return x

    one, other = (from_linen(Listed([4, size], {"a": [1]}), X).network for size in (3, 3))
    assert one == other
    assert hash(one) == hash(other)
    assert one != from_linen(Listed([4, 2], {"a": [1]}), X).network
    arrays = [from_linen(Listed([3], {}, np.arange(3)), X).network for _ in range(2)]
    assert arrays[0] != arrays[1]


def test_inputs_are_an_array_a_tuple_or_a_dict():
    class Two(linen.Module):
        @linen.compact
        def __call__(self, tokens, mask, train=False):
            return linen.Dense(3)(jnp.where(mask[:, None], tokens, 0))

    mask = jnp.array([True, False, True, False])
    pair, named = (X, mask), {"mask": mask, "tokens": X}
    model = from_linen(Two(), pair).init(KEY)
    same(model(pair), model(named))
    same(from_linen(Two(), named).init(KEY).variables, model.variables)
    with pytest.raises(ConfigError, match="Two cannot be called with these inputs"):
        model(X)


@pytest.mark.slow
def test_every_collection_is_carried_and_what_is_sown_is_not():
    class Every(linen.Module):
        @linen.compact
        def __call__(self, x):
            calls = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
            cache = self.variable("cache", "last", jnp.zeros, (6,))
            calls.value, cache.value = calls.value + 1, x[0]
            self.sow("intermediates", "hidden", x)
            self.sow("losses", "penalty", jnp.square(x).sum())
            return linen.Dense(3)(x)

    model = from_linen(Every(), X).init(KEY)
    state = model.network.split(model.variables)[1]
    assert "intermediates" not in state

    def step(state, _):
        output, state = model.network.apply({"params": model.variables["params"], **state}, X, train=True, key=KEY)
        return state, output.logits

    carried, logits = jax.lax.scan(step, state, None, length=3)
    assert int(carried["counts"]["calls"]) == int(state["counts"]["calls"]) + 3
    same(carried["cache"]["last"], X[0])
    assert logits.shape == (3, 4, 3)
    same(model.network.apply(model.variables, X)[1], state)


def test_collections_that_training_may_change_can_be_named():
    model = from_linen(Keyword(), X, mutable=()).init(KEY)
    with pytest.raises(Exception, match="batch_stats"):
        model.network.apply(model.variables, X, train=True, key=KEY)
    model = from_linen(Keyword(), X, mutable=("batch_stats",)).init(KEY)
    state = model.network.apply(model.variables, X, train=True, key=KEY)[1]
    assert (state["batch_stats"]["BatchNorm_0"]["mean"] != 0).any()


def test_a_state_that_changes_its_structure_is_refused():
    class Growing(linen.Module):
        @linen.compact
        def __call__(self, x):
            seen = self.variable("seen", "rows", lambda: {"first": jnp.zeros(6)})
            if not self.is_initializing():
                seen.value = {**seen.value, "other": x[0]}
            return linen.Dense(3)(x)

    model = from_linen(Growing(), X).init(KEY)
    with pytest.raises(ConfigError, match=r"changes the structure of rows.*mutable"):
        model.network.apply(model.variables, X, train=True)


def test_streams_of_lifted_modules_are_named():
    class Noise(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x + jax.random.normal(self.make_rng("noise"), x.shape) if self.has_rng("noise") else x

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(Noise()(x))

    quiet, loud = from_linen(Net(), X), from_linen(Net(), X, rngs=("dropout", "noise"))
    variables = quiet.init(KEY).variables
    logits = [model.network.apply(variables, X, train=True, key=KEY)[0].logits for model in (quiet, loud)]
    same(logits[0], quiet.network.apply(variables, X)[0].logits)
    assert (logits[0] != logits[1]).any()


def test_boxes_of_partitioned_parameters_survive():
    class Boxed(linen.Module):
        @linen.compact
        def __call__(self, x):
            init = linen.with_partitioning(linen.initializers.lecun_normal(), ("data", None))
            return linen.Dense(3, kernel_init=init)(x)

    model = from_linen(Boxed(), X).init(KEY)
    kernel = model.variables["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel, linen.Partitioned)
    assert kernel.names == ("data", None)
    assert count_parameters(model) == 21

    def loss(params):
        return model.network.apply({"params": params}, X, train=True)[0].logits.sum()

    gradient = jax.grad(loss)(model.variables["params"])
    assert isinstance(gradient["Dense_0"]["kernel"], linen.Partitioned)
    np.testing.assert_allclose(gradient["Dense_0"]["kernel"].value[:, 0], X.sum(axis=0), rtol=1e-5)


def test_call_says_how_a_module_is_called():
    class Encoder(linen.Module):
        def setup(self):
            self.inner, self.dropout = linen.Dense(3), linen.Dropout(0.5)

        def encode(self, x, noisy):
            return {"x": x}, self.dropout(self.inner(x), deterministic=not noisy)

    model = from_linen(Encoder(), X, call=lambda module, inputs, train: module.encode(inputs, train)[1]).init(KEY)
    params = model.variables["params"]["inner"]
    np.testing.assert_allclose(model(X), X @ params["kernel"] + params["bias"][None], rtol=1e-5)
    trained = model.network.apply(model.variables, X, train=True, key=KEY)[0].logits
    assert 0 < np.mean(np.asarray(trained) == 0) < 1
    assert "inner" in feature_names(model, X)


def test_a_batch_is_an_example_of_its_inputs():
    assert from_linen(Plain(), Batch(X, KEY)).network == from_linen(Plain(), X).network


def test_a_module_without_parameters():
    class Mean(linen.Module):
        def __call__(self, x):
            return x[:, :3]

    model = from_linen(Mean(), X).init(KEY)
    same(model(X), X[:, :3])
    assert count_parameters(model) == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: from_linen(Keyword(), (6, 6, 1)), r"have a int: give arrays, or jax\.ShapeDtypeStruct"),
        (lambda: from_linen(Keyword()), r"give from_linen\(module, inputs\)"),
        (lambda: from_linen(Keyword(), variables={}), "no collections"),
        (lambda: from_linen(Keyword(), variables={"params": X}), "no collections"),
        (lambda: from_linen(Plain(), variables=PLAIN["params"]), "of Plain have Dense_0 and no params: give"),
        (lambda: from_linen(Plain(), X[:, :-1], variables=PLAIN), r"the parameter Dense_0\.kernel of Plain is \("),
        (lambda: from_linen(Plain(), (X, X)), "Plain cannot be called with these inputs"),
    ],
)
def test_what_cannot_be_a_model_is_refused(make, says):
    with pytest.raises(ConfigError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("asked", [True, False])
def test_in_evaluation_there_are_random_numbers_only_where_a_module_draws_some(asked):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            off = asked and not self.has_rng("dropout")
            return linen.Dense(3)(linen.Dropout(0.5, deterministic=off)(x))

    model = from_linen(Net(), X).init(0)
    evaluated, _ = model.network.apply(model.variables, X, key=jax.random.key(0))
    trained, _ = model.network.apply(model.variables, X, train=True, key=jax.random.key(0))
    assert np.allclose(evaluated.logits, trained.logits) == (not asked)
    if asked:
        np.testing.assert_array_equal(evaluated.logits, model.network.apply(model.variables, X)[0].logits)
