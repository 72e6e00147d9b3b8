"""Models to files and back, and the files that a run leaves under `parameters/`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen, nnx

from kd_jax.distill import Result
from kd_jax.errors import ConfigError, DataError
from kd_jax.files.names import path_name
from kd_jax.models import MLP, Model, from_function, from_linen, from_nnx, mlp, parameters, restore, save

X = jnp.ones((4, 6))


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(3))

    def __call__(self, x):
        return self.layers[1](self.dropout(self.norm(self.layers[0](x))))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(5)(x))
        return linen.Dense(3)(x)


def tupled(params, x):
    return x @ params[0] + params[1][0][None]


def start(key):
    half = jnp.ones((2,), jnp.bfloat16)
    return jax.random.normal(key, (6, 3)), [jnp.zeros(3), {"b": jnp.ones(()), "half": half, "whole": jnp.arange(3)}]


MODELS = {
    "mlp": lambda: mlp([6, 5, 4, 3], dropout=0.5),
    "many layers": lambda: mlp([6] * 13),
    "no hidden layer": lambda: mlp([6, 3]),
    "nnx": lambda: from_nnx(Normed),
    "linen": lambda: from_linen(Linen(), X),
    "tuple": lambda: from_function(tupled, init=start),
    "bare": lambda: from_function(lambda params, x: x @ params, init=lambda key: jax.random.normal(key, (6, 3))),
}


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other, strict=True), found, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back_into_any_model(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    model = MODELS[kind]().init(3)
    save(model, str(path))
    for given in (MODELS[kind](), MODELS[kind]().init(4)):
        back = restore(given, path)
        assert isinstance(back, Model)
        same(back.variables, model.variables)
    same(parameters.load(path, model.network), model.network.split(model.variables))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_module_comes_back_as_a_module(tmp_path):
    path, module = tmp_path / "model.safetensors", Normed(nnx.Rngs(0))
    module.norm.mean[...] = jnp.arange(5.0)
    save(module, path)
    other = Normed(nnx.Rngs(1))
    before = nnx.to_pure_dict(nnx.state(other, nnx.Param))
    for back in (restore(other, path), restore(Normed, path), restore(lambda rngs: Normed(rngs), path)):
        assert type(back) is Normed
        assert back is not other
        module.eval()
        np.testing.assert_array_equal(back(X), module(X))
        np.testing.assert_array_equal(back.norm.mean[...], np.arange(5.0))
    same(nnx.to_pure_dict(nnx.state(other, nnx.Param)), before)


def test_arrays_have_the_paths_of_the_modules_as_names(tmp_path):
    path = tmp_path / "model.safetensors"
    save(Normed(nnx.Rngs(0)), path)
    assert set(safetensors.numpy.load_file(path)) == {
        *(f"layers.{place}.{name}" for place in (0, 1) for name in ("kernel", "bias")),
        *(f"norm.{name}" for name in ("scale", "bias", "mean", "var")),
        "calls",
    }
    save(from_linen(Linen(), X).init(0), path)
    assert "batch_stats.BatchNorm_0.mean" in safetensors.numpy.load_file(path)
    assert "Dense_0.kernel" in safetensors.numpy.load_file(path)


@pytest.mark.parametrize("kind", ["mlp", "many layers", "no hidden layer"])
def test_an_mlp_needs_no_network(kind, tmp_path):
    model = MODELS[kind]().init(0)
    save(model, tmp_path / "model.safetensors")
    same(parameters.load(tmp_path / "model.safetensors"), (model.variables["params"], {}))


def test_files_of_earlier_runs(tmp_path):
    """One file for a seed, scalars with an axis, and a description beside the arrays."""
    model = from_function(tupled, init=start).init(0)
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(model.variables)}
    assert set(leaves) == {"0", "1.0", "1.1.b", "1.1.half", "1.1.whole"}
    arrays = {name: np.atleast_1d(np.asarray(leaf)) for name, leaf in leaves.items()}
    path = tmp_path / "student-seed3.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays, metadata={"kd_jax": json.dumps({"seed": 3})}))
    same(parameters.load(path, model.network)[0], model.variables)
    same(restore(model, path).variables, model.variables)


def test_another_network_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save(mlp([6, 5, 4, 3]).init(0), path)
    for read in (lambda model: parameters.load(path, model), lambda model: restore(model, path)):
        with pytest.raises(DataError, match=r"has the shape \(5,\): it must have \(8,\)"):
            read(mlp([6, 8, 4, 3]))
        with pytest.raises(
            DataError, match=r"has hidden\.1\.bias, hidden\.1\.kernel too many: give the network that was"
        ):
            read(mlp([6, 5, 3]))
        with pytest.raises(DataError, match=r"lacks hidden\.2\.bias, hidden\.2\.kernel: give the network that was"):
            read(mlp([6, 5, 4, 4, 3]))
        half = from_nnx(lambda rngs: jax.tree.map(lambda leaf: leaf.astype(np.float16), MLP([6, 5, 4, 3], rngs=rngs)))
        with pytest.raises(DataError, match="is of type float32: this network's is float16"):
            read(half)


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (mlp([6, 3]), ConfigError, "no variables to save"),
        (Normed, ConfigError, "has no values to save"),
        (mlp([6, 3]).network, ConfigError, "has no values to save"),
        (from_function(tupled, {"a": {"b": X}, "a.b": X}), DataError, r"two arrays of the model have the name a\.b"),
        (from_function(tupled, {"a": jax.random.key(0)}), DataError, "a is a random key"),
        (from_function(tupled, {"a": jnp.ones(2, jnp.int4)}), DataError, "no safetensors file holds"),
        (
            from_function(tupled, {"a": jnp.ones(2, jnp.float8_e4m3fn)}),
            DataError,
            "a is of type float8_e4m3fn, which no safetensors file holds that is read back: convert it",
        ),
    ],
)
def test_what_cannot_be_saved_says_so_and_leaves_nothing(model, error, says, tmp_path):
    with pytest.raises(error, match=says):
        save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(tmp_path):
    model = mlp([6, 3]).init(0)
    with pytest.raises(DataError, match=r"ends in \.safetensors"):
        save(model, tmp_path / "model.npz")
    with pytest.raises(DataError, match="a folder that exists"):
        save(model, tmp_path / "no" / "model.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        save(model, tmp_path / "folder.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.safetensors"]
    with pytest.raises(DataError, match="No such file"):
        restore(model, tmp_path / "none.safetensors")


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
    with pytest.raises(DataError, match=says) as error:
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


def test_complex_numbers_come_back(tmp_path):
    model = from_function(tupled, {"a": jnp.asarray(np.asarray(X) * np.complex64(1 + 1j))})
    save(model, tmp_path / "model.safetensors")
    same(restore(model, tmp_path / "model.safetensors").variables, model.variables)


def test_what_distill_gave_back_of_a_function_comes_back_as_a_model(tmp_path):
    model = from_function(tupled, {"a": jnp.asarray(X)})
    result = Result(model, {}, model, None, None)
    save(result, tmp_path / "model.safetensors")
    assert isinstance(restore(result, tmp_path / "model.safetensors"), Model)
