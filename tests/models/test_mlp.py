import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kd_jax.models import MLP, count_parameters, feature_names, mlp
from kd_jax.models.mlp import Uniform, _random_numbers

KEY = jax.random.key(0)


def images(count: int = 4, side: int = 6) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (count, side, side, 1))


def hidden(model, params, key, x, train=True):
    output, _ = model.network.apply(
        {"params": params, "state": {}}, x, train=train, key=key, features=("activations.0",)
    )
    return output.features["activations.0"]


@pytest.mark.parametrize(("sizes", "parameters"), [((784, 1200, 1200, 10), 2_395_210), ((784, 20, 20, 10), 16_330)])
def test_the_references_networks_have_their_sizes(sizes: tuple[int, ...], parameters: int) -> None:
    model = mlp(sizes).init(KEY)
    assert count_parameters(model) == parameters
    assert not jax.tree.leaves(model.network.split(model.variables)[1])


def test_layers_start_as_pytorch_starts_them() -> None:
    params = mlp([400, 900, 10]).init(KEY).variables["params"]
    for layer, bound in ((params["hidden"][0], 400**-0.5), (params["output"], 900**-0.5)):
        for values in layer.values():
            assert np.abs(values).max() <= bound
            assert np.abs(values).max() > 0.8 * bound
        flat = np.asarray(layer["kernel"]).ravel()
        assert abs(flat.mean()) < 5 * bound / np.sqrt(3 * flat.size)
        assert np.std(flat) == pytest.approx(bound / np.sqrt(3), rel=0.02)


def test_an_mlp_is_matrix_products_and_relus() -> None:
    model = mlp([36, 8, 5, 3]).init(KEY)
    params = model.variables["params"]
    paths = ("activations.0", "activations.1")
    output, _ = model.network.apply(model.variables, images(), train=True, key=KEY, features=paths)
    expected = np.asarray(images(), np.float64).reshape(4, 36)
    for i in (0, 1):
        layer = params["hidden"][i]
        expected = np.maximum(expected @ np.float64(layer["kernel"]) + np.float64(layer["bias"]), 0)
        np.testing.assert_allclose(output.features[paths[i]], expected, rtol=1e-5, atol=1e-6)
    expected = expected @ np.float64(params["output"]["kernel"]) + np.float64(params["output"]["bias"])
    np.testing.assert_allclose(output.logits, expected, rtol=1e-5, atol=1e-6)


def test_the_bits_of_a_training_with_dropout_stay_what_they_are() -> None:
    """A change here changes every number of the experiments: their tables must then be made again."""
    network = mlp([4, 3, 2], dropout=0.5).network
    variables = network.init(jax.random.key(7))
    bits = [np.asarray(leaf).view(np.uint32).ravel()[0] for leaf in jax.tree.leaves(variables)]
    x = jnp.arange(20, dtype=jnp.float32).reshape(5, 4) / 20
    dropped = hidden(mlp([4, 3, 2], dropout=0.5), variables["params"], jax.random.key(9), x)
    assert [f"{number:08x}" for number in bits] == BITS
    assert (np.asarray(dropped) != 0).astype(int).tolist() == KEPT


BITS = ["3e335638", "3ebc17fc", "be9ed64b", "beadd0e4"]
KEPT = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_dropout_drops_half_and_doubles_the_rest_in_training_alone() -> None:
    plain, dropped = mlp([36, 4000, 3]), mlp([36, 4000, 3], dropout=0.5)
    params = plain.init(KEY).variables["params"]
    full = hidden(plain, params, KEY, images())
    np.testing.assert_array_equal(hidden(dropped, params, KEY, images(), train=False), full)
    trained = hidden(dropped, params, KEY, images())
    kept = trained != 0
    np.testing.assert_allclose(trained[kept], 2 * full[kept], rtol=1e-6)
    assert np.mean(kept[full > 0]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("rate", "width"), [(0.5, 1), (0.25, 2), (0.8125, 4), (0.2, 32), (1e-3, 32), (0.9999, 32)])
def test_dropout_has_its_rate_in_every_unit_and_units_are_independent(rate: float, width: int) -> None:
    """Means over keys, of units and of products of two of them, within what a binomial count allows."""
    units, keys = 70, 4000
    model = mlp([1, units, 2], dropout=rate)
    params = {
        "hidden": {0: {"kernel": jnp.zeros((1, units)), "bias": jnp.ones(units)}},
        "output": {"kernel": jnp.zeros((units, 2)), "bias": jnp.zeros(2)},
    }
    image = jnp.zeros((1, 1, 1, 1))
    found = np.asarray(jax.jit(jax.vmap(lambda key: hidden(model, params, key, image)[0]))(jax.random.split(KEY, keys)))
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
        assert sorted(_random_numbers(KEY, 3 * (32 // width), width).tolist()) == in_words
        assert _random_numbers(KEY, 2 * (32 // width) + 1, width).shape == (2 * (32 // width) + 1,)


def test_equal_mlps_are_equal_networks() -> None:
    network = mlp([4, 3, 2], dropout=0.5).network
    assert network == mlp([4, 3, 2], dropout=0.5).network
    assert hash(network) == hash(mlp([4, 3, 2], dropout=0.5).network)
    assert Uniform(0.5) == Uniform(0.5)
    for other in (mlp([4, 3, 2], dropout=0.4), mlp([4, 3, 2]), mlp([4, 4, 2], dropout=0.5)):
        assert network != other.network


def test_a_module_gives_logits_and_names_its_activations() -> None:
    module = MLP([36, 8, 5, 3], rngs=nnx.Rngs(0))
    assert module(images()).shape == (4, 3)
    shapes = feature_names(module, images())
    assert {path: shapes[path].shape for path in ("activations.0", "activations.1", "output")} == {
        "activations.0": (4, 8),
        "activations.1": (4, 5),
        "output": (4, 3),
    }
