"""Modules of Flax NNX as users write them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kd_jax.errors import ConfigError
from kd_jax.models import Output, as_model, count_parameters, from_function, from_nnx, mlp, to_module

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def values(module):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))))


class Normed(nnx.Module):
    """Batch statistics and dropout, with modes of its own."""

    def __init__(self, rngs: nnx.Rngs, width: int = 5):
        self.first = nnx.Linear(6, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.first(x))))


def test_a_living_module_gives_its_values_and_is_not_changed():
    module = Normed(nnx.Rngs(0))
    module.norm.mean[...] = jnp.arange(5.0)
    module.eval()
    expected, before, graph = module(X), values(module), nnx.graphdef(module)
    model = from_nnx(module)
    np.testing.assert_allclose(model(X), expected, rtol=1e-6)
    same(model.variables["state"]["norm"]["mean"], jnp.arange(5.0))
    model.network.apply(model.variables, X, train=True, key=KEY)
    jax.tree.map(lambda leaf: leaf.delete(), model.variables)  # as a donating program does
    same(values(module), before)
    assert nnx.graphdef(module) == graph


def test_a_living_module_has_no_fresh_start():
    model = from_nnx(Normed(nnx.Rngs(0)))
    with pytest.raises(ConfigError, match=r"kd\.from_nnx\(lambda rngs"):
        model.init(KEY)


def test_networks_of_living_modules_of_one_class_are_equal_whatever_their_values_and_mode():
    one, other = Normed(nnx.Rngs(0)), Normed(nnx.Rngs(1))
    other.eval()
    assert from_nnx(one).network == from_nnx(other).network
    assert hash(from_nnx(one).network) == hash(from_nnx(other).network)
    assert from_nnx(one).network != from_nnx(Normed(nnx.Rngs(0), width=4)).network


def test_constructors_of_one_graph_that_start_differently_are_not_equal():
    def scaled(factor):
        def construct(rngs):
            module = nnx.Linear(6, 3, rngs=rngs)
            module.kernel[...] = factor * module.kernel[...]
            return module

        return from_nnx(construct)

    assert scaled(2.0).network == scaled(2.0).network
    assert scaled(2.0).network != scaled(3.0).network


def test_the_way_back_is_a_new_module_in_evaluation_mode():
    class Named(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_metadata(nnx.initializers.lecun_normal(), out_sharding=("data", None))
            self.inner = nnx.Linear(6, 3, kernel_init=init, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.inner(x))

    with nnx.use_eager_sharding(False):
        module = Named(nnx.Rngs(0))
        fresh = to_module(from_nnx(Named).init(KEY))
    model = from_nnx(module)
    assert fresh.inner.kernel.get_metadata() == module.inner.kernel.get_metadata()
    back = to_module(model)
    assert type(back) is Named
    assert back is not module
    assert back.inner.kernel.get_metadata() == module.inner.kernel.get_metadata()
    assert back.inner.kernel.get_metadata("out_sharding") == ("data", None)
    same(values(back), values(module))
    np.testing.assert_allclose(back(X), model(X), rtol=1e-6)
    back.inner.bias[...] = jnp.ones(3)
    same(values(to_module(model)), values(module))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (from_function(lambda params, x: x @ params, jnp.ones((6, 3))), r"FunctionNetwork is no NNX module"),
        (mlp([6, 3]), "no variables yet"),
    ],
)
def test_what_has_no_way_back_says_so(model, says):
    with pytest.raises(ConfigError, match=says):
        to_module(model)


def test_shared_parameters_stay_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Linear(6, 6, rngs=rngs)
            self.decoder = self.encoder

        def __call__(self, x):
            return self.decoder(self.encoder(x))

    model = from_nnx(Tied).init(KEY)
    assert count_parameters(model) == 42
    back = to_module(model)
    assert back.encoder is back.decoder
    gradient = jax.grad(lambda p: model.network.apply({"params": p, "state": {}}, X)[0].logits.sum())
    shared = model.variables["params"]["decoder"]  # the first of both names
    kernel, bias = shared["kernel"], shared["bias"]
    hidden = X @ kernel + bias[None]
    expected = hidden.T @ jnp.ones((4, 6)) + X.T @ (jnp.ones((4, 6)) @ kernel.T)
    found = gradient(model.variables["params"])
    np.testing.assert_allclose(found["decoder"]["kernel"], expected, rtol=1e-4, atol=1e-5)


def test_what_is_sown_is_not_carried_and_neither_is_what_a_call_leaves_behind():
    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            x = self.perturb("moved", self.inner(x))
            self.sow(nnx.Intermediate, "hidden", x)
            self.last = nnx.Intermediate(x)
            return x

    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.inner(x)

    sowing, plain = from_nnx(Sowing), from_nnx(Plain)
    variables = sowing.init(KEY).variables
    same(variables, plain.init(KEY).variables)
    output, state = sowing.network.apply(variables, X, train=True, key=KEY)
    same(output.logits, plain.network.apply(variables, X, train=True, key=KEY)[0].logits)
    assert state == {}


def test_a_module_that_has_sown_before_gives_no_state():
    module = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    module.seen = nnx.Intermediate((X,))
    model = from_nnx(module)
    assert model.variables["state"] == {}
    np.testing.assert_allclose(model(X), module(X), rtol=1e-6)
    assert model.network == from_nnx(nnx.Linear(6, 3, rngs=nnx.Rngs(1))).network
    assert module.seen.get_value()[0] is X


def test_every_kind_of_variable():
    class Counter(nnx.Variable):
        pass

    class Every(nnx.Module):
        def __init__(self, rngs):
            self.lora = nnx.LoRA(6, 2, 3, rngs=rngs)
            self.cache = nnx.Cache(jnp.zeros(3))
            self.calls = Counter(jnp.array(0))
            self.table = jnp.arange(3.0)

        def __call__(self, x):
            self.calls[...] += 1
            x = self.lora(x) + self.table[None]
            self.cache[...] = x[0]
            return x

    model = from_nnx(Every).init(KEY)
    assert {name: leaf.shape for name, leaf in model.variables["params"]["lora"].items()} == {
        "lora_a": (6, 2),
        "lora_b": (2, 3),
    }
    assert set(model.variables["state"]) == {"cache", "calls", "table"}
    assert from_nnx(Every(nnx.Rngs(0))).network.graph == model.network.graph
    output, state = model.network.apply(model.variables, X, train=True, key=KEY)
    assert int(state["calls"]) == 1
    np.testing.assert_allclose(state["cache"], output.logits[0])
    same(model.network.apply(model.variables, X)[1], model.variables["state"])


def test_outputs_are_passed_through():
    class Says(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return Output(self.inner(x), {"doubled": 2 * x})

    model = from_nnx(Says).init(KEY)
    output, _ = model.network.apply(model.variables, X)
    same(output.features, {"doubled": 2 * X})
    assert model(X).shape == (4, 3)


def test_static_attributes_without_a_hash():
    class Odd(nnx.Module):
        def __init__(self, rngs, scale):
            self.inner = nnx.Linear(6, 3, rngs=rngs)
            self.options = nnx.static({"sizes": [1, 2]})
            self.scale = nnx.static(scale)

        def __call__(self, x):
            return self.inner(x)

    one = from_nnx(lambda rngs: Odd(rngs, 1.0))
    assert one.network == from_nnx(lambda rngs: Odd(rngs, 1.0)).network
    assert one.network != from_nnx(lambda rngs: Odd(rngs, 2.0)).network
    assert one.init(KEY)(X).shape == (4, 3)


def test_layers_that_are_scanned_and_recomputed():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs):
                return nnx.Linear(6, 6, rngs=rngs)

            self.layers = make(rngs)
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def forward(layer, x):
                return nnx.relu(layer(x))

            return nnx.remat(lambda head, x: head(x))(self.head, forward(self.layers, x))

    model = from_nnx(Deep).init(KEY)
    params = model.variables["params"]
    expected = X
    for layer in range(3):
        kernel, bias = params["layers"]["kernel"][layer], params["layers"]["bias"][layer]
        expected = jnp.maximum(expected @ kernel + bias[None], 0)
    expected = expected @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(model(X), expected, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda p: model.network.apply({"params": p, "state": {}}, X)[0].logits.sum())(params)
    np.testing.assert_allclose(gradient["head"]["bias"], np.full(3, 4.0))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda rngs: X, "gives a ArrayImpl and no nnx.Module"),
        (nnx.Linear, r"Linear cannot be called with nnx.Rngs alone .*lambda rngs: Linear\(…, rngs=rngs\)"),
        (lambda: Normed(nnx.Rngs(0)), "cannot be called with nnx.Rngs alone"),
    ],
)
def test_what_is_no_module_is_refused(given, says):
    with pytest.raises(ConfigError, match=says) as error:
        from_nnx(given)
    assert "\n" not in str(error.value)


def test_constructors_take_their_streams_by_name_or_by_place():
    class Keyword(nnx.Module):
        def __init__(self, *, rngs, width=3):
            self.inner = nnx.Linear(6, width, rngs=rngs)

        def __call__(self, x):
            return self.inner(x)

    same(from_nnx(Keyword).init(0).variables, from_nnx(lambda streams: Keyword(rngs=streams)).init(0).variables)


def test_variables_of_another_model_are_refused():
    model = mlp([6, 3])
    with pytest.raises(ConfigError, match="a dict with params and state"):
        model.network.apply({"kernel": X}, X)


def test_numbers_of_python_in_a_state_do_not_change_their_type():
    class Counting(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(6, 3, rngs=rngs)
            self.calls = nnx.Variable(jnp.array(0))
            self.scale = nnx.Variable(1.0)

        def __call__(self, x):
            self.calls[...] += 1
            self.scale[...] *= 0.5
            return self.scale[...] * self.inner(x)

    for model in (from_nnx(Counting).init(KEY), from_nnx(Counting(nnx.Rngs(0)))):
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(model.variables))
        network, traces = model.network, []

        @jax.jit
        def step(params, state, network=network, traces=traces):
            traces.append(state)
            return network.apply(network.merge(params, state), X, train=True)[1]

        params, state = network.split(model.variables)
        for _ in range(3):
            state = step(params, state)
        assert int(state["calls"]) == 3
        assert len(traces) == 1


def test_a_network_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        mlp([6, 3]).network.call = len
    assert as_model(mlp([6, 3]).network).variables is None


@pytest.mark.parametrize("dropout", [False, True])
def test_a_constructor_that_gives_a_module_that_lives_is_refused(dropout: bool) -> None:
    """Every seed would start alike."""

    class Part(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.head = nnx.Linear(3, 2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs) if dropout else None

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(x)

    class Whole(Part):
        def __init__(self, part: nnx.Module, rngs: nnx.Rngs):
            super().__init__(rngs)
            self.part = part

    lives = Part(nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"made outside of it, .*make it inside, from rngs"):
        from_nnx(lambda rngs: lives)
    copied = from_nnx(lambda rngs: Whole(nnx.clone(lives), rngs)).init(0)
    np.testing.assert_array_equal(copied.variables["params"]["part"]["head"]["kernel"], lives.head.kernel[...])
    assert from_nnx(lives).__getstate__()["origin"] is None


class Switched(nnx.Module):
    """With a mode of its own, which Flax does not know."""

    def __init__(self, rngs):
        self.head, self.noisy = nnx.Linear(5, 3, rngs=rngs), True

    def train(self, **attributes):
        super().train(**attributes)
        self.noisy = True

    def eval(self, **attributes):
        super().eval(**attributes)
        self.noisy = False

    def __call__(self, x):
        return self.head(x) + (100 if self.noisy else 0)


def test_a_modules_own_mode_is_told():
    module = Switched(nnx.Rngs(0))
    model = from_nnx(module)
    network, evaluated, x = model.network, module.head(np.ones((2, 5))), np.ones((2, 5), np.float32)
    np.testing.assert_allclose(model(x), evaluated, rtol=1e-5)
    np.testing.assert_allclose(network.apply(model.variables, x, train=True)[0].logits, evaluated + 100, rtol=1e-5)
    np.testing.assert_allclose(to_module(model)(x), evaluated, rtol=1e-5)
    assert module.noisy, "the module itself is not changed"


def test_a_method_of_that_name_for_something_else_is_left_alone():
    class Trainer(Switched):
        def train(self, data):
            raise AssertionError

        def __call__(self, x):
            return self.head(x)

    model = from_nnx(Trainer(nnx.Rngs(0)))
    assert model(np.ones((2, 5), np.float32), train=True).shape == (2, 3)


def test_a_key_may_be_part_of_the_state():
    class Keyed(nnx.Module):
        def __init__(self, rngs):
            self.head, self.key = nnx.Linear(5, 3, rngs=rngs), nnx.Variable(jax.random.key(3))

        def __call__(self, x):
            return self.head(x) + jax.random.normal(self.key[...], (1, 3))

    model = from_nnx(Keyed(nnx.Rngs(0)))
    assert model.variables["state"]["key"] == jax.random.key(3)
    assert model(np.ones((2, 5), np.float32)).shape == (2, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Called:
    """As Equinox has its modules."""

    weight: Any

    def __call__(self, x):
        return self.weight @ x


def test_a_pytree_that_is_called_is_no_constructor():
    with pytest.raises(ConfigError, match=r"Called is a PyTree that is called, .*give kd\.from_function"):
        from_nnx(Called(jnp.ones((3, 5))))


def test_a_function_of_inputs_is_no_module() -> None:
    with pytest.raises(ConfigError, match=r"the lambda was called with nnx\.Rngs.*kd\.from_function\(apply, params\)"):
        as_model(lambda x: x[:, :3] * 2.0)
