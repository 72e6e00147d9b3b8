"""Fresh variables: made by one program where that pays, with the same numbers, and forgotten with their network."""

import gc
import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from small import DATA, HOW, IMAGES, Residual

import kd_jax as kd
from kd_jax.models import fresh as module
from kd_jax.models.fresh import fresh
from kd_jax.models.nnx import NNXNetwork

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
def test_the_numbers_are_those_of_the_network_itself(make: Any) -> None:
    model = make()
    found = model.init(KEY).variables
    assert id(model.network) in module._programs
    assert_near(found, model.network.init(KEY))
    # For one who traces it, and without compilation.
    both = jax.jit(jax.vmap(lambda key: fresh(model.network, key)))(jax.random.split(KEY))
    assert_near(jax.tree.map(lambda leaf: leaf[1], both), fresh(model.network, jax.random.split(KEY)[1]))
    with jax.disable_jit():
        assert_near(fresh(model.network, KEY), found)


def test_many_shapes_are_one_program_and_few_are_none() -> None:
    many, few = kd.from_nnx(Layers), kd.from_nnx(lambda rngs: Layers(rngs, count=4))
    Layers.made = 0
    for seed in range(3):
        many.init(seed)
    assert Layers.made == 1
    for seed in range(3):
        few.init(seed)
    assert Layers.made == 4
    assert id(few.network) not in module._programs
    assert not np.array_equal(*(jax.tree.leaves(many.init(seed).variables["params"])[1] for seed in (0, 1)))


def test_it_is_forgotten_with_its_network() -> None:
    model = kd.from_nnx(Layers)
    model.init(0)
    known, network = id(model.network), weakref.ref(model.network)
    assert known in module._programs
    del model
    gc.collect()
    assert network() is None
    assert known not in module._programs


def test_where_xla_has_no_levels_the_network_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUICKLY", {"xla_no_such_option": "1"})
    module._has_levels.cache_clear()
    model = kd.from_nnx(Layers)
    assert_near(model.init(KEY).variables, model.network.init(KEY))
    assert id(model.network) not in module._programs
    module._has_levels.cache_clear()


@pytest.mark.parametrize("train", ["fit", "distill", "compare"])
def test_a_training_begins_with_the_same(train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> Any:
        model = kd.from_nnx(Layers)
        if train == "fit":
            return kd.fit(5, DATA, model, method=kd.CrossEntropy(), **HOW)[1]["loss"]
        if train == "distill":
            return kd.distill(model, None, DATA, **HOW).history["loss"]
        found = kd.compare(model, None, DATA, DATA, methods={"alone": kd.CrossEntropy()}, seeds=2, **HOW)
        return found.values["alone"]["nll"]

    with_it = losses()
    assert module._programs
    monkeypatch.setattr(NNXNetwork, "compiles_init", False)
    np.testing.assert_allclose(with_it, losses(), rtol=1e-5)


BITS = """
import jax
import numpy as np
import kd_jax as kd
from models.test_fresh import Layers, linen_model
from kd_jax.models.fresh import fresh

for model in (kd.from_nnx(Layers), linen_model()):
    ways = fresh(model.network, jax.random.key(3)), model.network.init(jax.random.key(3))
    for one, other in zip(*map(jax.tree.leaves, ways), strict=True):
        np.testing.assert_array_equal(one, other)
print("the same")
"""


@pytest.mark.slow
def test_the_bits_are_those_of_the_usual_level() -> None:
    """In a process that compiles as users do."""
    own = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", BITS], capture_output=True, text=True, env=os.environ | own)
    assert done.stdout == "the same\n", done.stderr
