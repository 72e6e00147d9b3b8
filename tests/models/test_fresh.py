"""Fresh variables: made by one program where that pays, with the same numbers, and forgotten with their network."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from small import DATA, HOW, IMAGES, Residual

import kd_jax as kd
from kd_jax.convolution import compiling
from kd_jax.models import fresh as module
from kd_jax.models import programs
from kd_jax.models.fresh import fresh
from kd_jax.models.nnx import NNXNetwork


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one for each program that is compiled quickly."""
    found: list[Any] = []
    usual = compiling.compiled

    def watched(lowered: Any, written: Any = None, option: Any = None) -> Any:
        if option is not None:
            found.append(option)
        return usual(lowered, written, option)

    monkeypatch.setattr(compiling, "compiled", watched)
    programs.forget()
    return found


ROOT = Path(__file__).parents[2]
KEY = jax.random.key(3)


class Layers(nnx.Module):
    """Dense layers of so many shapes, whose making is counted."""

    made = 0

    def __init__(self, rngs: nnx.Rngs, *, count: int = 5):
        type(self).made += 1
        widths = [6, *range(7, 6 + count), 4]
        self.layers = nnx.List([nnx.Linear(n_in, n_out, rngs=rngs) for n_in, n_out in itertools.pairwise(widths)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(nnx.relu(self.dropout(x)))
        return x


def linen_model() -> kd.Model:
    return kd.from_linen(Residual(), IMAGES.astype(np.float32))


def assert_near(one: Any, other: Any) -> None:
    """Programs of other levels round otherwise; the same level has the same bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: kd.from_nnx(Layers), linen_model])
def test_the_numbers_are_those_of_the_network_itself(make: Any, compiled: list[Any]) -> None:
    model = make()
    found = model.init(KEY).variables
    assert compiled == [module._QUICKLY]
    assert_near(found, model.network.init(KEY))
    # For one who traces it, and without compilation.
    both = jax.jit(jax.vmap(lambda key: fresh(model.network, key)))(jax.random.split(KEY))
    assert_near(jax.tree.map(lambda leaf: leaf[1], both), fresh(model.network, jax.random.split(KEY)[1]))
    assert_near(jax.jit(lambda: model.init(KEY).variables)(), found)
    with jax.disable_jit():
        assert_near(fresh(model.network, KEY), found)


def test_many_shapes_are_one_program_and_few_are_none(compiled: list[Any]) -> None:
    many, few = kd.from_nnx(Layers), kd.from_nnx(lambda rngs: Layers(rngs, count=4))
    Layers.made = 0
    for seed in range(3):
        many.init(seed)
    assert Layers.made == 1
    for seed in range(3):
        few.init(seed)
    assert Layers.made == 4
    assert len(compiled) == 1
    assert not np.array_equal(*(jax.tree.leaves(many.init(seed).variables["params"])[1] for seed in (0, 1)))


def test_equal_networks_share_a_program(compiled: list[Any]) -> None:
    kd.from_nnx(Layers).init(0)
    assert_near(kd.from_nnx(lambda rngs: Layers(rngs)).init(KEY).variables, kd.from_nnx(Layers).init(KEY).variables)
    assert len(compiled) == 1
    with jax.enable_x64(True):
        kd.from_nnx(Layers).init(0)
    assert len(compiled) == 2


def test_what_differs_by_a_constant_or_a_function_of_python_is_another_program() -> None:
    def of(value: float, *, called: bool) -> Any:
        def make(rngs: nnx.Rngs) -> nnx.Module:
            layers = Layers(rngs)
            shape = jax.ShapeDtypeStruct((300, 300), np.float32)
            values = np.full((300, 300), value, np.float32)
            layers.table = nnx.Param(jax.pure_callback(lambda: values, shape) if called else jax.numpy.array(values))
            return layers

        return kd.from_nnx(make).init(0).variables["params"]["table"]

    for called in (False, True):
        assert [float(of(value, called=called)[299, 299]) for value in (1.0, 2.0)] == [1.0, 2.0]


def test_where_xla_has_no_levels_the_network_makes_them(monkeypatch: pytest.MonkeyPatch, compiled: list[Any]) -> None:
    monkeypatch.setattr(module, "_QUICKLY", ("xla_no_such_option", "1"))
    model = kd.from_nnx(Layers)
    assert_near(model.init(KEY).variables, model.network.init(KEY))
    assert compiled == []


@pytest.mark.parametrize("train", ["fit", "distill", "compare"])
def test_a_training_begins_with_the_same(train: str, monkeypatch: pytest.MonkeyPatch, compiled: list[Any]) -> None:
    def losses() -> Any:
        model = kd.from_nnx(lambda rngs: Layers(rngs))
        if train == "fit":
            return kd.fit(5, DATA, model, method=kd.CrossEntropy(), **HOW)[1]["loss"]
        if train == "distill":
            return kd.distill(model, None, DATA, **HOW).history["loss"]
        methods = {"alone": kd.CrossEntropy(), "smoothed": kd.LabelSmoothing()}
        found = kd.compare(model, None, DATA, DATA, methods=methods, seeds=1, **HOW)
        return [found.values[name]["nll"] for name in methods]

    with_it = losses()
    # One for both methods.
    assert len(compiled) == 1
    monkeypatch.setattr(NNXNetwork, "compiles_init", False)
    np.testing.assert_allclose(with_it, losses(), rtol=1e-5)
    assert len(compiled) == 1


BITS = """
import jax
import numpy as np
import kd_jax as kd
from flax import nnx
from models.test_fresh import Layers, linen_model
from kd_jax.models.fresh import fresh

class Drawn(nnx.Module):
    def __init__(self, rngs):
        of = nnx.initializers
        kinds = [of.normal(0.02), of.orthogonal(), of.xavier_uniform(), of.he_normal(), of.uniform(0.1)]
        self.embed = nnx.Embed(9, 5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(5, 6 + n, kernel_init=k, rngs=rngs) for n, k in enumerate(kinds)])

for model in (kd.from_nnx(Layers), linen_model(), kd.from_nnx(Drawn)):
    network, key = model.network, jax.random.key(3)
    ways = [fresh(network, key), jax.jit(network.init)(key)]
    # Operation by operation Flax's `normal` is rounded once more.
    ways += [] if len(ways[0]["params"]) == 2 and "embed" in ways[0]["params"] else [network.init(key)]
    for leaves in zip(*map(jax.tree.leaves, ways), strict=True):
        for other in leaves[1:]:
            np.testing.assert_array_equal(leaves[0], other)
print("the same")
"""


@pytest.mark.slow
def test_the_bits_are_those_of_the_usual_level() -> None:
    """In a process that compiles as users do."""
    own = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", BITS], capture_output=True, text=True, env=os.environ | own)
    assert done.stdout == "the same\n", done.stderr
