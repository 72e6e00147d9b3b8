import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from kd_jax.models import network as models
from kd_jax.models.network import MLP, Network, Output, count_parameters, from_function, from_linen, from_nnx, mlp

KEY = jax.random.key(0)


def images(count: int = 4, side: int = 6) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (count, side, side, 1))


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
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = linen.Dense(8)(x.reshape(x.shape[0], -1))
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not train)(x))


def linear() -> Network:
    return from_function(
        lambda key: jax.random.normal(key, (36, 3)), lambda params, x: x.reshape(x.shape[0], -1) @ params
    )


NETWORKS = {
    "mlp": lambda: mlp([36, 8, 3], dropout=0.5),
    "nnx": lambda: from_nnx(lambda rngs: ConvNet(rngs)),
    "linen": lambda: from_linen(LinenNet(), (6, 6, 1)),
}


@pytest.mark.parametrize(("sizes", "parameters"), [((784, 1200, 1200, 10), 2_395_210), ((784, 20, 20, 10), 16_330)])
def test_the_references_networks_have_their_sizes(sizes: tuple[int, ...], parameters: int) -> None:
    params, state = mlp(sizes).init(KEY)
    assert count_parameters(params) == parameters
    assert not jax.tree.leaves(state)


def test_layers_start_as_pytorch_starts_them() -> None:
    params, _ = mlp([400, 900, 10]).init(KEY)
    for layer, bound in ((params["hidden"][0], 400**-0.5), (params["output"], 900**-0.5)):
        for values in layer.values():
            assert np.abs(values).max() <= bound
            assert np.abs(values).max() > 0.8 * bound
        flat = np.asarray(layer["kernel"]).ravel()
        assert abs(flat.mean()) < 5 * bound / np.sqrt(3 * flat.size)
        assert np.std(flat) == pytest.approx(bound / np.sqrt(3), rel=0.02)


def test_an_mlp_is_matrix_products_and_relus() -> None:
    network = mlp([36, 8, 5, 3])
    params, state = network.init(KEY)
    x = images()
    output, _ = network.apply(params, state, x, train=True, key=KEY)
    expected = np.asarray(x, np.float64).reshape(4, 36)
    for i in (0, 1):
        layer = params["hidden"][i]
        expected = np.maximum(expected @ np.float64(layer["kernel"]) + np.float64(layer["bias"]), 0)
        np.testing.assert_allclose(output.features[i], expected, rtol=1e-5, atol=1e-6)
    expected = expected @ np.float64(params["output"]["kernel"]) + np.float64(params["output"]["bias"])
    np.testing.assert_allclose(output.logits, expected, rtol=1e-5, atol=1e-6)


def test_dropout_drops_half_and_doubles_the_rest_in_training_alone() -> None:
    plain, dropped = mlp([36, 4000, 3]), mlp([36, 4000, 3], dropout=0.5)
    params, state = plain.init(KEY)
    full = plain.apply(params, state, images(), train=True, key=KEY)[0].features[0]
    evaluated = dropped.apply(params, state, images(), train=False, key=KEY)[0].features[0]
    trained = dropped.apply(params, state, images(), train=True, key=KEY)[0].features[0]
    np.testing.assert_array_equal(evaluated, full)
    kept = trained != 0
    np.testing.assert_allclose(trained[kept], 2 * full[kept], rtol=1e-6)
    assert np.mean(kept[full > 0]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("rate", "width"), [(0.5, 1), (0.25, 2), (0.8125, 4), (0.2, 32), (1e-3, 32), (0.9999, 32)])
def test_dropout_has_its_rate_in_every_unit_and_units_are_independent(rate: float, width: int) -> None:
    """Means over keys, of units and of products of two of them, within what a binomial count allows."""
    units, keys = 70, 4000
    network = mlp([1, units, 2], dropout=rate)
    params = {
        "hidden": {0: {"kernel": jnp.zeros((1, units)), "bias": jnp.ones(units)}},
        "output": {"kernel": jnp.zeros((units, 2)), "bias": jnp.zeros(2)},
    }
    image = jnp.zeros((1, 1, 1, 1))
    hidden = jax.jit(jax.vmap(lambda key: network.apply(params, {}, image, train=True, key=key)[0].features[0][0]))
    found = np.asarray(hidden(jax.random.split(KEY, keys)))
    np.testing.assert_allclose(found[found != 0], 1 / (1 - rate), rtol=1e-6)
    dropped = np.float64(found == 0)
    for observed, expected, count in (
        (dropped.mean(), rate, dropped.size),
        (dropped.mean(0), rate, keys),
        ((dropped.T @ dropped / keys)[np.triu_indices(units, 1)], rate**2, keys),
    ):
        assert np.max(np.abs(observed - expected)) < 6 * (expected * (1 - expected) / count) ** 0.5 + 3 / count


def test_random_numbers_are_the_bits_of_words_and_each_is_used_once() -> None:
    words = [int(word) for word in jax.random.bits(KEY, (3,), jnp.uint32)]
    for width in (1, 2, 4, 8, 16, 32):
        in_words = sorted(word >> start & (2**width - 1) for word in words for start in range(0, 32, width))
        found = models._random_numbers(KEY, 3 * (32 // width), width)
        assert sorted(found.tolist()) == in_words
        assert models._random_numbers(KEY, 2 * (32 // width) + 1, width).shape == (2 * (32 // width) + 1,)


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_depends_on_the_key_alone(name: str) -> None:
    network = NETWORKS[name]()
    params, state = network.init(KEY)

    def logits(seed: int, train: bool) -> np.ndarray:
        output, _ = network.apply(params, state, images(), train=train, key=jax.random.key(seed))
        return np.asarray(output.logits)

    np.testing.assert_array_equal(logits(1, True), logits(1, True))
    assert (logits(1, True) != logits(2, True)).any()
    np.testing.assert_array_equal(logits(1, False), logits(2, False))


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_batch_statistics_are_carried_in_training_alone(name: str) -> None:
    network = NETWORKS[name]()
    params, state = network.init(KEY)
    _, trained = network.apply(params, state, images(), train=True, key=KEY)
    _, evaluated = network.apply(params, state, images(), train=False, key=KEY)
    assert jax.tree.structure(trained) == jax.tree.structure(state) == jax.tree.structure(evaluated)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(state), strict=True))
    jax.tree.map(np.testing.assert_array_equal, evaluated, state)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_pure_functions_that_vmap_over_seeds(name: str) -> None:
    network = NETWORKS[name]()
    keys = jax.random.split(KEY, 3)

    def logits(key: jax.Array) -> jax.Array:
        params, state = network.init(key)
        return network.apply(params, state, images(), train=True, key=key)[0].logits

    together = jax.jit(jax.vmap(logits))(keys)
    for i in range(3):
        np.testing.assert_allclose(together[i], logits(keys[i]), rtol=1e-5, atol=1e-6)


def test_a_plain_function_is_a_network() -> None:
    network = linear()
    params, state = network.init(KEY)
    output, carried = network.apply(params, state, images(), train=True, key=KEY)
    assert isinstance(output, Output)
    assert output.logits.shape == (4, 3)
    assert carried == state == {}


def test_a_module_may_name_its_features() -> None:
    module = MLP([36, 8, 3], rngs=nnx.Rngs(0))
    assert [feature.shape for feature in module(images()).features] == [(4, 8)]
