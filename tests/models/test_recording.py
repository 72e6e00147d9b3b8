"""Features by path, for NNX and Linen alike."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from kd_jax.errors import ConfigError
from kd_jax.models import Output, feature_names, from_function, from_linen, from_nnx

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.inner(x)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.named = nnx.Dict({"twice": nnx.Linear(6, 6, rngs=rngs)})
        self.alias = self.named["twice"]
        self.recurrent = nnx.RNN(nnx.GRUCell(6, 5, rngs=rngs), return_carry=True)
        self.unused = nnx.Linear(6, 6, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.named["twice"](self.named["twice"](x))
        carry, outputs = self.recurrent(x[:, None])
        return self.head(carry + outputs[:, 0])


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.relu(linen.BatchNorm(use_running_average=not train, name="norm")(linen.Dense(6, name="inner")(x)))


class LinenNet(linen.Module):
    def setup(self):
        self.blocks = [LinenBlock() for _ in range(2)]
        self.twice = linen.Dense(6)
        self.recurrent = linen.RNN(linen.GRUCell(5), return_carry=True)
        self.head = linen.Dense(3)

    def __call__(self, x, train=False):
        for block in self.blocks:
            x = block(x, train)
        x = self.twice(self.twice(x))
        carry, outputs = self.recurrent(x[:, None])
        return self.head(carry + outputs[:, 0])


MODELS = {"nnx": lambda: from_nnx(Net), "linen": lambda: from_linen(LinenNet(), X)}
PATHS = {
    "nnx": ("blocks.1", "blocks.0.inner", "named.twice", "recurrent.0", "recurrent.1", "head"),
    "linen": ("blocks_1", "blocks_0.inner", "twice", "recurrent.0", "recurrent.1", "head"),
}
BOTH = pytest.mark.parametrize("door", MODELS)


def oracle(door, variables, x):
    """The same features, by hand."""
    params, state = variables["params"], variables["state"] if door == "nnx" else variables["batch_stats"]

    def block(place, x):
        if door == "nnx":
            own, norm = params["blocks"][place], state["blocks"][place]["norm"]
            own = {"inner": own["inner"], "norm": own["norm"]}
        else:
            own, norm = params[f"blocks_{place}"], state[f"blocks_{place}"]["norm"]
        inner = x @ own["inner"]["kernel"] + own["inner"]["bias"][None]
        x = (inner - norm["mean"][None]) / jnp.sqrt(norm["var"][None] + 1e-5)
        return inner, jnp.maximum(x * own["norm"]["scale"][None] + own["norm"]["bias"][None], 0)

    inner, x = block(0, x)
    _, second = block(1, x)
    twice = params["alias"] if door == "nnx" else params["twice"]
    x = second
    for _ in range(2):
        x = x @ twice["kernel"] + twice["bias"][None]
    return {"blocks.1": second, "blocks.0.inner": inner, "twice": x}


@BOTH
def test_features_are_the_outputs_of_the_submodules(door):
    model = MODELS[door]().init(KEY)
    output, _ = model.network.apply(model.variables, X, features=PATHS[door])
    assert set(output.features) == set(PATHS[door])
    expected = list(oracle(door, model.variables, X).values())
    for path, want in zip(PATHS[door], expected, strict=False):
        np.testing.assert_allclose(output.features[path], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(output.features["head"], output.logits)
    np.testing.assert_array_equal(output.features["recurrent.0"], output.features["recurrent.1"][:, 0])
    np.testing.assert_array_equal(output.logits, model.network.apply(model.variables, X)[0].logits)


@BOTH
def test_names_are_listed_with_shapes_and_nothing_is_computed(door):
    model = MODELS[door]()
    shapes = feature_names(model, jax.ShapeDtypeStruct((4, 6), jnp.float32))
    # A shared submodule is listed by the first of its paths.
    paths = [path.replace("named.twice", "alias") for path in PATHS[door]]
    assert {path: shapes[path].shape for path in paths} == dict(
        zip(paths, [(4, 6), (4, 6), (4, 6), (4, 5), (4, 1, 5), (4, 3)], strict=True)
    )
    assert "unused" not in shapes
    assert "" not in shapes
    output, _ = model.network.apply(model.init(KEY).variables, X, features=tuple(shapes))
    assert jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(output.features)) == shapes
    assert feature_names(model.init(KEY), X) == shapes
    assert feature_names(model, np.asarray(X, np.float64)) == shapes


@BOTH
def test_features_under_jit_grad_and_vmap_and_in_training(door):
    network = MODELS[door]().network
    path = PATHS[door][1]

    def loss(params, state, key):
        output, new = network.apply(network.merge(params, state), X, train=True, key=key, features=(path,))
        return jnp.square(output.features[path]).sum(), (output.features[path], new)

    def step(key):
        params, state = network.split(network.init(key))
        return jax.grad(loss, has_aux=True)(params, state, key)

    keys = jax.random.split(KEY, 3)
    gradient, (feature, state) = jax.jit(jax.vmap(step))(keys)
    assert feature.shape == (3, 4, 6)
    variables = network.init(keys[1])
    expected = network.apply(variables, X, train=True, key=keys[1], features=(path,))
    np.testing.assert_allclose(feature[1], expected[0].features[path], rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(network.split(variables)[1])
    params = gradient["blocks"][0]["inner"] if door == "nnx" else gradient["blocks_0"]["inner"]
    np.testing.assert_allclose(params["kernel"][1], 2 * X.T @ feature[1], rtol=1e-4, atol=1e-4)
    head = gradient["head"]
    np.testing.assert_array_equal(head["kernel"], np.zeros_like(head["kernel"]))


@BOTH
def test_threads_record_for_themselves_alone(door):
    model = MODELS[door]().init(KEY)
    path = PATHS[door][0]
    alone = [model.network.apply(model.variables, X + place, features=(path,))[0].features[path] for place in range(4)]
    found = [None] * 4

    def work(place):
        for _ in range(5):
            found[place] = model.network.apply(model.variables, X + place, features=(path,))[0].features[path]
            assert model.network.apply(model.variables, X)[0].features == {}

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(4):
        np.testing.assert_array_equal(found[place], alone[place])


@BOTH
def test_a_wrong_path_names_the_nearest(door):
    model = MODELS[door]().init(KEY)
    for path, near in (("block.1", PATHS[door][0]), ("recurrent.7", "recurrent.0"), ("Head", "head")):
        with pytest.raises(ConfigError, match=near) as error:
            model(X, features=(path,))
        assert f"{path!r} of the model does not exist" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_cell_of_a_recurrent_layer_has_no_feature_and_says_so():
    model = from_nnx(Net).init(KEY)
    assert not [path for path in feature_names(model, X) if path.startswith("recurrent.cell")]
    with pytest.raises(ConfigError, match=r"'recurrent\.cell' of the model .*: the nearest are 'recurrent\.[01]'"):
        model(X, features=("recurrent.cell",))


def test_a_submodule_that_is_not_called_has_no_feature():
    model = from_nnx(Net).init(KEY)
    with pytest.raises(ConfigError, match="Linear at unused is not called"):
        model(X, features=("unused",))


def test_every_path_of_a_shared_submodule_is_one():
    model = from_nnx(Net).init(KEY)
    features = model(X, features=("alias", "named.twice")).features
    np.testing.assert_array_equal(features["alias"], features["named.twice"])


def test_the_users_module_and_class_stay_as_they_are():
    module = Net(nnx.Rngs(0))
    before, call = nnx.graphdef(module), Block.__call__
    model = from_nnx(module)
    model(X, features=("blocks.0",))
    feature_names(model, X)
    assert nnx.graphdef(module) == before
    assert Block.__call__ is call
    assert type(module.blocks[0]) is Block


def test_types_are_what_they_were_for_the_model_itself():
    class Careful(nnx.Module):
        def __init__(self, rngs):
            self.inner = Block(rngs)

        def __call__(self, x):
            assert isinstance(self.inner, Block)
            assert type(self.inner).__name__ == "Block"
            return self.inner(x)

    assert from_nnx(Careful).init(KEY)(X, features=("inner",)).features["inner"].shape == (4, 6)


class Wrapped(nnx.Module):
    """Layers in transformations of NNX and of JAX."""

    def __init__(self, rngs, transformed):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(6, 6, rngs=rngs)

        self.layers = make(rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)
        self.transformed = transformed

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return nnx.relu(layer(x))

        x = forward(self.layers, x)
        if self.transformed:
            return jax.checkpoint(lambda x: self.head(x))(x)
        return nnx.remat(lambda head, x: head(x))(self.head, x)


def test_features_come_out_of_the_transformations_of_nnx():
    model = from_nnx(lambda rngs: Wrapped(rngs, False)).init(KEY)
    output = model(X, features=("layers", "head"))
    assert output.features["layers"].shape == (3, 4, 6)
    np.testing.assert_array_equal(output.features["head"], output.logits)
    params = model.variables["params"]["layers"]
    np.testing.assert_allclose(
        output.features["layers"][0], X @ params["kernel"][0] + params["bias"][0][None], rtol=1e-5, atol=1e-5
    )


def test_features_within_a_transformation_of_jax_say_what_to_do():
    model = from_nnx(lambda rngs: Wrapped(rngs, True)).init(KEY)
    assert model(X).shape == (4, 3)
    with pytest.raises(ConfigError, match=r"Linear cannot be recorded.*nnx\.remat"):
        model(X, features=("head",))


def test_what_a_model_returns_by_name_is_a_feature_too():
    function = from_function(lambda params, x: Output(x @ params, {"hidden": {"a": 2 * x}["a"]}), jnp.ones((6, 3)))
    np.testing.assert_array_equal(function(X, features=("hidden",)).features["hidden"], 2 * X)
    assert feature_names(function, X) == {"hidden": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    with pytest.raises(ConfigError, match="nearest are 'hidden'"):
        function(X, features=("hiden",))
    bare = from_function(lambda params, x: x @ params, jnp.ones((6, 3)))
    with pytest.raises(ConfigError, match="this model has no features"):
        bare(X, features=("hidden",))

    class Says(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return {"logits": self.inner(x), "states": (x, 2 * x)}

    model = from_nnx(Says).init(KEY)
    output = model(X, features=("states.1", "inner"))
    assert set(output.features) == {"states.0", "states.1", "inner"}
    assert set(feature_names(model, X)) == {"states.0", "states.1", "inner"}
