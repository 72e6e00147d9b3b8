"""What a run leaves under `parameters/` comes back as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen, nnx

import kd_jax as kd
from kd_jax.experiments.notebook import report
from kd_jax.experiments.notebook.experiment import Result, TrainedModels
from kd_jax.models import parameters

SEEDS = (3, 4)


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, images):
        return self.layers[1](self.norm(self.layers[0](images.reshape(len(images), -1))))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, images, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(5)(images.reshape(len(images), -1)))
        return linen.Dense(3)(x)


NETWORKS = {
    "mlp": lambda: kd.mlp([6, 5, 4, 3], dropout=0.5),
    "many layers": lambda: kd.mlp([2] * 13),
    "no hidden layer": lambda: kd.mlp([6, 3]),
    "nnx": lambda: kd.from_nnx(Normed),
    "linen": lambda: kd.from_linen(Linen(), (2, 3, 1)),
    "tuple": lambda: kd.from_function(
        lambda key: (jax.random.normal(key, (6, 3)), [jnp.zeros(3), {"b": jnp.ones(())}]),
        lambda params, images: images.reshape(len(images), -1) @ params[0] + params[1][0],
    ),
}


def _written(network, folder):
    """Writes the initial parameters of two seeds as a run does, and returns them."""
    params, state = jax.vmap(network.init)(jax.random.split(jax.random.key(0), len(SEEDS)))
    rest = [None] * (len(TrainedModels._fields) - 4)
    trained = TrainedModels(SEEDS, 0, params, state, *rest)
    result = Result(None, trained, trained, trained, *[None] * (len(Result._fields) - 4))
    report._write_parameters(result, folder)
    return params, state


def _assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other, strict=True), found, expected)


@pytest.mark.parametrize("kind", NETWORKS)
def test_there_and_back_into_any_network(kind, tmp_path):
    network = NETWORKS[kind]()
    written = _written(network, tmp_path)
    for place, seed in enumerate(SEEDS):
        found = parameters.load(tmp_path / "parameters" / f"distilled-seed{seed}.safetensors", network)
        _assert_same(found, jax.tree.map(lambda leaf, place=place: leaf[place], written))


@pytest.mark.parametrize("kind", ["mlp", "many layers", "no hidden layer"])
def test_an_mlp_needs_no_network(kind, tmp_path):
    written = _written(NETWORKS[kind](), tmp_path)
    found = parameters.load(str(tmp_path / "parameters" / "student-seed4.safetensors"))
    _assert_same(found, jax.tree.map(lambda leaf: leaf[1], written))


def test_another_network_is_refused(tmp_path):
    _written(NETWORKS["mlp"](), tmp_path)
    path = tmp_path / "parameters" / "student-seed3.safetensors"
    with pytest.raises(kd.DataError, match=r"has the shape \(5,\): it must have \(8,\)"):
        parameters.load(path, kd.mlp([6, 8, 4, 3]))
    with pytest.raises(kd.DataError, match="give the network that was trained"):
        parameters.load(path, kd.mlp([6, 5, 3]))
    half = kd.from_nnx(lambda rngs: jax.tree.map(lambda leaf: leaf.astype(np.float16), kd.MLP([6, 5, 4, 3], rngs=rngs)))
    with pytest.raises(kd.DataError, match="is of type float32: this network's is float16"):
        parameters.load(path, half)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "is empty"),
        ({"a": np.ones(2), "a.b": np.ones(2)}, "no name of a parameter"),
        ({"a..b": np.ones(2)}, "no name of a parameter"),
        ({"": np.ones(2)}, "no name of a parameter"),
        ({"a." * 300 + "b": np.ones(2)}, "no name of a parameter"),
        ({"a": np.array([1, np.inf])}, "every value must be finite"),
    ],
)
def test_what_is_no_tree_of_parameters_is_refused(arrays, says, tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays))
    with pytest.raises(kd.DataError, match=says) as error:
        parameters.load(path)
    assert len(str(error.value).splitlines()) == 1


def test_levels_with_numbers_and_names_stay_pytrees(tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(
        safetensors.numpy.save({name: np.ones(1) for name in ("a.0", "a.b", "c.0", "c.10", "c.2", "d.01")})
    )
    params, _ = parameters.load(path)
    assert {name: list(level) for name, level in jax.tree.map(jnp.shape, params).items()} == {
        "a": ["0", "b"],
        "c": [0, 2, 10],
        "d": ["01"],
    }
